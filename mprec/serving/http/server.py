"""Runs the application: signals, draining, and as many connections as there are files for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn

from mprec.serving.http.app import create_app
from mprec.serving.http.connection import connection_class
from mprec.serving.http.service import ReloadError, Service

__all__ = ["listen", "serve", "url_of"]

_SPARE_FILES = 64
_BACKLOG = 2048
_SWITCH_S = float(__import__("os").environ.get("SWITCH", "1e-4"))
_log = logging.getLogger("mprec.serving")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. ``OSError`` if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=_BACKLOG)


def url_of(listener: socket.socket) -> str:
    """``http://...`` of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are ours: uvicorn's end the process by the signal that it was sent


def serve(
    service: Service,
    listener: socket.socket,
    *,
    access_log: bool = False,
    drain_s: float = 30.0,
    notice_s: float = 0.0,
    on_start: Callable[[Callable[[], None]], object] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT, in the main thread (or until what ``on_start`` is given is called, from
    any thread); then stop listening, answer the queries under way, and return. SIGHUP loads the models again.

    Before it stops listening the server says for ``notice_s`` seconds that it is not ready, so that load
    balancers go elsewhere. Queries that take longer than ``drain_s`` seconds are given up; so is all, at a
    second signal. Closing the engine is the caller's part.
    """
    _allow_files(service)
    config = uvicorn.Config(
        create_app(service, access_log=access_log),
        http=connection_class(service, access_log),
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=service.limits.idle_s,
        timeout_graceful_shutdown=drain_s,
        backlog=_BACKLOG,
    )
    server = _Server(config)

    async def main() -> None:
        loop = asyncio.get_running_loop()
        reloads: set[asyncio.Task] = set()

        def stop() -> None:
            if service.is_draining:
                server.force_exit = True
            service.is_draining = True
            loop.call_later(notice_s, setattr, server, "should_exit", True)

        def reload() -> None:
            task = loop.create_task(_reload(service))
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: reload}
        with _signals(loop, handlers):
            if on_start is not None:
                on_start(lambda: loop.call_soon_threadsafe(stop))
            await server.serve([listener])

    with _eager_switching(), asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(main())


async def _reload(service: Service) -> None:
    try:
        paths = await asyncio.to_thread(service.reload)
    except ReloadError as error:
        _log.error("the models were not loaded again, those before go on serving: %s", error)
    else:
        _log.warning("loaded again: %s", ", ".join(paths))


@contextlib.contextmanager
def _eager_switching() -> Iterator[None]:
    """A thread that has a batch to score waits for the interpreter's lock for as long as the loop is busy, up
    to the switch interval, several times a batch: Python's five milliseconds are most of a target."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextlib.contextmanager
def _signals(loop: asyncio.AbstractEventLoop, handlers: dict[int, Callable[[], None]]) -> Iterator[None]:
    added = []
    for number, handler in handlers.items():
        with contextlib.suppress(ValueError, RuntimeError):  # outside the main thread there are no signals
            loop.add_signal_handler(number, handler)
            added.append(number)
    try:
        yield
    finally:
        for number in added:
            loop.remove_signal_handler(number)


def _allow_files(service: Service) -> None:
    """At the limit of open files no connection could be taken, or refused: stay below it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = service.limits.max_connections + 2 * _SPARE_FILES
    if soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
            soft = min(wanted, hard)
    if soft < wanted:
        room = max(soft - 2 * _SPARE_FILES, 1)
        _log.warning("max_connections: the limit of open files, %d, allows %d", soft, room)
        service.limit_connections(room)
