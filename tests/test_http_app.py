"""What a server tells of itself, and hot reload."""

import asyncio
import logging
import threading
import time

import orjson
import pytest
import torch
from http_serving import GOOD, INPUTS, executors, score, serving, wait_until
from prometheus_client.parser import text_string_to_metric_families
from starlette.routing import Route

from mprec.serving.http import Service, create_app
from mprec.serving.http.access_log import JsonFormatter
from mprec.serving.http.pulse import Pulse


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


def get(server, path, method="GET", headers=None):
    connection = server.connect()
    connection.request(method, path, headers=headers or {})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def samples(server):
    text = get(server, "/metrics")[1].decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_health_and_stats(server):
    assert server.ask(path="/healthz") == (200, {"status": "alive"})
    assert server.ask(path="/readyz") == (200, {"status": "ready"})
    assert server.ask(path="/health?x=1") == (200, {"status": "serving"})
    assert server.ask(GOOD)[0] == 200
    status, stats = server.ask(path="/stats")
    assert status == 200
    assert (stats["status"], stats["sla_ms"], stats["waiting_samples"]) == ("ready", 60_000, 0)
    assert stats["latency_ms"]["count"] >= 1
    assert 0 < stats["latency_ms"]["p50"] <= stats["latency_ms"]["p99"]


def test_other_methods_and_addresses_are_answered_in_json(server):
    for path in ("/healthz", "/readyz", "/stats", "/"):
        response, content = get(server, path, "HEAD")
        assert (response.status, content) == (200, b"")
    for method in ("GET", "PUT", "DELETE", "OPTIONS"):
        status, content = server.ask(path="/score", method=method)
        assert (status, content["reason"]) == (405, "method")
    status, content = server.ask(path="/other")
    assert (status, content["reason"]) == (404, "not found")
    assert server.ask({}, path="/healthz/")[0] == 404


def test_metrics_count_what_happened():
    def model(batch):
        if (batch.indices == 7).any():
            raise RuntimeError("seven")
        return score(batch)

    with serving(model) as server:
        for _ in range(3):
            server.ask({"dense": [[0.5]] * 2, "ids": [[1, 2]] * 2})
        server.ask({**GOOD, "ids": [[7, 7]]})
        server.ask({**GOOD, "ids": [[-1, 7]]})
        found = samples(server)
        assert found["mprec_queries_total", ("outcome", "in_time"), ("reason", "")] == 3
        assert found["mprec_queries_total", ("outcome", "failed"), ("reason", "")] == 1
        assert found["mprec_samples_total", ("path", "p")] == 6
        assert found["mprec_latency_seconds_count",] == 3
        assert found["mprec_latency_seconds_bucket", ("le", "+Inf")] == 3
        assert found["mprec_http_replies_total", ("status", "200")] == 3
        assert found["mprec_http_replies_total", ("status", "400")] == 1
        assert found["mprec_http_replies_total", ("status", "500")] == 1
        assert found["mprec_ready",] == 1
        assert found["mprec_connections",] >= 1
        assert found["mprec_correction", ("path", "p")] > 0
        assert found["mprec_busy_seconds_total", ("executor", "cpu")] > 0
        server.engine.close()
        server.ask(GOOD)
        assert samples(server)["mprec_queries_total", ("outcome", "refused"), ("reason", "closed")] == 1


def test_before_there_is_an_engine_all_is_answered_and_nothing_scored():
    with serving(has_engine=False) as server:
        assert server.ask(path="/healthz")[0] == 200
        for path in ("/readyz", "/health"):
            status, content = server.ask(path=path)
            assert (status, content["status"]) == (503, "starting")
        status, content = server.ask(GOOD)
        assert (status, content["reason"]) == (503, "starting")
        assert server.ask(path="/stats")[1]["status"] == "starting"
        assert samples(server)["mprec_ready",] == 0


def test_openapi_describes_the_application_that_there_is(server):
    document = server.ask(path="/openapi.json")[1]
    assert {*document} >= {"openapi", "info", "paths"}
    routes = {
        r.path: r.methods - {"HEAD"} for r in create_app(Service(INPUTS)).routes if isinstance(r, Route)
    }
    described = {path: {method.upper() for method in of} for path, of in document["paths"].items()}
    assert described == routes
    body = document["paths"]["/score"]["post"]["requestBody"]["content"]["application/json"]
    assert server.ask(body["example"])[0] == 200
    row = document["components"]["schemas"]["Query"]["properties"]["ids"]["items"]["prefixItems"]
    assert [(f["title"], f["oneOf"][0]["maximum"]) for f in row] == [("colour", 9), ("item", 999)]


def test_the_page_fetches_nothing_from_elsewhere(server):
    response, content = get(server, "/")
    assert response.headers["content-type"].startswith("text/html")
    assert "connect-src 'self'" in response.headers["content-security-policy"]
    assert b"http://" not in content
    assert b"https://" not in content
    assert b'fetch("stats"' in content


def test_silence_is_queries_without_an_answer():
    pulse = Pulse(5.0)
    assert not pulse.is_silent(100.0)
    pulse.asked(100.0)
    assert not pulse.is_silent(105.0)
    assert pulse.is_silent(105.1)  # one is under way and nothing comes back
    pulse.settled(False)
    assert not pulse.is_silent(105.1)  # refused, and nobody asks any more
    for second in range(110, 117):
        pulse.asked(float(second))
        pulse.settled(False)
    assert pulse.is_silent(116.0)
    pulse.asked(116.5)
    pulse.settled(True)
    assert not pulse.is_silent(117.0)


def test_a_server_that_answers_nothing_is_not_ready():
    begun, go_on = threading.Event(), threading.Event()

    def stuck(batch):
        begun.set()
        assert go_on.wait(20)
        return score(batch)

    with serving(stuck) as server:
        server.service.pulse.patience_s = 0.2
        thread = threading.Thread(target=server.ask, args=(GOOD,))
        thread.start()
        assert begun.wait(20)
        wait_until(lambda: server.ask(path="/readyz")[1]["status"] == "silent")
        assert server.ask(path="/healthz")[0] == 200
        go_on.set()
        thread.join(20)
        assert server.ask(path="/readyz")[0] == 200


def other(batch):
    return -torch.ones(len(batch))


def test_models_are_reloaded_without_losing_a_query():
    loads = []

    def reload():
        loads.append(1)
        grown = INPUTS._replace(vocabularies=[10, 2000])
        return executors(other, "q"), grown

    statuses = []
    with serving(reload=reload) as server:
        stop = threading.Event()

        def client():
            connection = server.connect()
            while not stop.is_set():
                statuses.append(server.ask(GOOD, connection=connection)[0])
            connection.close()

        threads = [threading.Thread(target=client) for _ in range(3)]
        for t in threads:
            t.start()
        assert server.ask({**GOOD, "ids": [[1, 1500]]})[0] == 400
        time.sleep(0.05)
        assert server.ask({}, path="/reload") == (200, {"status": "reloaded", "paths": ["q"]})
        time.sleep(0.05)
        stop.set()
        for t in threads:
            t.join(20)
        assert set(statuses) == {200}
        status, content = server.ask({**GOOD, "ids": [[1, 1500]]})
        assert (status, content["scores"], content["paths"]) == (200, [-1.0], {"q": 1})
    assert len(loads) == 1


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        (INPUTS._replace(names=["colour", "other"]), "other features"),
        (INPUTS._replace(num_dense=2), "other features"),
        (INPUTS._replace(vocabularies=[10, 999]), "feature 'item': expected a vocabulary of at least 1000"),
    ],
)
def test_models_that_do_not_fit_are_not_taken(inputs, match):
    with serving(reload=lambda: (executors(other, "q"), inputs)) as server:
        status, content = server.ask({}, path="/reload")
        assert (status, content["reason"]) == (500, "reload")
        assert match in content["error"]
        assert server.ask(GOOD)[1]["paths"] == {"p": 1}


def test_a_reload_that_fails_leaves_all_as_it_was_and_one_runs_at_a_time():
    begun, go_on = threading.Event(), threading.Event()

    def reload():
        begun.set()
        assert go_on.wait(20)
        raise OSError("no such file")

    answers = []
    with serving(reload=reload) as server:
        thread = threading.Thread(target=lambda: answers.append(server.ask({}, path="/reload")))
        thread.start()
        assert begun.wait(20)
        assert server.ask({}, path="/reload")[0] == 409
        assert server.ask(GOOD)[0] == 200
        go_on.set()
        thread.join(20)
        assert answers[0][0] == 500
        assert "no such file" in answers[0][1]["error"]
        assert server.ask(GOOD)[0] == 200


def test_only_this_machine_may_reload_and_only_with_the_token():
    def reload():
        return executors(other, "q"), INPUTS

    with serving(reload=reload, reload_token="geheim") as server:
        bearer = {"Authorization": "Bearer geheim"}
        assert server.ask({}, path="/reload")[0] == 403
        assert server.ask({}, path="/reload", headers={"Authorization": "Bearer other"})[0] == 403
        for name in ("X-Forwarded-For", "Origin", "Via"):
            assert server.ask({}, path="/reload", headers={**bearer, name: "127.0.0.1"})[0] == 403
        assert server.ask({}, path="/reload", headers=bearer)[0] == 200


async def _call(app, path, client):
    sent = []

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [],
        "query_string": b"",
        "client": client,
        "root_path": "",
    }
    await app(scope, receive, send)
    return sent[0]["status"]


@pytest.mark.parametrize(
    ("host", "status"), [("10.0.0.7", 403), ("::ffff:10.0.0.7", 403), ("::1", 500), ("::ffff:127.0.0.1", 500)]
)
def test_clients_of_other_machines_may_not_reload(host, status):
    app = create_app(
        Service(INPUTS)
    )  # it has nothing to reload: 500 says that the client would have been let
    assert asyncio.run(_call(app, "/reload", (host, 5000))) == status


def test_the_access_log_is_a_line_of_json_for_each_request(caplog):
    app = create_app(Service(INPUTS), access_log=True)
    with caplog.at_level(logging.INFO, "mprec.access"):
        asyncio.run(_call(app, "/other", ("127.0.0.1", 5000)))
    (record,) = [record for record in caplog.records if record.name == "mprec.access"]
    line = orjson.loads(JsonFormatter().format(record))
    assert (line["method"], line["path"], line["status"], line["client"]) == (
        "POST",
        "/other",
        404,
        "127.0.0.1",
    )
    assert line["ms"] >= 0
