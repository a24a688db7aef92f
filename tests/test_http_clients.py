"""Slow, silent, leaving and malformed clients harm no other."""

import http.client
import json
import socket
import threading
import time

import pytest
import torch
from http_serving import GOOD, read_all, score, serving, wait_until

from mprec.serving.http.connection import MAX_HEAD_BYTES

BODY = json.dumps(GOOD).encode()
QUERY = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
QUICK = {"head_s": 0.3, "body_s": 0.3, "idle_s": 1}


def head(*lines):
    return b"\r\n".join((b"POST /score HTTP/1.1", b"Host: x", *lines)) + b"\r\n\r\n"


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.mark.parametrize(
    "sent",
    [
        head(b"Content-Length: +33") + BODY,
        head(b"Content-Length: 1_0") + BODY,
        head(b"Content-Length: -1"),
        head(b"Content-Length: 5", b"Content-Length: 6") + BODY,
        head(b"Content-Length: 5", b"Content-Length: 5") + BODY,
        head(b"Content-Length: 5", b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
        head(b"Transfer-Encoding: chunked") + b"zz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),  # a TLS hello
        b"hello\r\n\r\n",
    ],
)
def test_malformed_requests_are_refused_and_end_the_connection(server, sent):
    reply = server.exchange(sent)
    assert reply.startswith(b"HTTP/1.1 400 ")
    assert reply.count(b"HTTP/1.1") == 1  # nothing behind it is taken for a request
    assert json.loads(reply.partition(b"\r\n\r\n")[2])["reason"] == "bad request"
    assert server.ask(GOOD)[0] == 200


def test_the_body_of_a_get_is_not_the_next_request(server):
    smuggled = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
    sent = b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(smuggled) + smuggled
    reply = server.exchange(sent + b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert reply.count(b"HTTP/1.1 200") == 2
    assert b"smuggled" not in reply


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beside_an_upgrade_is_refused_and_not_read_as_empty(server, protocol, chunked):
    length = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(BODY)
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY) if chunked else BODY
    sent = head(b"Connection: Upgrade", b"Upgrade: " + protocol, length) + body
    reply = server.exchange(sent + b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n")
    assert reply.startswith(b"HTTP/1.1 501 ")
    assert b"Upgrade is not taken" in reply
    assert reply.count(b"HTTP/1.1") == 1
    without = (
        b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: %b\r\n\r\n" % protocol
    )
    assert server.exchange(without).startswith(b"HTTP/1.1 200 ")


def test_pipelined_and_chunked_queries(server):
    chunked = (
        head(b"Transfer-Encoding: chunked") + b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    )
    reply = server.exchange(QUERY + chunked + QUERY.replace(b"Host: x", b"Host: x\r\nConnection: close"))
    assert reply.count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_told_so_though_it_is_sent_whole(declared):
    large = b"x" * 300_000
    with serving(limits={"max_body_bytes": 100_000}) as server:
        if declared:
            sent = head(b"Content-Length: %d" % len(large)) + large
        else:
            sent = head(b"Transfer-Encoding: chunked") + b"%x\r\n" % len(large) + large + b"\r\n0\r\n\r\n"
        reply = server.exchange(sent)
        assert reply.startswith(b"HTTP/1.1 413 ")
        assert reply.endswith(b'"reason":"too large"}')
        early = server.exchange(head(b"Content-Length: 99999999999", b"Expect: 100-continue"), timeout=20)
        assert early.startswith(b"HTTP/1.1 413 ")
        assert b" 100 " not in early
        assert server.ask(GOOD)[0] == 200


def test_heads_are_bounded(server):
    line = b"X-A: " + b"a" * 1000 + b"\r\n"
    with server.raw(b"GET / HTTP/1.1\r\n") as connection:
        try:
            for _ in range(100 * MAX_HEAD_BYTES // len(line)):
                connection.sendall(line)
        except (BrokenPipeError, ConnectionResetError):
            pass
        else:
            pytest.fail("a head without end was read")
    with server.raw(b"GET /" + b"a" * 70_000) as connection:
        time.sleep(0.05)
        connection.sendall(b"a" * 70_000)
        assert read_all(connection).startswith(b"HTTP/1.1 431 ")
    assert server.ask(GOOD)[0] == 200


def drip(connection, data, seconds=8.0):
    """Send a byte now and then until the other side closes; seconds that took."""
    start = time.monotonic()
    connection.settimeout(0.05)
    for byte in data:
        try:
            connection.sendall(bytes([byte]))
            if connection.recv(1000) == b"":
                break
        except TimeoutError:
            pass
        except OSError:
            break
        if time.monotonic() - start > seconds:
            pytest.fail("a dripping client was never closed")
    return time.monotonic() - start


@pytest.mark.parametrize(
    ("first", "rest"),
    [
        (b"", b"POST /score HTTP/1.1\r\nX: " + b"a" * 1000),
        (head(b"Content-Length: 1000"), b" " * 1000),
        (head(b"Transfer-Encoding: chunked"), b"1\r\na\r\n" * 1000),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", b"\r\n" * 500),
    ],
    ids=["head", "body", "chunks", "blank lines between requests"],
)
def test_dripping_clients_are_closed_while_others_are_served(first, rest):
    with serving(limits=QUICK) as server:
        with server.raw(first) as connection:
            thread = threading.Thread(target=drip, args=(connection, rest))
            thread.start()
            while thread.is_alive():
                assert server.ask(GOOD)[0] == 200
            thread.join()
        wait_until(lambda: not server.service.connections)


def test_a_body_that_does_not_come_is_408():
    with serving(limits=QUICK) as server:
        reply = server.exchange(head(b"Content-Length: 100") + b"{")
        assert reply.startswith(b"HTTP/1.1 408 ")
        reply = server.exchange(b"POST /score HT")
        assert reply.startswith(b"HTTP/1.1 408 ")
        assert server.exchange(b"") == b""  # it asked for nothing


def test_silent_sockets_take_nothing_from_others():
    with serving(limits={**QUICK, "head_s": 2}) as server:
        silent = [server.raw() for _ in range(200)]
        wait_until(lambda: len(server.service.connections) == 200)
        for _ in range(20):
            assert server.ask(GOOD)[0] == 200
        wait_until(lambda: not server.service.connections)
        for connection in silent:
            assert connection.recv(1) == b""
            connection.close()


def test_many_connections_at_once():
    with serving() as server:
        connections = [server.raw(QUERY) for _ in range(400)]
        for connection in connections:
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert response.status == 200
            assert json.loads(response.read())["scores"] == [3.5]
            connection.close()
        assert server.engine.statistics()["answered"] == 400


def test_connections_are_bounded():
    with serving(limits={"max_connections": 3}) as server:
        held = [server.connect() for _ in range(3)]
        for connection in held:
            assert server.ask(GOOD, connection=connection)[0] == 200
        reply = server.exchange(b"")
        assert reply.startswith(b"HTTP/1.1 503 ")
        assert b'"reason":"connections"' in reply
        held.pop().close()
        wait_until(lambda: len(server.service.connections) == 2)
        assert server.ask(GOOD)[0] == 200
        for connection in held:
            connection.close()


def test_connections_stay_below_the_limit_of_open_files(monkeypatch):
    """At that limit a connection can neither be taken nor refused, and the loop would turn in vain."""

    def no_more(*_):
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr("resource.getrlimit", lambda _: (140, 140))
    monkeypatch.setattr("resource.setrlimit", no_more)
    with serving() as server:
        held = [server.raw() for _ in range(12)]  # 128 files are for all else
        wait_until(lambda: len(server.service.connections) == 12)
        assert server.exchange(b"").startswith(b"HTTP/1.1 503 ")
        held.pop().close()
        wait_until(lambda: len(server.service.connections) == 11)
        assert server.ask(GOOD)[0] == 200
        for connection in held:
            connection.close()


def test_clients_that_leave_take_their_queries_along(caplog):
    begun, go_on = threading.Event(), threading.Event()
    sizes = []

    def model(batch):
        sizes.append(len(batch))
        begun.set()
        assert go_on.wait(20)
        return score(batch)

    with serving(model) as server:
        first = server.raw(QUERY)
        assert begun.wait(20)
        leaving = [server.raw(QUERY) for _ in range(50)]
        wait_until(lambda: server.engine.statistics()["queries"] == 51)
        for number, connection in enumerate(leaving):
            if number % 2:  # resets the connection
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.close()
        wait_until(lambda: len(server.service.connections) == 1)
        go_on.set()
        response = http.client.HTTPResponse(first)
        response.begin()
        assert response.status == 200
        first.close()
        assert server.ask(GOOD)[0] == 200
        counts = server.engine.statistics()
        assert (counts["cancelled"], counts["answered"]) == (50, 2)
        assert sum(sizes) == 2  # none of theirs was scored
        assert server.service.pulse.under_way == 0
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []


def test_a_client_that_does_not_read_is_closed(caplog):
    def long_numbers(batch):
        return torch.rand(len(batch))

    with serving(long_numbers, limits={"write_s": 0.3, "idle_s": 1}) as server:
        size = 4000  # 40 KB an answer
        body = json.dumps({"dense": [[0.5]] * size, "ids": [[1, 2]] * size}).encode()
        query = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(20)
            connection.connect(server.address)
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                connection.sendall(query * 200)
        wait_until(lambda: not server.service.connections)
        assert server.ask(GOOD)[0] == 200
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_one_answer_that_is_not_read_is_given_up():
    """Fewer queries than may be pipelined: only the time to read is left to close the connection."""

    def long_numbers(batch):
        return torch.rand(len(batch))

    with serving(long_numbers, limits={"write_s": 0.3, "idle_s": 60}) as server:
        size = 8000  # 80 KB an answer
        body = json.dumps({"dense": [[0.5]] * size, "ids": [[1, 2]] * size}).encode()
        query = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(20)
            connection.connect(server.address)
            for _ in range(60):  # 5 MB of answers, more than the kernel keeps
                connection.sendall(query)
            wait_until(lambda: not server.service.connections)
            assert server.service.pulse.under_way == 0


def test_draining_answers_what_was_asked_and_ends_idle_connections():
    begun, go_on = threading.Event(), threading.Event()

    def model(batch):
        begun.set()
        assert go_on.wait(20)
        return score(batch)

    answers = []
    with serving(model) as server:
        idle = server.connect()
        assert server.ask(path="/healthz", connection=idle)[0] == 200
        threads = [threading.Thread(target=lambda: answers.append(server.ask(GOOD))) for _ in range(3)]
        for t in threads:
            t.start()
        assert begun.wait(20)
        wait_until(lambda: server.engine.statistics()["queries"] == 3)
        server.stop()
        wait_until(lambda: server.service.status() == "draining")
        assert idle.sock.recv(1) == b""
        idle.close()
        with pytest.raises(OSError):
            socket.create_connection(server.address, timeout=1).close()
        go_on.set()
        for t in threads:
            t.join(20)
        assert [status for status, _ in answers] == [200] * 3
