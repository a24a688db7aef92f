"""``mprec report``: a saved result as a page."""

import argparse
import json
from pathlib import Path

from mprec import report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("result", type=Path, help="result.json as written by mprec demo")
    parser.add_argument(
        "--output", type=Path, default=Path("report.html"), help="page to write (report.html)"
    )


def run(args: argparse.Namespace) -> int:
    try:
        result = json.loads(args.result.read_text(encoding="utf-8"))
        page = report.render(result)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{args.result}: not a result of mprec demo ({error!r})") from error
    args.output.write_text(page, encoding="utf-8")
    print(json.dumps({"page": str(args.output)}) if args.json else args.output)
    return 0
