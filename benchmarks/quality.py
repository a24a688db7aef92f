"""Quality of each representation: one model each, and all four in one multi-path model; of tables also with
rows of 8 and 4 bits.

    python benchmarks/quality.py --data movielens --seeds 3

    python benchmarks/quality.py --data ml-1m --seeds 5 --trainings [--derive]

The first command trains on the dataset's own split and appends AUC, log-loss and accuracy on the test part to
``benchmarks/results/quality.csv``, one row per path and seed. A seed fixes the initial weights, the hash
functions and the order of the batches.

The second one trains models of tables in the ways of ``TRAININGS`` and appends to
``benchmarks/results/training.csv``: what the optimizer of rows and the learnt maps of features are worth. With
``--derive`` the paths that ``mprec derive`` makes of each model are appended to
``benchmarks/results/derived.csv``, with their differences to the model and these differences' standard errors.
"""

import argparse

import harness
import torch

from mprec import data
from mprec.derive import derive
from mprec.nn import DheConfig, QuantizedEmbeddingBagCollection
from mprec.training import MULTI_PATH, REPRESENTATIONS, Trained, TrainOptions, evaluate, train_representations


#: Ways to train tables, as options of ``TrainOptions``.
TRAININGS = {
    "table, Adam 0.001": {"table_learning_rate": 1e-3, "mapped_tables": False},
    "table": {"mapped_tables": False},
    "table, sparse Adam": {"mapped_tables": False, "table_optimizer": "sparse_adam"},
    "mapped": {"mapped_tables": True},
    "mapped, Adam 0.001": {"table_learning_rate": 1e-3, "mapped_tables": True},
    "mapped, sparse Adam": {"mapped_tables": True, "table_optimizer": "sparse_adam"},
    "mapped, row-wise Adagrad": {"mapped_tables": True, "table_optimizer": "rowwise_adagrad"},
}


def train_table(dataset, name: str, seed: int, args: argparse.Namespace) -> tuple[dict, Trained]:
    """(a row of training.csv, the model)."""
    options = TrainOptions(epochs=args.epochs, batch_size=args.batch_size, seed=seed, **TRAININGS[name])
    trained = train_representations(dataset, ["table"], options, split=args.split, dim=args.dim)["table"]
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
    return row, trained


def derived_rows(dataset, name: str, seed: int, trained: Trained, split: str | None) -> list[dict]:
    found = derive(trained.model, trained.metadata, dataset.split(by=split), seconds=0, seed=seed, say=print)
    return [
        {
            "data": dataset.name,
            "split": trained.metadata["split"],
            "training": name,
            "seed": seed,
            "path": each.name,
            "embedding_bytes": each.nbytes,
            **{metric: f"{estimate.value:.5f}" for metric, estimate in each.quality["test"].items()},
            "auc_difference": f"{each.difference['test']['auc'].value:.5f}",
            "auc_difference_error": f"{each.difference['test']['auc'].error:.5f}",
        }
        for each in found
    ]


def rows_of(dataset, name: str, seed: int, args: argparse.Namespace) -> list[dict]:
    options = TrainOptions(epochs=args.epochs, batch_size=args.batch_size, seed=seed)
    dhe = DheConfig(k=args.k, hidden=(128,), family=args.family, seed=seed)
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
            "k": args.k,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="movielens", help="as mprec train takes it")
    parser.add_argument("--split", help="default: the data's own")
    parser.add_argument("--models", nargs="+", default=[*REPRESENTATIONS, MULTI_PATH])
    parser.add_argument("--trainings", nargs="*", choices=TRAININGS, help="ways to train tables (all)")
    parser.add_argument("--derive", action="store_true", help="with --trainings: also derive paths")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=TrainOptions().epochs)
    parser.add_argument("--batch-size", type=int, default=TrainOptions().batch_size)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--k", type=int, default=DheConfig().k)
    parser.add_argument("--family", default=DheConfig().family)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dataset = data.load(args.data)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        if args.trainings is not None:
            for name in args.trainings or TRAININGS:
                row, trained = train_table(dataset, name, seed, args)
                harness.append_csv("training", [row])
                print(*(row[key] for key in ("data", "training", "seed", "auc", "log_loss", "train_s")))
                if args.derive:
                    rows = derived_rows(dataset, name, seed, trained, args.split)
                    harness.append_csv("derived", rows)
                    for row in rows:
                        print(*(row[key] for key in ("path", "embedding_bytes", "auc", "auc_difference")))
            continue
        for name in args.models:
            rows = rows_of(dataset, name, seed, args)
            harness.append_csv("quality", rows)
            for row in rows:
                print(
                    " ".join(
                        str(row[key]) for key in ("data", "way", "path", "seed", "auc", "log_loss", "train_s")
                    )
                )


if __name__ == "__main__":
    main()
