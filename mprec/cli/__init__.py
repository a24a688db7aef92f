"""The ``mprec`` command: one module of this package per subcommand.

A subcommand's module has ``add_arguments(parser)`` and ``run(args) -> exit status``, and a line in
``SUBCOMMANDS``. Only the module of the subcommand that was chosen is imported: torch alone takes a second.
What is for machines goes to standard output (all of it JSON under ``--json``), progress to standard error.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

#: What the extra "cli" installs.
_EXTRA = {"rich", "matplotlib", "jinja2", "sklearn"}

#: Module of each subcommand -> what its help says.
SUBCOMMANDS = {
    "info": "print versions, CPU, instruction set in use, threads, GPU and what is compiled in",
    "train": "train a model on a click log and write its checkpoint",
    "predict": "give the click probability of every row of a log, and how good the predictions are",
    "derive": "make and measure smaller, cheaper paths of one trained model, and bundle them",
    "profile": "measure trained models over batch sizes on this machine, or show such a profile",
    "plan": "choose, within a memory budget, a representation per feature and which paths of a bundle fit",
    "serve": "serve trained models over HTTP on this machine, the path chosen per batch",
    "loadtest": "serve a random load of held-out samples with the dispatcher and with each path alone",
    "simulate": "serve a load in virtual time on described devices or measured profiles (all simulated)",
    "report": "draw report.html from the JSON that mprec demo wrote",
    "demo": "train a model, derive paths from it, profile, plan and serve them; tables and one page",
}


class _Version(argparse.Action):
    """As argparse's own, but the version is asked of the native module only when it is wanted."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from mprec._native import __version__

        print(f"mprec {__version__}")
        parser.exit()


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """A parser of everything, except that only the subcommand ``chosen`` knows its arguments."""
    parser = argparse.ArgumentParser(
        prog="mprec",
        description="Embeddings for recommendation models.",
        epilog="MPREC_DEBUG=1 in the environment shows the traceback of an error.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show program's version number and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, line in SUBCOMMANDS.items():
        command = commands.add_parser(name, help=line, description=line)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        if name == chosen:
            module = importlib.import_module(f"mprec.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command, after ``mprec``; ``SystemExit`` as argparse does, for ``--help`` too."""
    # No option before the subcommand takes a value, so the subcommand is the first word that is no option.
    chosen = next((word for word in argv if not word.startswith("-")), None)
    if chosen == "train" and "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        # Its OpenMP threads keep their cores for milliseconds after an operator, looking for the next one,
        # while mprec's own threads wait for a core. 2000 looks are some 40 µs. Read when torch is loaded.
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    return _parser(chosen).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns its exit status (2 for bad arguments or input, as argparse does)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse(argv)
        return args.run(args)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA or os.environ.get("MPREC_DEBUG"):
            raise
        print(f"mprec: {error.name} is not installed: pip install 'mprec[cli]'", file=sys.stderr)
        return 2
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
