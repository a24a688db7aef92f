"""Many clients at once, and clients that misbehave in numbers, against ``mprec serve`` in its own process."""

import asyncio
import json
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from small_checkpoints import save
from test_cli_serving import ask, serve_process, wait_until_ready

pytestmark = pytest.mark.slow

BODY = json.dumps({"ids": [[3, 4]] * 8, "dense": [[0.5, 1.5]] * 8}).encode()
QUERY = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def server(tmp_path):
    """(process, address), with a target that is met; what it says must hold no traceback."""
    arguments = ["--checkpoints", save(tmp_path, "table"), "--threads", 1, "--profile-seconds", 0.2]
    with serve_process(*arguments) as (process, said):
        wait_until_ready(said["url"])
        host, port = said["url"].removeprefix("http://").split(":")
        yield process, (host, int(port))
        if process.poll() is None:
            assert ask(f"{said['url']}/score", json.loads(BODY))[0] == 200
            process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        counts = json.loads(out)
        ended = sum(counts["refused"].values()) + sum(counts[k] for k in ("answered", "failed", "cancelled"))
        assert ended == counts["queries"]
        assert "Traceback" not in errors
        assert "Error" not in errors


async def status_of(reader):
    """The status of the next answer, which is read whole; None if the server has closed."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    lower = head.lower()
    length = int(lower[lower.index(b"content-length:") + 15 :].split(b"\r\n", 1)[0])
    await reader.readexactly(length)
    return int(head[9:12])


def statistics(address):
    return ask(f"http://{address[0]}:{address[1]}/stats")[1]


def resident(process):
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * 4096


def test_a_thousand_connections_at_once(server):
    async def client(address):
        reader, writer = await asyncio.open_connection(*address)
        found = []
        for _ in range(3):
            writer.write(QUERY)
            found.append(await status_of(reader))
        writer.close()
        return found

    async def main():
        return await asyncio.gather(*(client(server[1]) for _ in range(1000)))

    found = Counter(status for statuses in asyncio.run(main()) for status in statuses)
    assert found == {200: 3000}


def test_two_hundred_slow_sockets_and_others_who_are_served(server):
    """Some send nothing, some a head without end, some a byte of a body now and then."""

    async def slow(address, kind):
        reader, writer = await asyncio.open_connection(*address)
        writer.write((b"", QUERY[:30], QUERY[:-20])[kind])
        with_last = asyncio.create_task(status_of(reader))
        for byte in QUERY[-20:-1]:
            await asyncio.sleep(0.1)
            if kind == 2:
                writer.write(bytes([byte]))
        writer.write(QUERY[-1:] if kind == 2 else b"")
        found = await with_last if kind == 2 else None
        writer.close()
        with_last.cancel()
        return found

    async def main():
        slows = [asyncio.create_task(slow(server[1], number % 3)) for number in range(200)]
        reader, writer = await asyncio.open_connection(*server[1])
        served = 0
        while not all(task.done() for task in slows):
            writer.write(QUERY)
            assert await status_of(reader) == 200
            served += 1
        writer.close()
        return served, Counter([await task for task in slows])

    served, found = asyncio.run(main())
    assert served > 20
    assert found == {None: 134, 200: 66}  # the dripping ones have their answers


def test_clients_that_leave_cost_nothing_and_memory_is_flat(server):
    """Thousands that leave in the midst of a head, of a body, or with their query under way."""
    process, address = server

    def storm(count):
        for number in range(count):
            with socket.create_connection(address) as connection:
                connection.sendall((QUERY[:20], QUERY[:-5], QUERY, QUERY * 3)[number % 4])
                if number % 8 < 4:  # by a reset
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    storm(1000)
    before = resident(process)
    storm(6000)
    deadline = time.monotonic() + 60
    while statistics(address)["connections"] > 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert resident(process) - before < 8 << 20
    assert statistics(address)["waiting_queries"] == 0


def test_clients_that_ask_again_while_the_server_stops_lose_nothing(server):
    """Each asks on one connection until it is told that it was the last, connects again, and goes on until
    there is nobody to connect to. Every query that was sent on a connection has its answer."""
    process, address = server
    found, lost = Counter(), []

    async def client():
        while True:
            try:
                reader, writer = await asyncio.open_connection(*address)
            except ConnectionRefusedError:
                return
            asked = 0
            while True:
                try:
                    writer.write(QUERY)
                    head = await reader.readuntil(b"\r\n\r\n")
                    lower = head.lower()
                    length = int(lower[lower.index(b"content-length:") + 15 :].split(b"\r\n", 1)[0])
                    await reader.readexactly(length)
                except (asyncio.IncompleteReadError, ConnectionError) as error:
                    lost.append((asked, repr(error)))
                    break
                asked += 1
                found[int(head[9:12])] += 1
                if b"connection: close" in lower:
                    break
            writer.close()

    async def main():
        clients = [asyncio.create_task(client()) for _ in range(40)]
        await asyncio.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        await asyncio.gather(*clients)

    thread = threading.Thread(target=process.wait)
    thread.start()
    asyncio.run(main())
    thread.join(60)
    assert set(found) == {200}
    assert found[200] > 100
    # A connection that the kernel has made while the server closes its listening socket is reset by the
    # kernel: no query of it was read. On no other is anything lost.
    assert [entry for entry in lost if entry[0]] == []
