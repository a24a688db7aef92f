"""What the decoder stage costs in quality: a click model with deep hash embeddings, its decoders replaced.

``python benchmarks/codebook_quality.py [--data movielens] [--epochs 8] [--centroids] [--no-csv]``

Trains the model, then measures the test split with each feature's decoder, with codes of 1 to 4 bytes for
every ID (and, with ``--centroids``, MP-Rec's published form: the nearest of 256 intermediate values).
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import harness

from mprec import data
from mprec.cache import CodebookEmbeddingBag
from mprec.cache.centroids import CentroidEmbeddingBag
from mprec.nn import DeepHashEmbeddingBag
from mprec.training import TrainOptions, build_model, evaluate, train


class Replaced(nn.Module):
    """A collection whose features are embedded one by one by ``bags``."""

    def __init__(self, features, bags) -> None:
        super().__init__()
        self.features, self.bags = features, bags

    def forward(self, indices: Tensor, offsets: Tensor) -> Tensor:
        batch, parts = (len(offsets) - 1) // len(self.bags), []
        for t, bag in enumerate(self.bags):
            starts = offsets[t * batch : (t + 1) * batch + 1]
            parts.append(bag(indices[starts[0] : starts[-1]], starts - starts[0]))
        return torch.cat(parts, dim=1)


def stages(centroids: bool) -> Iterator[tuple[str, Callable[[DeepHashEmbeddingBag, Tensor], nn.Module]]]:
    for count in (1, 2, 3, 4):
        yield (
            f"codes of {count} B",
            lambda bag, ids, n=count: CodebookEmbeddingBag(bag, ids, stages=n, max_error=None),
        )
    for layer, what in enumerate(("encodings", "hidden layer 1") if centroids else ()):
        yield (
            f"nearest centroid, {what}",
            lambda bag, ids, n=layer: CentroidEmbeddingBag(bag, ids, n, max_error=None),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="movielens", help="as for mprec train")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--centroids", action="store_true", help="the published form too; takes minutes")
    parser.add_argument("--no-csv", action="store_true", help="do not append to results/codebook.csv")
    args = parser.parse_args()

    past, held_out, test = data.load(args.data).split()
    model = build_model(past, "dhe", seed=args.seed)
    train(model, past, held_out, TrainOptions(epochs=args.epochs, batch_size=1024, seed=args.seed))
    exact, collection = evaluate(model, test), model.embeddings
    largest = max(collection.features, key=lambda f: f.num_embeddings)
    print(
        f"{args.data}: AUC {exact.auc:.4f}, log-loss {exact.log_loss:.4f}; largest feature {largest.name!r}"
    )
    found = []
    with torch.no_grad():
        for name, make in stages(args.centroids):
            bags = [
                make(collection.dhe._modules[f.name], torch.arange(f.num_embeddings))
                for f in collection.features
            ]
            model.embeddings = Replaced(collection.features, bags)
            quality = evaluate(model, test)
            errors = {f.name: error_of(bag) for f, bag in zip(collection.features, bags, strict=True)}
            found.append(
                {
                    "data": args.data,
                    "seed": args.seed,
                    "stage": name,
                    "auc": f"{exact.auc:.4f}",
                    "auc_change": f"{quality.auc - exact.auc:+.4f}",
                    "log_loss_change": f"{quality.log_loss - exact.log_loss:+.4f}",
                    "largest_feature": f"{largest.name} ({largest.num_embeddings})",
                    "its_error": f"{errors[largest.name]:.3f}",
                }
            )
    table = Table(*found[0], box=None)
    for line in found:
        table.add_row(*map(str, line.values()))
    Console(width=160 if not sys.stdout.isatty() else None).print(table)
    if not args.no_csv:
        print(f"appended to {harness.append_csv('codebook', found)}")
    return 0


def error_of(bag: nn.Module) -> float:
    return bag.error if isinstance(bag, CentroidEmbeddingBag) else bag.codebook.error


if __name__ == "__main__":
    sys.exit(main())
