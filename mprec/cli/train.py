"""``mprec train``: fit one model to a click log and write its checkpoint.

The checkpoint is written as soon as an epoch is better than those before it. Beside it, until training ends,
is what an interrupted one goes on from (``--resume``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

from mprec import checkpoint, data, freed_memory
from mprec.cli._choices import read_features, read_plan
from mprec.cli._logs import csv_log, tensorboard_log
from mprec.cli._progress import training_progress
from mprec.cli._setup import reporter, say
from mprec.data.cross import SIZE
from mprec.data.dataset import SPLITS
from mprec.errors import TrainingInterruptedError
from mprec.files import check_room
from mprec.metrics import Metrics
from mprec.nn import DheConfig
from mprec.training import (
    DECAYS,
    MIXED,
    MODELS,
    MONITORS,
    MULTI_PATH,
    TABLE_OPTIMIZERS,
    Interruption,
    Keep,
    Progress,
    Trained,
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
        raise argparse.ArgumentTypeError(f"layer sizes: expected at least 1, got {text!r}")
    return values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options, dhe = TrainOptions(), DheConfig()
    parser.add_argument(
        "--data",
        required=True,
        metavar="SPEC",
        help=f"{', '.join(data.available())}, a folder or a file; options follow: criteo:train.txt,rows=1000",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--representation", choices=(*MODELS, MULTI_PATH), help="of every feature")
    what.add_argument(
        "--plan", type=Path, metavar="FILE", help="that of each feature as mprec plan --output chose it"
    )
    what.add_argument(
        "--features",
        type=Path,
        metavar="FILE",
        help='or as JSON says: {"item": {"representation": "dhe", "dhe": {"k": 64}}, "*": "table"}',
    )
    parser.add_argument("--plan-name", metavar="NAME", help="of the plan, where the file has several")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="checkpoint to write")
    parser.add_argument(
        "--resume", action="store_true", help="go on where an interrupted training with this output stopped"
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="CSV to write a line for each epoch to")
    parser.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="for TensorBoard's events")
    parser.add_argument("--strict", action="store_true", help="stop at the first malformed line")
    parser.add_argument(
        "--malformed", type=float, metavar="SHARE", help="of lines that may be left out (0.01)"
    )
    parser.add_argument(
        "--cross",
        metavar="A:B,...",
        help="pairs of features to add as columns: user:genres,hour:weekday (as the option cross of --data)",
    )
    parser.add_argument("--cross-size", type=int, help=f"most IDs of such a column ({SIZE}); then hashed")
    parser.add_argument("--split", choices=SPLITS, help="how rows are held out (default: the data's own)")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=int, default=options.epochs, help="at most (%(default)s)")
    training.add_argument("--batch-size", type=int, default=options.batch_size, help="(%(default)s)")
    training.add_argument("--learning-rate", type=float, default=options.learning_rate, help="(%(default)s)")
    training.add_argument("--table-optimizer", choices=("auto", *TABLE_OPTIMIZERS), default="auto")
    training.add_argument("--table-learning-rate", type=float, help="default: the table optimizer's own")
    training.add_argument(
        "--warmup-steps", type=int, default=options.warmup_steps, help="of growing rates (%(default)s)"
    )
    training.add_argument(
        "--decay", choices=tuple(DECAYS), default=options.decay, help="of rates, over all epochs (none)"
    )
    training.add_argument(
        "--clip-norm", type=float, help="largest norm of the gradient of all but tables (default: any)"
    )
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
    freed_memory.keep()
    for name, file in (("--output", args.output), ("--log", args.log)):
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"{name}: there is no folder {file.parent}")
    check_room(args.output)
    snapshot = args.output.with_name(args.output.name + ".training")
    if args.resume and not snapshot.exists():
        raise ValueError(f"--resume: there is no {snapshot}, which an interrupted training leaves")
    options = TrainOptions(
        epochs=args.epochs,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        table_optimizer=args.table_optimizer,
        table_learning_rate=args.table_learning_rate,
        warmup_steps=args.warmup_steps,
        decay=args.decay,
        clip_norm=args.clip_norm,
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
    representation, chosen, extra = args.representation, None, {}
    if representation is None:
        representation = MIXED
        if args.plan is None:
            chosen = read_features(args.features)
        else:
            chosen, precisions = read_plan(args.plan, args.plan_name)
            if precisions:
                extra = {"planned_precisions": precisions}
                say("rows are trained in float32; mprec derive makes those of fewer bits of them")
    limits = {} if args.malformed is None else {"malformed": args.malformed}
    crosses = None
    if args.cross is not None:
        size = SIZE if args.cross_size is None else args.cross_size
        crosses = {"pairs": args.cross.split(","), "size": size}
    elif args.cross_size is not None:
        raise ValueError("--cross-size goes with --cross")
    dataset = data.load(args.data, crosses=crosses, strict=args.strict, progress=reporter(), **limits)
    say(f"{dataset.name}: {len(dataset)} rows, {len(dataset.features)} features, {dataset.num_dense} dense")

    def save(trained: Trained) -> None:
        metadata = {**trained.metadata, **extra}
        checkpoint.save(args.output, trained.model, metadata, dataset.vocabularies)

    with contextlib.ExitStack() as stack:
        reports = [stack.enter_context(training_progress())]
        if args.log is not None:
            reports.append(csv_log(args.log, args.resume))
        if args.tensorboard is not None:
            reports.append(stack.enter_context(tensorboard_log(args.tensorboard)))

        def report(name: str, event: Progress) -> None:
            for each in reports:
                each(name, event)

        stop = stack.enter_context(Interruption())
        try:
            trained = train_representations(
                dataset,
                [representation],
                options,
                split=args.split,
                progress=report,
                keep=Keep(snapshot, args.resume, stop=stop),
                best=save,
                dim=args.dim,
                dhe=dhe,
                select_largest=args.select_largest,
                chosen=chosen,
                bottom=args.bottom,
                top=args.top,
            )[representation]
        except TrainingInterruptedError as error:
            say(f"mprec train: {error}. The same command with --resume goes on")
            return 128 + stop.signal
    save(trained)
    snapshot.unlink(missing_ok=True)
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
        print(f"{part} ({rows} rows): {Metrics(**quality)}")
    for path, quality in trained.metadata.get("paths", {}).items():
        test = quality["test"]
        print(f"  test, {path} path: AUC {test['auc']:.4f}, log-loss {test['log_loss']:.4f}")
    print(f"{result['bytes']} bytes in {args.output} ({trained.metadata['parameters']} parameters)")
    return 0
