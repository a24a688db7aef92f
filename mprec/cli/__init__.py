"""The ``mprec`` command: one module of this package per subcommand.

A subcommand's module has ``HELP``, ``add_arguments(parser)`` and ``run(args) -> exit status``. What is for
machines goes to standard output (all of it JSON under ``--json``), progress goes to standard error.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from mprec._native import __version__

SUBCOMMANDS = ("info", "train", "profile", "plan", "serve", "loadtest", "simulate", "report", "demo")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mprec",
        description="Embeddings for recommendation models.",
        epilog="MPREC_DEBUG=1 in the environment shows the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=f"mprec {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in SUBCOMMANDS:
        module = importlib.import_module(f"mprec.cli.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns its exit status (2 for bad arguments or input, as argparse does)."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("mprec: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except (OSError, ValueError, TypeError, RuntimeError, LookupError) as error:
        if os.environ.get("MPREC_DEBUG"):
            raise
        print(f"mprec {args.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
