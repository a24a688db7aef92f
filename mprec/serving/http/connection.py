"""One connection, as uvicorn handles it, and what uvicorn leaves out: bounds on how many there are, on how
long a client may take to send a request's head and to read an answer, and on the size of a head.

Plain queries do not go through the application (:mod:`mprec.serving.http.direct`).
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from mprec.serving.http.access_log import log_request
from mprec.serving.http.direct import Exchange, is_plain
from mprec.serving.http.messages import error_body
from mprec.serving.http.pace import Pace
from mprec.serving.http.score import ARRIVED, Scoring
from mprec.serving.http.service import Service
from mprec.serving.http.turns import Turns

__all__ = ["MAX_HEAD_BYTES", "connection_class"]

MAX_PIPELINED = 64  # requests behind one that is being answered
MAX_HEAD_BYTES = 64 << 10  # and as much of trailers and chunk headers; what comes in one read is not counted


class _Connection(HttpToolsProtocol):
    service: Service  # of the subclass, as the others here
    scoring: Scoring
    has_access_log: bool
    turns: Turns | None = None
    pace: Pace | None = None
    is_last = False  # the next answer is, on this connection

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._in_message = self._in_head = False
        self._running: RequestResponseCycle | Exchange | None = None  # the request that is being answered
        self._overhead = 0  # bytes of the message that are not its body
        self._timer: asyncio.TimerHandle | None = None  # for what the client must send
        self._write_timer: asyncio.TimerHandle | None = None  # for what it must read
        self._limits = self.service.limits
        self.service.connections = self.connections
        if type(self).turns is None:
            type(self).turns = Turns(self.loop, self._now)
            type(self).pace = Pace(self.loop, self._now)

    # -- of the transport

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._fail(503, "connections", "too many connections")
        else:
            self._start_timer(self._limits.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._has_read()
        self.pipeline.clear()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True  # uvicorn tells only the latest of pipelined requests
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_message:
            self._overhead += len(data)
        super().data_received(data)
        if self.parser is None or self.transport.is_closing():
            return
        if self._overhead > MAX_HEAD_BYTES:
            self._fail(431, "too large", f"the head may have at most {MAX_HEAD_BYTES} bytes")
        elif len(self.pipeline) > MAX_PIPELINED:  # uvicorn reads on while the application awaits the client
            self.transport.abort()
        elif self._timer is None and (self._in_head or self._is_idle()):
            self._start_timer(self._limits.head_s)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._must_read()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._has_read()

    # -- of the parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope[ARRIVED] = self.turns.arrival()
        self._in_message = self._in_head = True
        self._overhead = 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._stop_timer()
        if self.parser.should_upgrade() and self._announces_body():  # which the parser would leave out
            return self._fail(501, "unsupported", "Upgrade is not taken: send the request without it")
        if not self._is_direct():
            super().on_headers_complete()
            self.cycle.keep_alive &= not self.is_last
            return
        self.cycle = self._running = Exchange(
            self.scoring,
            self.turns,
            self.pace,
            self.headers,
            self.scope[ARRIVED],
            self.transport.write,
            self._on_exchange_end,
            self.server_state.default_headers,
        )
        self._running.keep_alive = not self.is_last
        self._start_timer(self._limits.body_s)

    def on_body(self, body: bytes) -> None:
        self._overhead -= len(body)
        if type(self.cycle) is Exchange:
            self.cycle.add(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_message = False
        self._overhead = 0
        if type(self.cycle) is Exchange:
            self._stop_timer()
            self.cycle.complete()
        else:
            super().on_message_complete()

    # -- of uvicorn

    def _start_asgi_task(self, cycle: RequestResponseCycle, app) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def send_400_response(self, msg: str) -> None:
        self._fail(400, "bad request", msg)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # once the answer is read, which may be never
            self._must_read()

    def timeout_keep_alive_handler(self) -> None:
        self.transport.abort()

    def _announces_body(self) -> bool:
        return any(
            name == b"transfer-encoding" or (name == b"content-length" and int(value) > 0)
            for name, value in self.headers
        )

    # -- queries that are answered here

    def _is_direct(self) -> bool:
        return (
            self.url == b"/score"
            and (self.cycle is None or self.cycle.response_complete)
            and not self.pipeline
            and not self.flow.write_paused
            and self.parser.get_method() == b"POST"
            and self.parser.get_http_version() == "1.1"
            and self.parser.should_keep_alive()
            and not self.parser.should_upgrade()
            and is_plain(self.headers, self._limits.max_body_bytes)
        )

    def _on_exchange_end(self, exchange: Exchange) -> None:
        if self.has_access_log:
            client = self.client and self.client[0]
            log_request(client, "POST", "/score", exchange.status, self.service.clock() - exchange.arrived)
        if not exchange.disconnected:
            if not exchange.keep_alive:
                self.transport.close()
            self.on_response_complete()

    # --

    @classmethod
    def _now(cls) -> float:
        return cls.service.clock()  # which is the engine's once there is one

    def _is_idle(self) -> bool:
        """Nothing is asked, and uvicorn's own timer does not run: it stops at any byte."""
        return self.timeout_keep_alive_task is None and (self.cycle is None or self.cycle.response_complete)

    def _fail(self, status: int, reason: str, message: str) -> None:
        """Close; with an answer, unless the application has begun one."""
        if self._running is None or self._running.response_complete or not self._running.response_started:
            body = error_body(reason, message)
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            self.transport.write(STATUS_LINE[status] + head % len(body) + body)
        self.transport.close()
        self._must_read()

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self._late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _must_read(self) -> None:
        self._has_read()
        self._write_timer = self.loop.call_later(self._limits.write_s, self.transport.abort)

    def _has_read(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _late(self) -> None:
        self._timer = None
        if self._in_head and not self.transport.is_closing():
            self._fail(408, "timeout", f"the request's head did not come within {self._limits.head_s:g} s")
        elif type(self._running) is Exchange and self._running.more_body:
            self._fail(408, "timeout", f"the body did not come within {self._limits.body_s:g} s")
        else:
            self.transport.abort()


def connection_class(service: Service, has_access_log: bool = False) -> type[HttpToolsProtocol]:
    """uvicorn's ``http=`` for a server of this service."""
    own = {"service": service, "scoring": Scoring(service), "has_access_log": has_access_log}
    return type("Connection", (_Connection,), own)
