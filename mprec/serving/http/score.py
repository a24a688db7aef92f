"""``POST /score``: a query's body in, its scores out."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from concurrent.futures import CancelledError, Future
from http import HTTPStatus

import numpy as np
import orjson

from mprec.serving.engine import Answer, QueryRefusedError
from mprec.serving.http import wire
from mprec.serving.http.bridge import Bridge
from mprec.serving.http.messages import ClientLeftError, RequestError, error_body, read_body, reply
from mprec.serving.http.parse import parse_binary, parse_json
from mprec.serving.http.service import Service
from mprec.serving.rows import QueryTooLargeError

__all__ = ["ARRIVED", "REFUSALS", "Score"]

ARRIVED = "mprec.arrived_s"  # in the scope: when the first byte came, on the service's clock
REFUSALS = {
    "full": HTTPStatus.TOO_MANY_REQUESTS,
    "overload": HTTPStatus.TOO_MANY_REQUESTS,
    "expired": HTTPStatus.GATEWAY_TIMEOUT,
    "closed": HTTPStatus.SERVICE_UNAVAILABLE,
}
_BINARY = wire.CONTENT_TYPE.encode()
_RETRY = [(b"retry-after", b"1")]
_HEADERS = {429: _RETRY, 503: _RETRY, 408: [(b"connection", b"close")]}


class Score:
    """The ASGI endpoint. A query's deadline counts from when its first byte was handed to Python by the event
    loop (by our own server; else from when its head was complete). What it waited before in the kernel's
    buffers, while the loop was at other requests, is not seen.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._bridge: Bridge | None = None

    async def __call__(self, scope, receive, send) -> None:
        service = self._service
        arrived = scope.get(ARRIVED) or service.clock()
        try:
            is_binary = _check_headers(scope["headers"])
            body = await read_body(scope, receive, service.limits.max_body_bytes, service.limits.body_s)
            answer = await self._answer(body, is_binary, arrived, receive)
        except RequestError as error:
            service.metrics.reply(error.status)
            headers = _HEADERS.get(error.status, ())
            unread = receive if error.unread else None
            await reply(send, error.status, error_body(error.reason, str(error)), headers, unread_from=unread)
        except ClientLeftError:
            return
        else:
            service.metrics.reply(200)
            await _reply_scores(send, answer, is_binary)
            now = service.clock()
            service.metrics.answered(now, now - arrived)

    async def _answer(self, body: bytes, is_binary: bool, arrived: float, receive) -> Answer:
        service, engine = self._service, self._service.engine
        if engine is None:
            raise RequestError(503, "starting", service.detail)
        try:
            parse = parse_binary if is_binary else parse_json
            batch, sla_s = parse(body, service.inputs, service.limits)
            future = engine.submit(batch, sla_s, arrived)
        except QueryTooLargeError as error:
            raise RequestError(413, "too large", str(error)) from None
        except ValueError as error:
            raise RequestError(400, "bad request", str(error)) from None
        # A query that asks for less time than others have tells nothing of the server's health.
        tells = (math.inf if sla_s is None else sla_s) >= engine.sla_s
        answered = False
        if tells:
            service.pulse.asked(service.clock())
        try:
            answer = await self._result(future, receive)
            answered = True
            return answer
        except QueryRefusedError as error:
            raise RequestError(REFUSALS.get(error.reason, 503), error.reason, str(error)) from None
        except CancelledError:
            raise ClientLeftError from None
        except Exception as error:  # the model's own: the server stays up
            raise RequestError(500, "failed", f"{type(error).__name__}: {error}") from None
        finally:
            if tells:
                service.pulse.settled(answered)

    async def _result(self, future: Future, receive) -> Answer:
        """The future's result; if the client leaves before, the query is cancelled."""
        if not future.done():
            if self._bridge is None:
                self._bridge = Bridge(asyncio.get_running_loop())
            gone = asyncio.ensure_future(_until_gone(receive))
            gone.add_done_callback(lambda _: future.cancel())
            try:
                await self._bridge.wait_for(future)
            finally:
                gone.cancel()
        return future.result()


async def _until_gone(receive) -> None:
    with contextlib.suppress(Exception):
        while (await receive())["type"] != "http.disconnect":
            pass


def _check_headers(headers: list[tuple[bytes, bytes]]) -> bool:
    """Whether the body is binary. ``RequestError`` for one that is compressed."""
    is_binary = False
    for name, value in headers:
        if name == b"content-type":
            is_binary = value.split(b";")[0].strip().lower() == _BINARY
        elif name == b"content-encoding" and value.strip().lower() != b"identity":
            raise RequestError(
                415,
                "unsupported",
                f"Content-Encoding {value.decode('latin-1'):.40} is not taken: send the body as it is",
                unread=True,
            )
    return is_binary


async def _reply_scores(send, answer: Answer, is_binary: bool) -> None:
    scores = np.ascontiguousarray(answer.scores.float().numpy())
    latency_ms = 1e3 * answer.latency_s
    if is_binary:
        headers = [
            (b"x-mprec-latency-ms", b"%.4f" % latency_ms),
            (b"x-mprec-paths", json.dumps(answer.paths).encode()),
        ]
        await reply(send, 200, wire.encode_scores(scores), headers, content_type=_BINARY)
    else:
        content = {"scores": scores, "paths": answer.paths, "latency_ms": latency_ms}
        await reply(send, 200, orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY))
