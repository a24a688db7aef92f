"""Quality of each representation: trained, in one multi-path model, and derived from a trained table.

    python benchmarks/quality.py --data movielens --seeds 3

    python benchmarks/quality.py --data ml-1m --seeds 5 --trainings --derive --keep models --seconds 110

The first command trains on the dataset's own split and appends AUC, log-loss and accuracy on the test part to
``benchmarks/results/quality.csv``, one row per path and seed. A seed fixes the initial weights, the hash
functions and the order of the batches.

The second one trains models in the ways of ``TRAININGS`` and appends to ``benchmarks/results/training.csv``.
With ``--derive`` the forms of ``FORMS`` are derived from the mapped tables, and every form, the trained ones
included, is appended to ``benchmarks/results/derived.csv`` with its bytes, its difference to the model it was
derived from, and that difference's standard error. What has its row is left out. ``--keep`` names a folder
for trained models and snapshots, and after ``--seconds`` the command ends with status 75: start it again and
it goes on from there.

    python benchmarks/quality_tables.py

makes tables and pictures of the rows.
"""

import argparse
import csv
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import harness
import torch

from mprec import checkpoint, data
from mprec.derive import derive
from mprec.errors import TrainingInterruptedError
from mprec.nn import DheConfig, QuantizedEmbeddingBagCollection
from mprec.training import MIXED, MODELS, MULTI_PATH, Keep, TrainOptions, evaluate, train_representations

#: Ways to train: the representation, and options of ``TrainOptions``.
TRAININGS = {
    "mapped": ("table", {}),
    "table": ("table", {"mapped_tables": False}),
    "mapped + dhe": (MIXED, {}),  # the two largest features hybrid
    "hybrid": ("hybrid", {"mapped_tables": False}),
    "low rank": ("low_rank", {}),  # a quarter of the columns
    "dhe": ("dhe", {}),
    "hot + dhe": ("hot_dhe", {}),
    "hot + low rank": ("hot_low_rank", {}),
    "table, Adam 0.001": ("table", {"table_learning_rate": 1e-3, "mapped_tables": False}),
    "table, sparse Adam": ("table", {"mapped_tables": False, "table_optimizer": "sparse_adam"}),
    "mapped, Adam 0.001": ("table", {"table_learning_rate": 1e-3}),
    "mapped, sparse Adam": ("table", {"table_optimizer": "sparse_adam"}),
    "mapped, row-wise Adagrad": ("table", {"table_optimizer": "rowwise_adagrad"}),
}

#: What is derived from mapped tables; a group is made and measured together.
FORMS = (
    (
        *("table[int8]", "table[int4]", "table/int8", "table[int8]/int8"),
        *("low_rank:16[int8]", "low_rank:12[int8]", "low_rank:8[int8]"),
        *("low_rank:4[int8]", "low_rank:3[int8]", "low_rank:2[int8]", "low_rank:1[int8]"),
    ),
    ("dhe:4",),
    ("dhe:16", "dhe:32", "dhe:64"),
    ("dhe:1", "dhe:5"),
)
#: The decoder of ``hybrid`` and ``dhe``, where ``--k`` and ``--hidden`` do not say otherwise.
K, HIDDEN = 256, 64
MORE_TO_DO = 75


def present(name: str, columns: tuple[str, ...]) -> set[tuple[str, ...]]:
    """The values of these columns in ``benchmarks/results/<name>.csv``."""
    path = harness.RESULTS / f"{name}.csv"
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(row[column] for column in columns) for row in csv.DictReader(file)}


def append_new(name: str, keys: tuple[str, ...], rows: list[dict]) -> None:
    """Append the rows whose keys are not there, and print them."""
    known = present(name, keys)
    rows = [row for row in rows if tuple(str(row[key]) for key in keys) not in known]
    harness.append_csv(name, rows)
    for row in rows:
        print(*(row[key] for key in (*keys, "auc")), flush=True)


def trained_model(dataset, name: str, seed: int, args, is_late: Callable[[], bool]) -> tuple:
    """(model, metadata), kept from an earlier run or trained, with its row in training.csv.

    ``TrainingInterruptedError`` when it is late: the next run goes on from the snapshot.
    """
    file = args.keep / f"{dataset.name} {name} {seed}.pt"
    if file.exists():
        return checkpoint.load(file)
    representation, changed = TRAININGS[name]
    options = TrainOptions(epochs=args.epochs, batch_size=args.batch_size, seed=seed, **changed)
    arguments = {
        "dim": args.dim,
        "dhe": DheConfig(args.k or K, (args.hidden or HIDDEN,), args.family, seed=seed),
    }
    if representation == MIXED:
        largest = sorted(dataset.features, key=lambda feature: -feature[1])[:2]
        arguments["chosen"] = {"*": "table"} | {feature: "hybrid" for feature, _ in largest}
    keep = Keep(file.with_suffix(".snapshot"), resume=True, stop=is_late)
    trained = train_representations(
        dataset, [representation], options, split=args.split, keep=keep, **arguments
    )[representation]
    valid, test = (trained.metadata["metrics"][part] for part in ("valid", "test"))
    row = {
        "data": dataset.name,
        "split": trained.metadata["split"],
        "training": name,
        "seed": seed,
        "dim": args.dim,
        "batch_size": args.batch_size,
        "valid_auc": f"{valid['auc']:.5f}",
        "auc": f"{test['auc']:.5f}",
        "log_loss": f"{test['log_loss']:.5f}",
        "accuracy": f"{test['accuracy']:.5f}",
        "epoch": trained.metadata["epoch"],
        "train_s": f"{trained.metadata['seconds']:.1f}",
    }
    append_new("training", ("data", "split", "training", "seed"), [row])
    checkpoint.save(file, trained.model, trained.metadata)
    keep.snapshot.unlink(missing_ok=True)
    return trained.model, trained.metadata


def derive_forms(dataset, name: str, seed: int, recipes: tuple[str, ...], found: tuple, args) -> None:
    """Rows of derived.csv that are not there: the trained form, and those of the recipes."""
    model, metadata = found
    keys = ("data", "split", "training", "seed", "path")
    where = (dataset.name, metadata["split"], name, str(seed))
    known = {key[-1] for key in present("derived", keys) if key[:-1] == where}
    recipes = [recipe for recipe in recipes if recipe not in known]
    if metadata["representation"] in known and not recipes:
        return
    parts = dataset.split(by=args.split)
    rows = [
        {
            **dict(zip(keys, (*where, each.name), strict=True)),
            "embedding_bytes": each.nbytes,
            **{metric: f"{estimate.value:.5f}" for metric, estimate in each.quality["test"].items()},
            "auc_difference": f"{each.difference['test']['auc'].value:.5f}",
            "auc_difference_error": f"{each.difference['test']['auc'].error:.5f}",
        }
        for each in derive(model, metadata, parts, recipes=recipes, seconds=0, seed=seed, say=print)
    ]
    append_new("derived", keys, rows)


def study(dataset, args: argparse.Namespace) -> int:
    """Every training and what is derived of it; the process's status."""
    end = time.monotonic() + args.seconds

    def is_late() -> bool:
        return time.monotonic() > end

    seeds = range(args.first_seed, args.first_seed + args.seeds)
    try:
        for name in args.trainings or TRAININGS:
            for seed in seeds:
                trained_model(dataset, name, seed, args, is_late)
            for recipes in () if not args.derive else FORMS if name == "mapped" else ((),):
                for seed in seeds:
                    if is_late():
                        raise TrainingInterruptedError("forms are left")
                    found = trained_model(dataset, name, seed, args, is_late)
                    derive_forms(dataset, name, seed, recipes, found, args)
    except TrainingInterruptedError as interruption:
        print(interruption)
        return MORE_TO_DO
    return 0


def rows_of(dataset, name: str, seed: int, args: argparse.Namespace) -> list[dict]:
    options = TrainOptions(epochs=args.epochs, batch_size=args.batch_size, seed=seed)
    k = args.k or DheConfig().k
    dhe = DheConfig(k=k, hidden=(args.hidden or 128,), family=args.family, seed=seed)
    trained = train_representations(dataset, [name], options, split=args.split, dim=args.dim, dhe=dhe)[name]
    metadata = trained.metadata
    paths = metadata["paths"] if name == MULTI_PATH else {name: metadata["metrics"]}
    if name == "table":
        paths |= quantized(trained.model, dataset, args.split)
    return [
        {
            "data": dataset.name,
            "split": metadata["split"],
            "way": MULTI_PATH if name == MULTI_PATH else "separate",
            "path": path,
            "seed": seed,
            "dim": args.dim,
            "k": k,
            "family": args.family,
            "batch_size": args.batch_size,
            "valid_auc": f"{found['valid']['auc']:.5f}",
            "auc": f"{found['test']['auc']:.5f}",
            "log_loss": f"{found['test']['log_loss']:.5f}",
            "accuracy": f"{found['test']['accuracy']:.5f}",
            "epoch": metadata["epoch"],
            "train_s": f"{metadata['seconds']:.1f}",
            "parameters": metadata["parameters"],
        }
        for path, found in paths.items()
    ]


def quantized(model, dataset, split: str | None) -> dict[str, dict]:
    """Metrics of the trained model with its tables' rows in fewer bits."""
    _, valid, test = dataset.split(by=split)
    exact, found = model.embeddings, {}
    for precision in ("int8", "int4"):
        model.embeddings = QuantizedEmbeddingBagCollection(exact, tables=precision)
        parts = {"valid": valid, "test": test}
        found[f"table[{precision}]"] = {n: evaluate(model, part).to_dict() for n, part in parts.items()}
    model.embeddings = exact
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="movielens", help="as mprec train takes it")
    parser.add_argument("--split", help="default: the data's own")
    parser.add_argument("--models", nargs="+", default=[*MODELS, MULTI_PATH])
    parser.add_argument("--trainings", nargs="*", choices=TRAININGS, help="ways to train (all)")
    parser.add_argument("--derive", action="store_true", help="with --trainings: also derive forms")
    parser.add_argument("--keep", type=Path, help="with --trainings: folder for models and snapshots")
    parser.add_argument("--seconds", type=float, default=1e9, help="with --trainings: end after so long")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=TrainOptions().epochs)
    parser.add_argument("--batch-size", type=int, default=TrainOptions().batch_size)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--k", type=int, help="hashes")
    parser.add_argument("--hidden", type=int, help="width of decoders")
    parser.add_argument("--family", default=DheConfig().family)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dataset = data.load(args.data)
    if "synthetic" in args.data:  # its name does not tell one from another
        largest = max(size for _, size in dataset.features)
        dataset = dataclasses.replace(dataset, name=f"planted-{largest}")
    if args.trainings is not None:
        with tempfile.TemporaryDirectory() as folder:
            args.keep = args.keep or Path(folder)
            args.keep.mkdir(exist_ok=True)
            return study(dataset, args)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name in args.models:
            rows = rows_of(dataset, name, seed, args)
            harness.append_csv("quality", rows)
            for row in rows:
                shown = ("data", "way", "path", "seed", "auc", "log_loss", "train_s")
                print(*(row[key] for key in shown), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
