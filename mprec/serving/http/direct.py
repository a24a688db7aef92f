"""A query that is answered straight from its connection, without the tasks and messages of ASGI, which cost
more than a small query does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from mprec.serving.http.messages import ClientLeftError, RequestError
from mprec.serving.http.pace import Pace
from mprec.serving.http.score import FOR_LOAD, Asked, Reply, Scoring, is_binary, refusal
from mprec.serving.http.turns import Turns

__all__ = ["Exchange", "is_plain"]


def is_plain(headers: Sequence[tuple[bytes, bytes]], max_body_bytes: int) -> bool:
    """Whether a request's body is of a known length within the bounds, and not encoded: others are left to
    the application, which says what is wrong with them."""
    length = None
    for name, value in headers:
        if name == b"content-length":
            length = int(value)
        elif name in (b"content-encoding", b"transfer-encoding", b"expect"):
            return False
    return length is not None and 0 < length <= max_body_bytes


class Exchange:
    """One query and its answer. It stands where uvicorn keeps the cycle of a request and a response, and has
    what uvicorn looks at there.

    ``write(bytes)`` sends; ``on_end(exchange)`` is called once all is sent, or the client has left.
    """

    def __init__(
        self,
        scoring: Scoring,
        turns: Turns,
        pace: Pace,
        headers: list[tuple[bytes, bytes]],
        arrived: float,
        write: Callable[[bytes], object],
        on_end: Callable[[Exchange], object],
        default_headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        self.keep_alive = True
        self.response_started = self.response_complete = self.disconnected = False
        self.more_body = True
        self.status = 0
        self.arrived = arrived
        self._scoring, self._turns, self._pace = scoring, turns, pace
        self._cost = 0.0  # seconds that the loop has spent on it
        self._headers, self._default_headers = headers, default_headers
        self._write, self._on_end = write, on_end
        self._parts: list[bytes] = []
        self._asked: Asked | None = None

    @property
    def message_event(self) -> Exchange:
        return self

    def set(self) -> None:
        """uvicorn's way to say that something has changed; here, that the client has left."""
        if self.disconnected and not self.response_complete:
            if self._asked is None:
                self._end()
            else:
                self._asked.future.cancel()

    def add(self, body: bytes) -> None:
        self._parts.append(body)

    def complete(self) -> None:
        """The body is whole."""
        self.more_body = False
        self._turns.begin(self._ask)

    def _ask(self) -> None:
        if self.response_complete:
            return
        start = self._scoring.clock()
        try:
            body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts = []
            self._asked = self._scoring.ask(body, is_binary(self._headers), self.arrived)
        except RequestError as error:
            self._refuse(error, start)
        else:
            self._cost = self._scoring.clock() - start
            self._turns.when_done(self._asked.future, self._answer)

    def _answer(self, _: Future) -> None:
        start = self._scoring.clock()
        try:
            reply = self._scoring.reply(self._asked)
        except RequestError as error:
            return self._refuse(error, start)
        except ClientLeftError:
            return self._end()
        self._send(reply)

    def _refuse(self, error: RequestError, start: float) -> None:
        """``start``: when the loop began to work on it."""
        told = refusal(error)
        if error.reason in FOR_LOAD:
            cost = self._cost + self._scoring.clock() - start
            self._pace.tell(lambda: self._send(told), self.arrived + self._scoring.sla_s, cost)
        else:
            self._send(told)

    def _send(self, reply: Reply) -> None:
        if self.disconnected:
            return self._end()
        status, body, content_type, headers = reply
        lines = [STATUS_LINE[status], b"content-type: ", content_type, b"\r\n"]
        for name, value in (*self._default_headers, *headers):
            lines += (name, b": ", value, b"\r\n")
        if not self.keep_alive:
            lines.append(b"connection: close\r\n")
        lines += (b"content-length: %d\r\n\r\n" % len(body), body)
        self.response_started, self.status = True, status
        self._write(b"".join(lines))
        self._scoring.sent(status, self._asked)
        self._end()

    def _end(self) -> None:
        if self.response_complete:
            return
        self.response_complete = True
        self._on_end(self)
