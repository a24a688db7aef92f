"""A line of JSON for each request."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable

import orjson

from mprec.serving.http.score import ARRIVED

__all__ = ["AccessLog", "JsonFormatter", "log_request"]

_logger = logging.getLogger("mprec.access")


class AccessLog:
    """ASGI middleware: tells the logger ``mprec.access`` of each request, as a dict. ``status`` 0 is a client
    that left before it had an answer."""

    def __init__(self, app, clock: Callable[[], float]) -> None:
        self._app, self._clock = app, clock

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, status = scope.get(ARRIVED) or self._clock(), 0

        async def noting(message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            client = scope.get("client")
            seconds = self._clock() - start
            log_request(client and client[0], scope["method"], scope["path"], status, seconds)


def log_request(client: str | None, method: str, path: str, status: int, seconds: float) -> None:
    """Tell the logger of a request."""
    ms = round(1e3 * seconds, 3)
    _logger.info({"client": client, "method": method, "path": path, "status": status, "ms": ms})


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``logger``, and ``message`` or the dict logged."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        content = {"time": time.isoformat(), "level": record.levelname.lower(), "logger": record.name}
        content |= record.msg if isinstance(record.msg, dict) else {"message": record.getMessage()}
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(content, default=str).decode()
