"""``mprec serve``: answer queries over HTTP."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import sys
import threading
from collections.abc import Callable

from mprec.cli._executors import check_split, load_executors
from mprec.cli._setup import add_path_arguments, reporter, say
from mprec.serving import Engine
from mprec.serving.build import ModelInputs, model_inputs
from mprec.serving.executors import Executor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path_arguments(parser, needs_data=False)
    group = parser.add_argument_group("profile")
    group.add_argument("--profile", metavar="FILE", help="written by mprec profile; measured if not usable")
    group.add_argument(
        "--profile-seconds",
        type=float,
        default=3.0,
        metavar="S",
        help="time for measuring one, on --data or else on random IDs, before the first answer (3)",
    )
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--sla-ms", type=float, default=10.0, help="latency target of queries without one (10)"
    )
    group.add_argument("--max-batch", type=int, default=2048, help="samples scored together at most (2048)")
    group.add_argument("--max-queue", type=int, default=1 << 20, help="samples waiting at most (1048576)")
    group.add_argument("--no-admission", action="store_true", help="answer hopeless queries late")
    group.add_argument(
        "--executors",
        metavar="SPLIT",
        help="local:THREADS or local:NxTHREADS in this process, process:N or process:NxTHREADS in others, or "
        "auto: what serves batches of at most 128 best on this machine, which is measured once (auto; with "
        "--threads, local)",
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, help="0 takes a free one (8000)")
    group.add_argument("--max-samples", type=int, default=8192, help="of one query (8192)")
    group.add_argument("--max-ids", type=int, default=1 << 17, help="of one query (131072)")
    group.add_argument("--max-connections", type=int, default=4096, help="at once (4096)")
    group.add_argument(
        "--notice-seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="at SIGTERM, say for so long that it is not ready before it stops listening (0)",
    )
    group.add_argument("--reload-token", metavar="TOKEN", help="what POST /reload must bear")
    group.add_argument("--access-log", action="store_true", help="log each request, as JSON")
    group.add_argument("--json-log", action="store_true", help="log in lines of JSON")


def run(args: argparse.Namespace) -> int:
    """The port opens at once. SIGHUP (or POST /reload from this machine) loads the checkpoints again."""
    from mprec.serving.http import Limits, Service, listen, serve
    from mprec.serving.http.server import url_of

    if not 0 < args.sla_ms < math.inf:
        raise ValueError(f"--sla-ms: expected a positive finite number, got {args.sla_ms}")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port: expected 0 to 65535, got {args.port}")
    if not 0 <= args.notice_seconds < math.inf:
        raise ValueError(f"--notice-seconds: expected at least 0, got {args.notice_seconds}")
    _log_to_standard_error(args)
    limits = Limits(max_samples=args.max_samples, max_ids=args.max_ids, max_connections=args.max_connections)
    inputs = model_inputs(args.checkpoints)
    splits = [check_split(args)]

    def reload() -> tuple[list[Executor], ModelInputs]:
        executors, inputs, _ = load_executors(args, splits[-1], lambda *_: None)
        return executors, inputs

    service = Service(inputs, limits, reload=reload, reload_token=args.reload_token)
    failure: list[BaseException] = []
    preparing: list[threading.Thread] = []
    report = reporter()

    def progress(what: str, share: float) -> None:
        if service.is_draining:
            raise _StoppedError
        report(what, share)

    def prepare(stop: Callable[[], None]) -> None:
        try:
            executors, _, split = load_executors(args, splits[0], progress)
            splits.append(split)
            engine = Engine(
                executors=executors,
                sla_s=args.sla_ms / 1e3,
                max_batch=args.max_batch,
                max_queue=args.max_queue,
                admission=not args.no_admission,
            )
            gc.collect()
            gc.freeze()  # a full collection would walk all that torch has imported, and hold every query
            service.take(engine.start())
            say(f"ready: {', '.join(engine.paths)} on {split}")
        except _StoppedError:
            pass
        except BaseException as error:
            failure.append(error)
            stop()

    def start(stop: Callable[[], None]) -> None:
        preparing.append(threading.Thread(target=prepare, args=(stop,), name="mprec-prepare"))
        preparing[0].start()

    listener = listen(args.host, args.port)
    url = url_of(listener)
    if args.json:
        features = list(zip(inputs.names, inputs.vocabularies, strict=True))
        print(json.dumps({"url": url, "features": features, "num_dense": inputs.num_dense}), flush=True)
    else:
        print(f"listening on {url}", flush=True)
    serve(service, listener, access_log=args.access_log, notice_s=args.notice_seconds, on_start=start)
    preparing[0].join()
    gc.unfreeze()  # what native libraries find uncollected at the end they complain of
    if failure:
        raise failure[0]
    say("drained")
    if service.engine is not None:
        service.engine.close()
        _report(service.engine.statistics(), args.json)
    return 0


class _StoppedError(Exception):
    """The server is to stop before it was ready."""


def _log_to_standard_error(args: argparse.Namespace) -> None:
    from mprec.serving.http.access_log import JsonFormatter

    handler = logging.StreamHandler(sys.stderr)
    if args.json_log or args.access_log:
        handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("mprec.access").setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of every malformed request


def _report(counts: dict, as_json: bool) -> None:
    if as_json:
        print(json.dumps(counts), flush=True)
    else:
        refused = sum(counts["refused"].values())
        say(f"{counts['answered']} of {counts['queries']} queries answered, {refused} refused")
