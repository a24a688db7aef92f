"""The ASGI application: what is at which address."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from importlib import resources
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from mprec.serving.http.access_log import AccessLog
from mprec.serving.http.openapi import describe
from mprec.serving.http.score import Score
from mprec.serving.http.service import ReloadError, Service

__all__ = ["create_app"]

_DETAILS = {
    "draining": "the server is about to stop",
    "silent": "queries come, and none has been answered for some seconds",
}
_PAGE_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'"
# Whoever comes through a proxy is not on this machine though the proxy may be; pages in a browser have an
# origin.
_FOREIGN = ("forwarded", "x-forwarded-for", "x-real-ip", "via", "origin")


def create_app(service: Service, *, access_log: bool = False) -> Any:
    """The ASGI application; with ``access_log``, a line of JSON for each request to the logger
    ``mprec.access``."""

    async def page(_: Request) -> Response:
        text = resources.files("mprec.serving.http").joinpath("page.html").read_text("utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _PAGE_POLICY})

    async def alive(_: Request) -> Response:
        return _json({"status": "alive"})

    async def ready(_: Request) -> Response:
        status = service.status()
        if status == "ready":
            return _json({"status": status})
        return _json({"status": status, "detail": _DETAILS.get(status, service.detail)}, 503)

    async def health(_: Request) -> Response:
        status = service.status()
        return _json(
            {"status": "serving" if status == "ready" else status}, 200 if status == "ready" else 503
        )

    async def stats(_: Request) -> Response:
        return _json(service.statistics())

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(_: Request) -> Response:
        return _json(describe(service.inputs, service.limits))

    async def reload(request: Request) -> Response:
        if (refusal := _may_reload(request, service.reload_token)) is not None:
            return _error(403, "forbidden", refusal)
        try:
            paths = await asyncio.to_thread(service.reload)
        except ReloadError as error:
            return _error(409 if error.is_busy else 500, "reload", str(error))
        return _json({"status": "reloaded", "paths": paths})

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/score", Score(service), methods=["POST"]),
            Route("/healthz", alive),
            Route("/readyz", ready),
            Route("/health", health),
            Route("/stats", stats),
            Route("/metrics", metrics),
            Route("/openapi.json", openapi),
            Route("/reload", reload, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _http_error, Exception: _own_error},
    )
    app.router.redirect_slashes = False
    return AccessLog(app, service.clock) if access_log else app


def _json(content: dict, status: int = 200) -> Response:
    return Response(orjson.dumps(content), status, media_type="application/json")


def _error(status: int, reason: str, message: str, headers: Any = None) -> Response:
    content = orjson.dumps({"error": message, "reason": reason})
    return Response(content, status, headers, media_type="application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    path = request.url.path
    if error.status_code == 404:
        return _error(404, "not found", f"there is no {path:.80}; see /openapi.json")
    if error.status_code == 405:
        return _error(405, "method", f"{path} does not take {request.method}", error.headers)
    return _error(error.status_code, "bad request", str(error.detail), error.headers)


async def _own_error(_: Request, error: Exception) -> Response:
    return _error(500, "failed", f"{type(error).__name__}: {error}")


def _may_reload(request: Request, token: str | None) -> str | None:
    """Why not, or None."""
    if token is not None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), token.encode()):
            return "expected the header Authorization: Bearer with the server's token"
    foreign = next((name for name in _FOREIGN if name in request.headers), None)
    if foreign is not None or not _is_loopback(request.client.host if request.client else ""):
        return "models are reloaded only by a client on the server's own machine, without a proxy"
    return None


def _is_loopback(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
