"""Quality on a log cut at one moment, where many IDs are new: as trained, and with means for unseen IDs.

    python benchmarks/unseen.py --data movielens --seeds 3

Appends to ``benchmarks/results/unseen.csv`` one row per representation, seed and answer to unseen IDs:
``as is`` (a table's untrained row, a decoder's guess) or ``mean`` (:class:`mprec.nn.MeanForUnseen`).
"""

import argparse

import harness
import torch

from mprec import data
from mprec.nn import DheConfig, MeanForUnseen
from mprec.training import MODELS, TrainOptions, evaluate, train_representations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="movielens", help="as mprec train takes it")
    parser.add_argument("--representations", nargs="+", default=MODELS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--k", type=int, default=DheConfig().k)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dataset = data.load(args.data)
    train, _, test = dataset.split(by="time")
    seen = {column.name: torch.from_numpy(column.ids) for column in train.columns}
    new = {
        name: (~torch.isin(torch.from_numpy(test.column(name).ids), ids)).float().mean()
        for name, ids in seen.items()
    }
    for seed in range(args.seeds):
        for name in args.representations:
            trained = train_representations(
                dataset, [name], TrainOptions(seed=seed), split="time", dhe=DheConfig(k=args.k, seed=seed)
            )[name]
            model = trained.model
            answers = {"as is": model.embeddings, "mean": MeanForUnseen(model.embeddings, seen)}
            for answer, embeddings in answers.items():
                model.embeddings = embeddings
                found = evaluate(model, test)
                row = {
                    "data": dataset.name,
                    "split": "time",
                    "representation": name,
                    "seed": seed,
                    "k": args.k,
                    "unseen": answer,
                    "largest_unseen_share": f"{max(new.values()):.4f}",
                    "auc": f"{found.auc:.5f}",
                    "log_loss": f"{found.log_loss:.5f}",
                    "accuracy": f"{found.accuracy:.5f}",
                    "epoch": trained.result.best_epoch,
                }
                harness.append_csv("unseen", [row])
                print(" ".join(str(value) for value in row.values()))


if __name__ == "__main__":
    main()
