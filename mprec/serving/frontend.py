"""A small HTTP front-end to an engine: JSON in, JSON out, one machine, loopback unless told otherwise.

``POST /score``
    ``{"dense": [[...], ...], "ids": [[...], ...], "sla_ms": 10}``: a row per sample. ``ids`` has one entry
    per feature, an ID or a bag (list) of them; ``dense`` may be left out by models without dense numbers,
    ``sla_ms`` always. Answers ``{"scores": [...], "paths": {...}, "latency_ms": ...}``.
``GET /health``
    ``{"status": "serving"}``, or 503 while draining.
``GET /stats``
    The engine's counts.

400 is the query's own fault, 413 a body too large, 429 a refusal for load (``full``, ``overload``), 503
one because the engine closes, 504 one whose deadline passed; each with ``{"error": ..., "reason": ...}``.
For a fleet, put it behind a real server; the point here is that the dispatcher sits next to the kernels.
"""

from __future__ import annotations

import contextlib
import socket
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import orjson

from mprec.data import Batch
from mprec.serving.engine import Engine, QueryRefusedError
from mprec.serving.rows import rows_to_batch

__all__ = ["FrontEnd", "parse_query"]

MAX_BODY_BYTES = 16 << 20
MAX_SLA_MS = 3_600_000
_STATUS = {
    "full": HTTPStatus.TOO_MANY_REQUESTS,
    "overload": HTTPStatus.TOO_MANY_REQUESTS,
    "expired": HTTPStatus.GATEWAY_TIMEOUT,
    "closed": HTTPStatus.SERVICE_UNAVAILABLE,
}


class FrontEnd(ThreadingHTTPServer):
    """Serves ``engine``, a model of ``vocabularies`` (the IDs of feature t are below ``vocabularies[t]``) and
    ``num_dense`` numbers. ``serve_forever()`` runs it, ``drain()`` from another thread ends it.
    """

    daemon_threads = False  # server_close() waits for the answers under way
    request_queue_size = 128

    def __init__(
        self,
        engine: Engine,
        vocabularies: list[int],
        num_dense: int,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        self.engine, self.vocabularies, self.num_dense = engine, list(vocabularies), num_dense
        self.draining = False
        self._connections: set[socket.socket] = set()
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def drain(self) -> None:
        """Stop taking connections, answer what was asked, stop the engine. Not from a request's thread."""
        self.draining = True
        self.shutdown()
        self.engine.close()
        for connection in list(self._connections):  # idle ones wait for a next query that will not come
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)
        self.server_close()

    def process_request(self, request, client_address) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)


class _Handler(BaseHTTPRequestHandler):
    server: FrontEnd
    protocol_version = "HTTP/1.1"
    timeout = 30  # a client that stalls gives up its thread
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path == "/health":
            if self.server.draining:
                self._reply(HTTPStatus.SERVICE_UNAVAILABLE, {"status": "draining"})
            else:
                self._reply(HTTPStatus.OK, {"status": "serving"})
        elif self.path == "/stats":
            self._reply(HTTPStatus.OK, self.server.engine.statistics())
        else:
            self._fail(HTTPStatus.NOT_FOUND, f"there is no {self.path}; try /score, /health, /stats")

    def do_POST(self) -> None:
        if self.path != "/score":
            self._fail(HTTPStatus.NOT_FOUND, f"there is no {self.path}; try /score")
            return
        try:
            length = int(self.headers.get("Content-Length", ""))
            if length < 0:
                raise ValueError
        except ValueError:
            self._fail(HTTPStatus.LENGTH_REQUIRED, "Content-Length is needed")
            return
        if length > MAX_BODY_BYTES:
            self._fail(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body may have {MAX_BODY_BYTES} bytes")
            return
        arrived = self.server.engine.clock()
        body = self.rfile.read(length)
        try:
            batch, sla_s = parse_query(body, self.server.vocabularies, self.server.num_dense)
            answer = self.server.engine.submit(batch, sla_s, arrived).result()
        except QueryRefusedError as error:
            self._fail(_STATUS[error.reason], str(error), reason=error.reason)
        except ValueError as error:
            self._fail(HTTPStatus.BAD_REQUEST, str(error))
        except Exception as error:  # the model's own: the server stays up
            self._fail(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")
        else:
            self._reply(
                HTTPStatus.OK,
                {
                    "scores": answer.scores.tolist(),
                    "paths": answer.paths,
                    "latency_ms": 1e3 * answer.latency_s,
                },
            )

    def _fail(self, status: HTTPStatus, message: str, reason: str = "bad request") -> None:
        self.close_connection = True  # what is left of the body was not read
        self._reply(status, {"error": message, "reason": reason})

    def _reply(self, status: HTTPStatus, content: dict[str, Any]) -> None:
        body = orjson.dumps(content)
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if self.close_connection or self.server.draining:
                self.send_header("Connection", "close")
                self.close_connection = True
            self.end_headers()
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True  # the client left

    def log_message(self, *_: object) -> None:
        """Silent: a line per query is for a proxy to write."""


def parse_query(body: bytes, vocabularies: list[int], num_dense: int) -> tuple[Batch, float | None]:
    """(batch, SLA in seconds or None). ``ValueError`` says what is wrong and where."""
    try:
        query = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"the body is not JSON: {error}") from error
    if not isinstance(query, dict) or not isinstance(query.get("ids"), list) or not query["ids"]:
        raise ValueError(
            'the body must be {"ids": [[...], ...], "dense": [[...], ...]} with at least one row'
        )
    if unknown := sorted(set(query) - {"ids", "dense", "sla_ms"}):
        raise ValueError(f"unknown key {unknown[0]!r}: known are ids, dense, sla_ms")
    sla_ms = query.get("sla_ms")
    if sla_ms is not None and not (_is_number(sla_ms) and 0 < sla_ms <= MAX_SLA_MS):
        raise ValueError(f"sla_ms must be a number above 0 and at most {MAX_SLA_MS}")
    batch = rows_to_batch(query["ids"], query.get("dense"), vocabularies, num_dense)
    return batch, None if sla_ms is None else sla_ms / 1e3


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
