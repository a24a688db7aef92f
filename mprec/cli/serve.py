"""``mprec serve``: answer queries over HTTP."""

from __future__ import annotations

import argparse
import json
import signal
import threading

from mprec.cli._setup import (
    add_path_arguments,
    add_profile_arguments,
    get_profile,
    held_out,
    load_paths,
    say,
)
from mprec.dispatch import Dispatcher
from mprec.serving import Engine
from mprec.serving.frontend import FrontEnd


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path_arguments(parser)
    add_profile_arguments(parser)
    parser.add_argument(
        "--sla-ms", type=float, default=10.0, help="latency target of queries without one (10)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (8000)")
    parser.add_argument("--max-batch", type=int, default=2048, help="samples scored together at most (2048)")
    parser.add_argument("--max-queue", type=int, default=1 << 20, help="samples waiting at most (1048576)")
    parser.add_argument("--no-admission", action="store_true", help="answer hopeless queries late")


def run(args: argparse.Namespace) -> int:
    if not args.sla_ms > 0:
        raise ValueError(f"--sla-ms must be positive, got {args.sla_ms}")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port must be between 0 and 65535, got {args.port}")
    paths = load_paths(args)
    test = held_out(args)
    engine = Engine(
        Dispatcher(paths, get_profile(args, paths, test)),
        sla_s=args.sla_ms / 1e3,
        max_batch=args.max_batch,
        max_queue=args.max_queue,
        admission=not args.no_admission,
    )
    vocabularies = [size for _, size in test.features]
    server = FrontEnd(engine, vocabularies, test.num_dense, args.host, args.port)
    engine.start()
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    stop = threading.Event()
    before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        serving.start()
        if args.json:
            print(
                json.dumps({"url": server.url, "features": test.features, "num_dense": test.num_dense}),
                flush=True,
            )
        else:
            print(f"serving {', '.join(path.name for path in paths)} on {server.url}", flush=True)
        stop.wait()
        say("draining ...")
    finally:
        server.drain()
        serving.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    counts = engine.statistics()
    if args.json:
        print(json.dumps(counts), flush=True)
    else:
        refused = sum(counts["refused"].values())
        say(f"{counts['answered']} of {counts['queries']} queries answered, {refused} refused")
    return 0
