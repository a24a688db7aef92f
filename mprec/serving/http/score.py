"""``POST /score``: a query's body in, its scores out. What is common to both ways that lead here, through
ASGI (:class:`Score`) and, in our own server, straight from the connection (:mod:`mprec.serving.http.direct`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from http import HTTPStatus
from typing import NamedTuple

import numpy as np
import orjson

from mprec.serving.engine import Answer, QueryRefusedError
from mprec.serving.http import wire
from mprec.serving.http.messages import JSON, ClientLeftError, RequestError, error_body, read_body, reply
from mprec.serving.http.parse import parse_binary, parse_json
from mprec.serving.http.return_trip import ReturnTrip
from mprec.serving.http.service import Service
from mprec.serving.http.tracing import find_tracing
from mprec.serving.http.turns import Turns
from mprec.serving.rows import QueryTooLargeError

__all__ = ["ARRIVED", "FOR_LOAD", "REFUSALS", "Asked", "Reply", "Score", "Scoring", "is_binary", "refusal"]

ARRIVED = "mprec.arrived_s"  # in the scope: when the first byte came, on the service's clock
REFUSALS = {
    "full": HTTPStatus.TOO_MANY_REQUESTS,
    "overload": HTTPStatus.TOO_MANY_REQUESTS,
    "expired": HTTPStatus.GATEWAY_TIMEOUT,
    "closed": HTTPStatus.SERVICE_UNAVAILABLE,
}
_MOST_BACK = 0.75  # of the time that a query has, for its answer's way back
FOR_LOAD = ("full", "overload", "expired")
_BINARY = wire.CONTENT_TYPE.encode()
_PLAIN = {b"content-encoding": b"identity", b"transfer-encoding": b"chunked"}  # all else compresses
_RETRY = [(b"retry-after", b"1")]
_HEADERS = {429: _RETRY, 503: _RETRY, 408: [(b"connection", b"close")]}


class Reply(NamedTuple):
    status: int
    body: bytes
    content_type: bytes = JSON
    headers: Sequence[tuple[bytes, bytes]] = ()


class Asked(NamedTuple):
    """A query that the engine has."""

    future: Future[Answer]
    arrived: float
    due: float
    is_binary: bool
    submitted: float
    tells: bool  # of the server's health: it does not if it asks for less time than others have


class Scoring:
    """From a body to the engine, and from its answer to a reply. For one thread, the event loop's."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._return = ReturnTrip()
        self._tracing = find_tracing(lambda: service.clock())  # which is the engine's once there is one

    @property
    def clock(self) -> Callable[[], float]:
        return self._service.clock

    def ask(self, body: bytes, is_binary: bool, arrived: float) -> Asked:
        """Give the engine the query in a body. ``RequestError`` says why not."""
        service, engine = self._service, self._service.engine
        if engine is None:
            raise RequestError(503, "starting", service.detail)
        now = service.clock()
        back_s = min(self._return.expected_s(now), engine.sla_s * _MOST_BACK)
        if now + back_s - arrived >= engine.sla_s and (is_binary or b'"sla_ms"' not in body):
            raise RequestError(504, "expired", "the query waited for too long before it could be read")
        try:
            parse = parse_binary if is_binary else parse_json
            batch, sla_s = parse(body, service.inputs, service.limits)
            # Whoever waits has the answer when it has come back to them, not when the engine has it.
            sla_s = engine.sla_s if sla_s is None else sla_s
            left_s = sla_s - min(back_s, sla_s * _MOST_BACK)
            future = engine.submit(batch, left_s, arrived)
        except QueryTooLargeError as error:
            raise RequestError(413, "too large", str(error)) from None
        except ValueError as error:
            raise RequestError(400, "bad request", str(error)) from None
        tells = sla_s >= engine.sla_s
        if tells:
            service.pulse.asked(now)
        return Asked(future, arrived, arrived + sla_s, is_binary, service.clock(), tells)

    def reply(self, asked: Asked) -> Reply:
        """What to send, once the future is done. ``RequestError`` for a refusal or an error;
        ``ClientLeftError`` if the query was cancelled."""
        answered = False
        try:
            answer = asked.future.result()
            answered = True
        except QueryRefusedError as error:
            raise RequestError(REFUSALS.get(error.reason, 503), error.reason, str(error)) from None
        except CancelledError:
            raise ClientLeftError from None
        except Exception as error:  # the model's own: the server stays up
            raise RequestError(500, "failed", f"{type(error).__name__}: {error}") from None
        finally:
            if asked.tells:
                self._service.pulse.settled(answered)
        return _scores(answer, asked.is_binary)

    def sent(
        self, status: int, asked: Asked | None, arrived: float, headers: Sequence[tuple[bytes, bytes]]
    ) -> None:
        """Count a reply that was handed to the network, to a request that had these headers."""
        now, metrics = self._service.clock(), self._service.metrics
        metrics.reply(status)
        answer = asked.future.result() if status == 200 else None
        if answer is not None:
            self._return.observe(now, now - answer.finished_s, now > asked.due)
            metrics.answered(now, now - arrived)
        if self._tracing is not None:
            times = [("POST /score", arrived, now)]
            if asked is not None:
                times.append(("read", arrived, asked.submitted))
            if answer is not None:
                times.append(("score", asked.submitted, answer.finished_s))
                times.append(("reply", answer.finished_s, now))
            self._tracing.record(headers, status, times, answer and answer.paths)


def refusal(error: RequestError) -> Reply:
    """The reply that tells of an error."""
    return Reply(error.status, error_body(error.reason, str(error)), headers=_HEADERS.get(error.status, ()))


def _scores(answer: Answer, is_binary: bool) -> Reply:
    scores = np.ascontiguousarray(answer.scores.float().numpy())
    latency_ms = 1e3 * answer.latency_s
    if is_binary:
        headers = [
            (b"x-mprec-latency-ms", b"%.4f" % latency_ms),
            (b"x-mprec-paths", json.dumps(answer.paths).encode()),
        ]
        return Reply(200, wire.encode_scores(scores), _BINARY, headers)
    content = {"scores": scores, "paths": answer.paths, "latency_ms": latency_ms}
    return Reply(200, orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY))


def is_binary(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether the body is raw numbers. ``RequestError`` for one that is compressed, on its way too."""
    found = False
    for name, value in headers:
        if name == b"content-type":
            found = value.split(b";")[0].strip().lower() == _BINARY
        elif (plain := _PLAIN.get(name)) and value.strip().lower() != plain:
            told = f"{name.decode().title()} {value.decode('latin-1'):.40}"
            raise RequestError(
                415, "unsupported", f"{told} is not taken: send the body as it is", unread=True
            )
    return found


class Score:
    """The ASGI endpoint. A query's deadline counts from when its first byte was handed to Python by the event
    loop (by our own server; else from when its head was complete). What it waited before in the kernel's
    buffers, while the loop was at other requests, is not seen.
    """

    def __init__(self, service: Service) -> None:
        self._service, self._scoring = service, Scoring(service)
        self._turns: Turns | None = None

    async def __call__(self, scope, receive, send) -> None:
        limits = self._service.limits
        arrived = scope.get(ARRIVED) or self._service.clock()
        asked = unread = None
        try:
            binary = is_binary(scope["headers"])
            body = await read_body(scope, receive, limits.max_body_bytes, limits.body_s)
            asked = self._scoring.ask(body, binary, arrived)
            await self._wait(asked.future, receive)
            answer = self._scoring.reply(asked)
        except RequestError as error:
            answer, unread = refusal(error), (receive if error.unread else None)
        except ClientLeftError:
            return
        status, body, content_type, headers = answer
        await reply(send, status, body, headers, content_type=content_type, unread_from=unread)
        self._scoring.sent(status, asked, arrived, scope["headers"])

    async def _wait(self, future: Future, receive) -> None:
        """Until it is done; if the client leaves before, the query is cancelled."""
        if future.done():
            return
        loop = asyncio.get_running_loop()
        if self._turns is None:
            self._turns = Turns(loop, self._scoring.clock)
        waiter = loop.create_future()
        self._turns.when_done(future, lambda _: waiter.done() or waiter.set_result(None))
        gone = asyncio.ensure_future(_until_gone(receive))
        gone.add_done_callback(lambda _: future.cancel())
        try:
            await waiter
        finally:
            gone.cancel()


async def _until_gone(receive) -> None:
    with contextlib.suppress(Exception):
        while (await receive())["type"] != "http.disconnect":
            pass
