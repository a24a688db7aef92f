"""POST /score, in JSON and in raw numbers."""

import http.client
import json
import threading
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from http_serving import GOOD, INPUTS, score, serving
from hypothesis import given, settings
from hypothesis import strategies as st

from mprec.serving import QueryRefusedError, QueryTooLargeError, rows_to_batch
from mprec.serving.http import Limits, decode_scores, encode_query
from mprec.serving.http.parse import parse_binary, parse_json
from mprec.serving.http.score import Score

BINARY = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


def test_scores_of_single_ids_and_bags(server):
    body = {"dense": [[0.5], [1.0]], "ids": [[3, [1, 2, 3]], [[], 999]]}
    status, content = server.ask(body)
    assert (status, content["scores"]) == (200, [9.5, 1000.0])
    assert content["paths"] == {"p": 2}
    assert content["latency_ms"] > 0


def test_scores_in_json_are_the_floats_exactly():
    values = torch.tensor([0.1, 1 / 3, 1e-30, 0.99999994])
    with serving(lambda batch: values) as server:
        body = {"dense": [[0]] * 4, "ids": [[1, 2]] * 4}
        assert np.array_equal(np.float32(server.ask(body)[1]["scores"]), values.numpy())


@pytest.mark.parametrize("with_bags", [False, True])
def test_raw_numbers_score_as_json_does(server, with_bags):
    ids = [[3, [1, 2, 3]], [[], 999]] if with_bags else [[3, 4], [5, 6]]
    dense = [[0.5], [1.0]]
    if with_bags:
        body = encode_query(np.array([3, 1, 2, 3, 999]), dense, lengths=np.array([[1, 0], [3, 1]]))
    else:
        body = encode_query(np.array(ids), dense, sla_ms=5000)
    connection = server.connect()
    connection.request("POST", "/score", body, BINARY)
    response = connection.getresponse()
    scores = decode_scores(response.read())
    connection.close()
    assert (response.status, response.headers["content-type"]) == (200, "application/octet-stream")
    assert scores.tolist() == server.ask({"dense": dense, "ids": ids})[1]["scores"]
    assert json.loads(response.headers["x-mprec-paths"]) == {"p": 2}
    assert float(response.headers["x-mprec-latency-ms"]) > 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_raw_numbers_are_the_batch_that_rows_are(data):
    size = data.draw(st.integers(1, 5))
    bag = st.lists(st.integers(0, 9), max_size=3)
    ids = [[data.draw(bag), data.draw(bag)] for _ in range(size)]
    dense = [[data.draw(st.floats(-1e6, 1e6, width=32))] for _ in range(size)]
    flat = [value for t in range(2) for row in ids for value in row[t]]
    lengths = np.array([[len(row[t]) for row in ids] for t in range(2)])
    body = encode_query(np.array(flat, dtype=np.int32), dense, lengths=lengths, sla_ms=2)
    batch, sla_s = parse_binary(body, INPUTS, Limits())
    expected = rows_to_batch(ids, dense, INPUTS.vocabularies, 1)
    for name in ("dense", "indices", "offsets", "labels"):
        got, wanted = getattr(batch, name), getattr(expected, name)
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
    assert sla_s == 0.002


@given(st.binary(max_size=120), st.integers(0, 60))
def test_damaged_raw_numbers_are_refused_or_a_good_batch(noise, at):
    body = bytearray(encode_query(np.array([[1, 2], [3, 4]]), [[0.0], [1.0]]))
    body[at : at + len(noise)] = noise
    try:
        batch, _ = parse_binary(bytes(body), INPUTS, Limits())
    except ValueError:
        return
    score(batch)  # the reference indexes by the offsets
    assert ((batch.indices >= 0) & (batch.indices < 1000)).all()
    assert batch.dense.isfinite().all()


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"", "mpq1"),
        (b"mpq2" + bytes(28), "mpq1"),
        (encode_query(np.zeros((1, 3), int), [[0.0]]), "3 features"),
        (encode_query(np.zeros((1, 2), int)), "0 dense numbers"),
        (encode_query(np.zeros((0, 2), int), np.zeros((0, 1))), "at least one sample"),
        (encode_query(np.zeros((1, 2), int), [[0.0]])[:-1], "bytes"),
        (encode_query(np.zeros((1, 2), int), [[0.0]]) + b"x", "bytes"),
        (encode_query(np.array([[1, 2], [1, 1000]]), [[0.0], [0.0]]), r"ids[1][1]: 1000 is not in [0, 1000)"),
        (encode_query(np.array([[1, 2], [-1, 2]]), [[0.0], [0.0]]), r"ids[1][0]: -1 is not in [0, 10)"),
        (encode_query(np.array([5, 12]), [[0.0]], lengths=np.array([[2], [0]])), r"ids[0][0]: 12"),
        (encode_query(np.zeros((1, 2), int), [[np.nan]]), r"dense[0][0]: nan"),
        (encode_query(np.zeros((1, 2), int), [[0.0]], sla_ms=-1), "sla_ms"),
        (encode_query(np.zeros((1, 2), int), [[0.0]], sla_ms=np.inf), "sla_ms"),
        (encode_query(np.zeros((1, 2), int), [[0.0]], sla_ms=np.nan), "sla_ms"),
    ],
)
def test_bad_raw_numbers_are_answered_400(server, body, match):
    status, content = server.ask(body, headers=BINARY)
    assert (status, content["reason"]) == (400, "bad request")
    assert match in content["error"]


def test_lengths_below_zero_are_refused():
    body = encode_query(np.array([1, 2]), [[0.0]], lengths=np.array([[3], [-1]]))
    with pytest.raises(ValueError, match="lengths"):
        parse_binary(body, INPUTS, Limits())


def test_what_cannot_be_encoded_is_named():
    with pytest.raises(TypeError, match="ids"):
        encode_query(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="lengths"):
        encode_query(np.array([1, 2, 3]), lengths=np.array([[1], [1]]))
    with pytest.raises(ValueError, match="dense"):
        encode_query(np.array([[1, 2]]), [[0.0], [0.0]])


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 100_000, "JSON"),
        (b'{"ids": [[1, 2]], "dense": [[0]], "sla_ms": NaN}', "JSON"),
        (b'{"ids": [[1, 2]], "dense": [[0]], "sla_ms": Infinity}', "JSON"),
        (b'{"ids": [[1, 2]], "dense": [[0]], "sla_ms": 1' + b"0" * 400 + b"}", "infinity"),
        (b'{"ids": [[1, 2]], "dense": [[1' + b"0" * 400 + b"]]}", "infinity"),
        ([], "body must be"),
        ({"ids": []}, "body must be"),
        ({**GOOD, "id": 1}, "unknown key 'id'"),
        ({**GOOD, "ids": [[1]]}, r"ids[0]"),
        ({**GOOD, "ids": [[1, 2], [1, 2]]}, "dense"),
        ({**GOOD, "ids": [[10, 2]]}, "ids[0][0]: 10 is not an integer in [0, 10)"),
        ({**GOOD, "ids": [[1, -1]]}, "ids[0][1]: -1"),
        ({**GOOD, "ids": [[1.0, 2]]}, "1.0"),
        ({**GOOD, "ids": [[True, 2]]}, "True"),
        ({**GOOD, "ids": [[1, [2, False]]]}, "False"),
        ({**GOOD, "ids": [[1, None]]}, "ids[0][1]: None"),
        ({**GOOD, "ids": [[1, {}]]}, "ids[0][1]: {}"),
        ({**GOOD, "ids": [[1, [2, "3"]]]}, "'3'"),
        ({**GOOD, "ids": [[1, [[2]]]]}, "ids[0][1]: [2]"),
        ({**GOOD, "ids": [[1, 10**30]]}, "not an integer"),
        ({**GOOD, "dense": [[0.5, 1.0]]}, "dense[0]"),
        ({**GOOD, "dense": [["x"]]}, "dense[0]"),
        ({**GOOD, "dense": [[True]]}, "dense[0][0]: True"),
        ({**GOOD, "dense": [[1e39]]}, "not finite"),
        ({"ids": [[1, 2]]}, "dense"),
        ({**GOOD, "sla_ms": 0}, "sla_ms"),
        ({**GOOD, "sla_ms": True}, "sla_ms"),
        ({**GOOD, "sla_ms": 1e308}, "sla_ms"),
        ({**GOOD, "sla_ms": "soon"}, "sla_ms"),
    ],
)
def test_bad_queries_are_answered_400_and_do_no_harm(server, body, match):
    status, content = server.ask(body)
    assert (status, content["reason"]) == (400, "bad request")
    assert match in content["error"]
    assert server.ask(GOOD)[0] == 200


def test_a_truth_value_is_found_however_the_text_spells_the_rest():
    body = b'{"ids": [[1, 2], [0, false]], "dense": [[0], [0]]}'
    with pytest.raises(ValueError, match=r"ids\[1\]\[1\]: False"):
        parse_json(body, INPUTS, Limits())
    with pytest.raises(ValueError, match=r"dense\[1\]\[0\]: True"):
        parse_json(b'{"ids": [[1, 2], [0, 0]], "dense": [[0], [true]]}', INPUTS, Limits())


def test_samples_and_ids_are_bounded():
    limits = {"max_samples": 3, "max_ids": 8}
    with serving(limits=limits) as server:
        four = {"dense": [[0]] * 4, "ids": [[1, 2]] * 4}
        long = {**GOOD, "ids": [[1, [2] * 8]]}
        for body in (four, long):
            status, content = server.ask(body)
            assert (status, content["reason"]) == (413, "too large")
        status, _ = server.ask(encode_query(np.array(four["ids"]), four["dense"]), headers=BINARY)
        assert status == 413
        assert server.ask({"dense": [[0]] * 3, "ids": [[1, 2]] * 3})[0] == 200
    with pytest.raises(QueryTooLargeError):
        rows_to_batch([[1, [2] * 8]], [[0]], INPUTS.vocabularies, 1, max_ids=8)


@pytest.mark.parametrize(
    ("reason", "status"), [("full", 429), ("overload", 429), ("expired", 504), ("closed", 503)]
)
def test_refusals_have_their_own_status(server, monkeypatch, reason, status):
    refused = Future()
    refused.set_exception(QueryRefusedError(reason, "no"))
    monkeypatch.setattr(server.engine, "submit", lambda *_: refused)
    assert server.ask(GOOD) == (status, {"error": "no", "reason": reason})


def test_engines_refusals_arrive():
    with serving(max_queue=1) as server:
        status, content = server.ask({"dense": [[0.0]] * 2, "ids": [[1, 2]] * 2})
        assert (status, content["reason"]) == (429, "full")
    with serving() as server:
        status, content = server.ask({**GOOD, "sla_ms": 1e-6})
        assert (status, content["reason"]) in {(429, "overload"), (504, "expired")}
        server.engine.close()
        status, content = server.ask(GOOD)
        assert (status, content["reason"]) == (503, "closed")


def test_a_query_that_expires_while_it_waits_is_504():
    begun, go_on = threading.Event(), threading.Event()

    def blocked(batch):
        begun.set()
        assert go_on.wait(20)
        return score(batch)

    answers = []
    with serving(blocked) as server:
        first = threading.Thread(target=lambda: answers.append(server.ask(GOOD)))
        first.start()
        assert begun.wait(20)
        second = threading.Thread(target=lambda: answers.append(server.ask({**GOOD, "sla_ms": 100})))
        second.start()
        while server.engine.statistics()["queries"] < 2:
            pass
        threading.Timer(0.2, go_on.set).start()
        for thread in (first, second):
            thread.join(20)
    assert sorted((status, content.get("reason")) for status, content in answers) == [
        (200, None),
        (504, "expired"),
    ]


def test_a_model_that_raises_or_gives_nan_is_a_500():
    def model(batch):
        if (batch.indices == 7).any():
            raise RuntimeError("seven")
        return score(batch) * float("nan")

    with serving(model) as server:
        status, content = server.ask({**GOOD, "ids": [[7, 2]]})
        assert (status, content["reason"]) == (500, "failed")
        assert "seven" in content["error"]
        status, content = server.ask(GOOD)
        assert (status, content["reason"]) == (500, "failed")
        assert "not finite" in content["error"]


def test_many_clients_on_kept_connections(server):
    before = server.engine.statistics()["answered"]
    wrong = []

    def client(number):
        connection = server.connect()
        for i in range(20):
            body = {"dense": [[float(number)]] * (i + 1), "ids": [[i % 10, j] for j in range(i + 1)]}
            status, content = server.ask(body, connection=connection)
            expected = [number + i % 10 + j for j in range(i + 1)]
            if (status, content.get("scores")) != (200, expected):
                wrong.append((status, content))
        connection.close()

    threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert wrong == []
    assert server.engine.statistics()["answered"] - before == 120


def test_arrival_counts_from_the_first_byte(server):
    """A body that takes its time uses up the query's own target."""
    body = json.dumps({**GOOD, "sla_ms": 150}).encode()
    head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    with server.raw(head[:20]) as connection:
        threading.Event().wait(0.3)
        connection.sendall(head[20:] + body)
        response = http.client.HTTPResponse(connection)
        response.begin()
        assert response.status in (429, 504)
        assert json.loads(response.read())["reason"] in ("overload", "expired")


def test_compressed_bodies_are_refused(server):
    status, content = server.ask(GOOD, headers={"Content-Encoding": "gzip"})
    assert (status, content["reason"]) == (415, "unsupported")
    assert server.ask(GOOD, headers={"Content-Encoding": "identity"})[0] == 200
    sent = b"POST /score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    reply = server.exchange(sent)
    assert reply.startswith(b"HTTP/1.1 415 ")
    assert b"Transfer-Encoding gzip, chunked is not taken" in reply


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(GOOD).encode(),
        json.dumps({**GOOD, "ids": [[1, [2, 3]]], "sla_ms": 5000}).encode(),
        json.dumps({**GOOD, "ids": [[10, 2]]}).encode(),
        json.dumps({**GOOD, "sla_ms": 0}).encode(),
        b"{",
        b"[" * 1000,
        b'{"ids": ' + b" " * 100_000,
    ],
)
def test_the_short_way_and_the_application_say_the_same(server, body):
    """A request that says that it is the last of its connection goes through the application."""

    def ask(headers):
        connection = server.connect()
        connection.request("POST", "/score", body, headers)
        response = connection.getresponse()
        content = json.loads(response.read())
        connection.close()
        content.pop("latency_ms", None)
        names = {name.lower() for name, _ in response.getheaders()} - {"connection"}
        return response.status, content, names

    assert ask({}) == ask({"Connection": "close"})


def test_plain_queries_do_not_go_through_the_application(server, monkeypatch):
    called = []
    plain = Score.__call__

    async def noting(self, *args):
        called.append(1)
        await plain(self, *args)

    monkeypatch.setattr(Score, "__call__", noting)
    assert server.ask(GOOD)[0] == 200
    assert called == []
    assert server.ask(GOOD, headers={"Connection": "close"})[0] == 200
    assert called == [1]
