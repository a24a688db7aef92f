import contextlib
import http.client
import json
import socket
import threading
import time

import pytest
import torch
from dispatch_fakes import fake_profile

from mprec.dispatch import Dispatcher, Path
from mprec.serving import Engine
from mprec.serving.frontend import FrontEnd, parse_query

COSTS = {"p": (1e-5, 1e-8)}
VOCABULARIES, NUM_DENSE = [10, 1000], 1


def score(batch):
    """Sum of the dense number and of all IDs of a sample."""
    size = len(batch)
    lengths = batch.offsets.diff().view(-1, size)
    owner = torch.arange(size).repeat(len(lengths)).repeat_interleave(lengths.flatten())
    return batch.dense[:, 0] + torch.zeros(size).index_add(0, owner, batch.indices.float())


def slow(batch):
    time.sleep(0.3)
    return score(batch)


@contextlib.contextmanager
def serving(model=score, **options):
    path = Path("p", "table", 0.5, model, "shape of p")
    engine = Engine(Dispatcher([path], fake_profile(COSTS)), **{"sla_s": 60.0, **options}).start()
    server = FrontEnd(engine, VOCABULARIES, NUM_DENSE)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        if not server.draining:
            server.drain()
        thread.join(10)
        assert not thread.is_alive()


def ask(server, body, method="POST", path="/score", connection=None):
    own = connection or http.client.HTTPConnection(*server.server_address, timeout=10)
    own.request(method, path, body if isinstance(body, bytes | None) else json.dumps(body))
    response = own.getresponse()
    content = json.loads(response.read())
    if connection is None:
        own.close()
    return response.status, content


def test_scores_of_single_ids_and_bags():
    with serving() as server:
        body = {"dense": [[0.5], [1.0]], "ids": [[3, [1, 2, 3]], [[], 999]]}
        status, content = ask(server, body)
        assert (status, content["scores"]) == (200, [9.5, 1000.0])
        assert content["paths"] == {"p": 2}
        assert content["latency_ms"] > 0


def test_many_clients_on_kept_connections():
    wrong = []

    def client(number):
        connection = http.client.HTTPConnection(*server.server_address, timeout=30)
        for i in range(20):
            body = {"dense": [[float(number)]] * (i + 1), "ids": [[i % 10, j] for j in range(i + 1)]}
            status, content = ask(server, body, connection=connection)
            expected = [number + i % 10 + j for j in range(i + 1)]
            if (status, content.get("scores")) != (200, expected):
                wrong.append((status, content))
        connection.close()

    with serving() as server:
        threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        assert wrong == []
        assert ask(server, None, "GET", "/stats")[1]["answered"] == 120


def test_health_and_stats():
    with serving() as server:
        assert ask(server, None, "GET", "/health") == (200, {"status": "serving"})
        status, stats = ask(server, None, "GET", "/stats")
        assert (status, stats["queries"], stats["waiting_samples"]) == (200, 0, 0)
        assert ask(server, None, "GET", "/")[0] == 404
        assert ask(server, {}, path="/other")[0] == 404


GOOD = {"dense": [[0.5]], "ids": [[1, 2]]}


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 100_000, "JSON"),
        ([], "body must be"),
        ({"ids": []}, "body must be"),
        ({**GOOD, "id": 1}, "unknown key 'id'"),
        ({**GOOD, "ids": [[1]]}, r"ids[0]"),
        ({**GOOD, "ids": [[1, 2], [1, 2]]}, "dense"),
        ({**GOOD, "ids": [[10, 2]]}, "ids[0][0]: 10 is not an integer in [0, 10)"),
        ({**GOOD, "ids": [[1, -1]]}, "ids[0][1]: -1"),
        ({**GOOD, "ids": [[1.0, 2]]}, "1.0"),
        ({**GOOD, "ids": [[True, 2]]}, "True"),
        ({**GOOD, "ids": [[1, [2, "3"]]]}, "'3'"),
        ({**GOOD, "ids": [[1, 10**30]]}, "not an integer"),
        ({**GOOD, "dense": [[0.5, 1.0]]}, "dense[0]"),
        ({**GOOD, "dense": [["x"]]}, "dense[0]"),
        ({"ids": [[1, 2]]}, "dense"),
        ({**GOOD, "sla_ms": 0}, "sla_ms"),
        ({**GOOD, "sla_ms": "soon"}, "sla_ms"),
    ],
)
def test_bad_queries_are_answered_400_and_do_no_harm(body, match):
    with serving() as server:
        status, content = ask(server, body)
        assert status == 400
        assert match in content["error"]
        assert ask(server, GOOD)[0] == 200


def test_refusals_have_their_own_status():
    with serving(max_queue=1) as server:
        assert ask(server, {"dense": [[0.0]] * 2, "ids": [[1, 2]] * 2})[1]["reason"] == "full"
    with serving() as server:
        status, content = ask(server, {**GOOD, "sla_ms": 1e-6})
        assert (status, content["reason"]) in ((429, "overload"), (504, "expired"))


def test_a_model_that_raises_is_a_500_and_so_is_one_whose_scores_are_not_finite():
    def model(batch):
        if (batch.indices == 7).any():
            raise RuntimeError("seven")
        return score(batch) * float("nan")

    with serving(model) as server:
        status, content = ask(server, {**GOOD, "ids": [[7, 2]]})
        assert status == 500
        assert "seven" in content["error"]
        status, content = ask(server, GOOD)
        assert status == 500
        assert "not finite" in content["error"]


def test_a_body_that_is_too_large_or_of_unknown_length():
    with serving() as server:
        for headers, status in (
            (b"Content-Length: 99999999999", b"413"),
            (b"", b"411"),
            (b"Content-Length: -1", b"411"),
        ):
            with socket.create_connection(server.server_address, timeout=10) as raw:
                raw.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n\r\n")
                assert status in raw.recv(100)
        assert ask(server, GOOD)[0] == 200


def test_a_client_that_leaves_early_does_no_harm():
    with serving(slow) as server:
        with socket.create_connection(server.server_address, timeout=10) as raw:
            body = json.dumps(GOOD).encode()
            raw.sendall(b"POST /score HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert ask(server, GOOD)[0] == 200


def test_draining_answers_what_was_asked_and_ends_idle_connections():
    answers = []
    with serving(slow) as server:
        idle = http.client.HTTPConnection(*server.server_address, timeout=10)
        assert ask(server, None, "GET", "/health", idle)[0] == 200
        threads = [threading.Thread(target=lambda: answers.append(ask(server, GOOD))) for _ in range(3)]
        for t in threads:
            t.start()
        deadline = time.monotonic() + 10
        while server.engine.statistics()["queries"] < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        server.drain()
        for t in threads:
            t.join(10)
        assert [status for status, _ in answers] == [200] * 3
        with pytest.raises(OSError):
            socket.create_connection(server.server_address, timeout=1).close()
        idle.close()


def test_parse_query_is_feature_major():
    batch, sla_s = parse_query(
        json.dumps({"dense": [[1], [2]], "ids": [[1, [2, 3]], [4, []]], "sla_ms": 5}).encode(), [10, 10], 1
    )
    assert batch.indices.tolist() == [1, 4, 2, 3]
    assert batch.offsets.tolist() == [0, 1, 2, 4, 4]
    assert batch.dense.tolist() == [[1.0], [2.0]]
    assert sla_s == 0.005
    no_dense, sla_s = parse_query(b'{"ids": [[1]]}', [2], 0)
    assert (tuple(no_dense.dense.shape), sla_s) == ((1, 0), None)
