"""``mprec predict``: the click probability of every row of a log, and how good the predictions are."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mprec.cli._setup import load_checked, reporter, say, use_threads
from mprec.dispatch import ScoringPath
from mprec.files import check_room, write_whole
from mprec.metrics import Metrics, known
from mprec.paths import inputs_of, paths_from_checkpoints
from mprec.training.models import PARTS

_BYTES_PER_SCORE = 16  # of text, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="checkpoint by mprec train, or bundle by mprec derive"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="SPEC",
        help="the log, as for mprec train; its values become IDs by the model's vocabularies",
    )
    parser.add_argument(
        "--unlabelled",
        action="store_true",
        help="the log has no labels (nor need a table have columns for the time and the users)",
    )
    parser.add_argument(
        "--part",
        choices=("all", *PARTS),
        default="all",
        help="all rows of the log, or one of the parts that training cuts it into (%(default)s)",
    )
    parser.add_argument(
        "--path", metavar="NAME", help="which path of a bundle (default: that of the best validation AUC)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="a .csv, .npy or .parquet with the probability of each row, in the log's order (of a part: by "
        "time, as training cuts it)",
    )
    parser.add_argument("--batch-size", type=int, default=2048, help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")


def run(args: argparse.Namespace) -> int:
    if args.batch_size < 1:
        raise ValueError(f"--batch-size: expected at least 1, got {args.batch_size}")
    use_threads(args.threads)
    if args.unlabelled and args.part != "all":
        raise ValueError("--part: a log without labels has no parts")
    write = None if args.output is None else _writer(args.output)
    path = _path(args.model, args.path)
    # A line that is left out would put the scores out of step with the log's rows.
    options = {"strict": True} if args.output is not None else {}
    if args.unlabelled:
        options["labelled"] = False
    dataset = load_checked(args.model, args.data, **options)
    if args.unlabelled and dataset.labelled:
        raise ValueError(f"--unlabelled: {dataset.name} is always read with its labels")
    if args.part != "all":
        dataset = dict(zip(PARTS, dataset.split(by=inputs_of(args.model).split), strict=True))[args.part]
    if args.output is not None:
        check_room(args.output, _BYTES_PER_SCORE * len(dataset))
    report, what = reporter(), f"scoring by {path.name}"
    scores = np.empty(len(dataset), dtype=np.float32)
    done = 0
    for batch in dataset.batches(args.batch_size):
        report(what, done / len(scores))
        scores[done : done + len(batch)] = path.model(batch).cpu().numpy()
        done += len(batch)
    report(what, 1.0)
    if write is not None:
        write_whole(args.output, lambda stream: write(stream, scores))
    metrics = Metrics.of(dataset.labels, scores) if dataset.labelled else None
    result = {
        "data": dataset.name,
        "rows": len(dataset),
        "path": path.name,
        "output": None if args.output is None else str(args.output),
        "mean": float(scores.mean(dtype=np.float64)),
        "metrics": metrics and {name: known(value) for name, value in metrics.to_dict().items()},
    }
    if args.json:
        print(json.dumps(result))
    else:
        quality = f"mean probability {result['mean']:.4f}" if metrics is None else metrics
        print(f"{len(dataset)} rows by {path.name}: {quality}")
    return 0


def _path(file: Path, name: str | None) -> ScoringPath:
    paths = {path.name: path for path in paths_from_checkpoints([file])}
    if name is None:
        chosen = max(paths.values(), key=lambda path: path.quality)
    elif name in paths:
        chosen = paths[name]
    else:
        raise ValueError(f"--path: expected one of {', '.join(paths)}, got {name!r}")
    if chosen.note:
        say(f"path {chosen.name}: {chosen.note}")
    return chosen


def _writer(file: Path) -> Callable[[BinaryIO, np.ndarray], object]:
    """What writes scores in the format that the file's name says."""
    writers = {".csv": _write_csv, ".npy": np.save, ".parquet": _write_parquet}
    if file.suffix not in writers:
        raise ValueError(f"--output: expected a name that ends in {', '.join(writers)}, got {str(file)!r}")
    if file.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError("--output: a .parquet is written by PyArrow: pip install 'mprec[tables]'")
    check_room(file)
    return writers[file.suffix]


def _write_csv(stream: BinaryIO, scores: np.ndarray) -> None:
    np.savetxt(stream, scores, fmt="%.9g", header="probability", comments="")


def _write_parquet(stream: BinaryIO, scores: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    pa.parquet.write_table(pa.table({"probability": scores}), stream)
