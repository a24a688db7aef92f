"""Requests read and replies written as ASGI messages, with bounds on bytes and time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import orjson

__all__ = ["ClientLeftError", "RequestError", "error_body", "read_body", "reply"]

JSON = b"application/json"
_LINGER_S = 2.0
_LINGER_BYTES = 64 << 20


class ClientLeftError(Exception):
    """The client closed the connection."""


class RequestError(Exception):
    """A request is answered by an error. ``unread``: there may be more of its body to come."""

    def __init__(self, status: int, reason: str, message: str, unread: bool = False) -> None:
        super().__init__(message)
        self.status, self.reason, self.unread = status, reason, unread


def error_body(reason: str, message: str) -> bytes:
    return orjson.dumps({"error": message, "reason": reason})


async def read_body(scope, receive, max_bytes: int, within_s: float) -> bytes:
    """``RequestError`` for one that is too large (413) or too slow (408); ``ClientLeftError``."""
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), None)
    if declared is not None and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    try:
        async with asyncio.timeout(within_s):
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body"):
                body = message.get("body", b"")
                if len(body) > max_bytes:
                    raise _too_large(max_bytes, unread=False)
                return body
            parts, size = [], 0
            while message["type"] == "http.request":
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > max_bytes:
                    raise _too_large(max_bytes)
                if not message.get("more_body"):
                    return b"".join(parts)
                message = await receive()
    except TimeoutError:
        raise RequestError(408, "timeout", f"the body did not come within {within_s:g} s") from None
    raise ClientLeftError


def _too_large(max_bytes: int, unread: bool = True) -> RequestError:
    return RequestError(413, "too large", f"the body may have at most {max_bytes} bytes", unread)


async def reply(
    send,
    status: int,
    body: bytes,
    headers: Sequence[tuple[bytes, bytes]] = (),
    *,
    content_type: bytes = JSON,
    unread_from: Any = None,
) -> None:
    """``unread_from``: the request's ``receive``, if its body was not read. The connection then closes, but
    not before the client has had a while to send the rest: closing at once would take the reply from it.
    """
    every = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *headers]
    if unread_from is not None:
        every.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": every})
    if unread_from is None:
        await send({"type": "http.response.body", "body": body})
        return
    await send({"type": "http.response.body", "body": body, "more_body": True})
    try:
        async with asyncio.timeout(_LINGER_S):
            size, more = 0, True
            while more and size < _LINGER_BYTES:
                message = await unread_from()
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
    except TimeoutError:
        pass
    await send({"type": "http.response.body"})
