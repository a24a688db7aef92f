"""The client of ``benchmarks/serving_http.py``, in a process of its own: connections that each ask again when
they are answered.

Reads from standard input, and writes to standard output, one JSON object.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from collections import Counter
from pathlib import Path


class Connection:
    """Asks, and waits for the answer."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address
        self.open()

    def open(self) -> None:
        self.socket = socket.create_connection(self._address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self._received = b""
        self._left = b""

    def ask(self, request: bytes) -> None:
        self.asked = time.perf_counter()
        self._received, self._left = b"", request
        self.send()

    def send(self) -> None:
        while self._left:
            try:
                self._left = self._left[self.socket.send(self._left) :]
            except BlockingIOError:
                return
            except ConnectionError:  # which receive() tells
                self._left = b""

    @property
    def wants_to_send(self) -> bool:
        return bool(self._left)

    def receive(self) -> int | None:
        """The status of an answer that is whole; 0 if the server has closed instead."""
        try:
            part = self.socket.recv(1 << 18)
        except ConnectionError:
            part = b""
        if not part:
            return 0
        self._received += part
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found:
            return None
        lower = head.lower()
        start = lower.index(b"content-length:") + 15
        length = int(lower[start:].split(b"\r\n", 1)[0])
        return int(head[9:12]) if len(body) >= length else None


def requests_of(bodies: list[bytes], content_type: str) -> list[bytes]:
    head = "POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: {}\r\nContent-Length: {}\r\n\r\n"
    return [head.format(content_type, len(body)).encode() + body for body in bodies]


def run(address: tuple[str, int], requests: list[bytes], connections: int, seconds: float, warm: float):
    """(seconds from asking to the whole answer of every 200, how many had which other status, 0 for
    connections closed without an answer, seconds of the run)."""
    selector = selectors.EpollSelector()
    for _ in range(connections):
        connection = Connection(address)
        selector.register(connection.socket, selectors.EVENT_READ, connection)
    asked = 0
    latencies: list[float] = []
    others: Counter[int] = Counter()
    begin = time.perf_counter() + warm
    end = begin + seconds
    for key in list(selector.get_map().values()):
        key.data.ask(requests[asked % len(requests)])
        asked += 1
    while (now := time.perf_counter()) < end:
        for key, events in selector.select(0.1):
            connection: Connection = key.data
            if events & selectors.EVENT_WRITE:
                connection.send()
            if events & selectors.EVENT_READ and (status := connection.receive()) is not None:
                now = time.perf_counter()
                if begin <= now < end:
                    if status == 200:
                        latencies.append(now - connection.asked)
                    else:
                        others[status] += 1
                if not status:
                    selector.unregister(connection.socket)
                    connection.socket.close()
                    connection.open()
                    key = selector.register(connection.socket, selectors.EVENT_READ, connection)
                connection.ask(requests[asked % len(requests)])
                asked += 1
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.wants_to_send else 0)
            if wanted != key.events:
                selector.modify(connection.socket, wanted, connection)
    for key in list(selector.get_map().values()):
        key.data.socket.close()
    return latencies, others, now - begin


def main() -> None:
    about = json.load(sys.stdin)
    bodies = [Path(file).read_bytes() for file in about["bodies"]]
    before = time.process_time()
    latencies, others, seconds = run(
        tuple(about["address"]),
        requests_of(bodies, about["content_type"]),
        about["connections"],
        about["seconds"],
        about["warm"],
    )
    cpu = time.process_time() - before
    json.dump({"latencies": latencies, "others": others, "seconds": seconds, "cpu": cpu}, sys.stdout)


if __name__ == "__main__":
    main()
