"""``mprec train``: fit one model to a click log and write its checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mprec import checkpoint, data
from mprec.cli._progress import training_progress
from mprec.data.dataset import SPLITS
from mprec.nn import DheConfig
from mprec.training import (
    MONITORS,
    MULTI_PATH,
    REPRESENTATIONS,
    TABLE_OPTIMIZERS,
    TrainOptions,
    train_representations,
)


def sizes(text: str) -> tuple[int, ...]:
    """``512,256`` -> (512, 256)."""
    try:
        values = tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers joined by commas, got {text!r}") from None
    if any(value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"layer sizes must be at least 1, got {text!r}")
    return values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options, dhe = TrainOptions(), DheConfig()
    parser.add_argument(
        "--data",
        required=True,
        metavar="SPEC",
        help=f"{', '.join(data.available())}, a folder or a file; options follow: criteo:train.txt,rows=1000",
    )
    parser.add_argument("--representation", required=True, choices=(*REPRESENTATIONS, MULTI_PATH))
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="checkpoint to write")
    parser.add_argument("--strict", action="store_true", help="stop at the first malformed line")
    parser.add_argument("--split", choices=SPLITS, help="how rows are held out (default: the data's own)")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=options.epochs, help="at most (%(default)s)")
    training.add_argument("--batch-size", type=int, default=options.batch_size, help="(%(default)s)")
    training.add_argument("--learning-rate", type=float, default=options.learning_rate, help="(%(default)s)")
    training.add_argument("--table-optimizer", choices=("auto", *TABLE_OPTIMIZERS), default="auto")
    training.add_argument("--table-learning-rate", type=float, help="default: the table optimizer's own")
    training.add_argument(
        "--mapped-tables",
        action=argparse.BooleanOptionalAction,
        default=options.mapped_tables,
        help="train rows through a map of their feature, folded into them on save (where tables allow it)",
    )
    training.add_argument(
        "--patience", type=int, default=options.patience, help="epochs without improvement (%(default)s)"
    )
    training.add_argument("--monitor", choices=tuple(MONITORS), default=options.monitor, help="(%(default)s)")
    training.add_argument("--seed", type=int, default=options.seed, help="(%(default)s)")
    training.add_argument("--threads", type=int, default=options.threads, help="(%(default)s)")
    model = parser.add_argument_group("model")
    model.add_argument("--dim", type=int, default=16, help="length of the embedding vectors (%(default)s)")
    model.add_argument(
        "--bottom", type=sizes, default=(64, 32), help="hidden sizes of the bottom MLP (64,32)"
    )
    model.add_argument("--top", type=sizes, default=(64, 32), help="hidden sizes of the top MLP (64,32)")
    model.add_argument("--dhe-k", type=int, default=dhe.k, help="hashes of a DHE (%(default)s)")
    model.add_argument(
        "--dhe-hidden", type=sizes, default=dhe.hidden, help="hidden sizes of its decoder (128)"
    )
    model.add_argument("--dhe-family", default=dhe.family, help="hash family (%(default)s)")
    model.add_argument("--dhe-activation", default=dhe.activation, help="(%(default)s)")
    model.add_argument("--dhe-last-activation", default=dhe.last_activation, help="(%(default)s)")
    model.add_argument(
        "--select-largest", type=int, default=2, help="features that select gives a DHE (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    if not args.output.parent.is_dir():
        raise ValueError(f"--output: there is no folder {args.output.parent}")
    options = TrainOptions(
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        table_optimizer=args.table_optimizer,
        table_learning_rate=args.table_learning_rate,
        mapped_tables=args.mapped_tables,
        patience=args.patience,
        monitor=args.monitor,
        seed=args.seed,
        threads=args.threads,
    )
    dhe = DheConfig(
        k=args.dhe_k,
        hidden=args.dhe_hidden,
        family=args.dhe_family,
        activation=args.dhe_activation,
        last_activation=args.dhe_last_activation,
        seed=args.seed,
    )
    dataset = data.load(args.data, strict=args.strict)
    print(
        f"{dataset.name}: {len(dataset)} rows, {len(dataset.features)} features, {dataset.num_dense} dense",
        file=sys.stderr,
    )
    with training_progress() as report:
        trained = train_representations(
            dataset,
            [args.representation],
            options,
            split=args.split,
            progress=report,
            dim=args.dim,
            dhe=dhe,
            select_largest=args.select_largest,
            bottom=args.bottom,
            top=args.top,
        )[args.representation]
    checkpoint.save(args.output, trained.model, trained.metadata)
    result = {
        "checkpoint": str(args.output),
        "bytes": args.output.stat().st_size,
        **trained.metadata,
        "history": trained.result.history,
    }
    if args.json:
        print(json.dumps(result))
        return 0
    for part, quality in trained.metadata["metrics"].items():
        rows = trained.metadata["rows"][part]
        print(
            f"{part} ({rows} rows): AUC {quality['auc']:.4f}, log-loss {quality['log_loss']:.4f}, "
            f"accuracy {quality['accuracy']:.4f}"
        )
    for path, quality in trained.metadata.get("paths", {}).items():
        test = quality["test"]
        print(f"  test, {path} path: AUC {test['auc']:.4f}, log-loss {test['log_loss']:.4f}")
    print(f"{result['bytes']} bytes in {args.output} ({trained.metadata['parameters']} parameters)")
    return 0
