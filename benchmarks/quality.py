"""Quality of each representation: one model each, and all four in one multi-path model; of tables also with
rows of 8 and 4 bits.

    python benchmarks/quality.py --data movielens --seeds 3

Trains on the dataset's own split and appends AUC, log-loss and accuracy on the test part to
``benchmarks/results/quality.csv``, one row per path and seed. A seed fixes the initial weights, the hash
functions and the order of the batches.
"""

import argparse

import harness
import torch

from mprec import data
from mprec.nn import DheConfig, QuantizedEmbeddingBagCollection
from mprec.training import MODELS, MULTI_PATH, TrainOptions, evaluate, train_representations


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
    parser.add_argument("--models", nargs="+", default=[*MODELS, MULTI_PATH])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=TrainOptions().epochs)
    parser.add_argument("--batch-size", type=int, default=TrainOptions().batch_size)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--k", type=int, default=DheConfig().k)
    parser.add_argument("--family", default=DheConfig().family)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dataset = data.load(args.data)
    for seed in range(args.seeds):
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
