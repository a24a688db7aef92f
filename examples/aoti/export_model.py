"""A DLRM as a package for examples/aoti/main.cpp, and batches to score:

    python export_model.py FOLDER

writes model.pt2 there, and for some batch sizes inputs{size}.pt, a tuple of tensors, and scores{size}.pt,
what the model gives in Python. The package takes batches of any size. In Python it needs mprec, elsewhere
libmprec_ops.so.
"""

import sys
from pathlib import Path

import torch
from torch.export import Dim

from mprec import nn
from mprec.models import DLRM

SIZES = 1, 7, 200
TABLES = nn.FeatureConfig("country", 200, 16), nn.FeatureConfig("shop", 50_000, 16)
HASHED = nn.FeatureConfig("item", 10_000_000, 16, "dhe", dhe=nn.DheConfig(k=128, hidden=(64,)))


def model() -> DLRM:
    torch.manual_seed(0)
    return DLRM([*TABLES, HASHED], num_dense=4, embedding_dim=16, bottom=(64,), top=(64,)).eval()


def batch(size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dense numbers, IDs and offsets of ``size`` samples; bags of none to three IDs."""
    g = torch.Generator().manual_seed(seed)
    features = [*TABLES, HASHED]
    lengths = torch.randint(0, 4, (len(features), size), generator=g)
    ids = [
        torch.randint(0, f.num_embeddings, (int(n.sum()),), generator=g)
        for f, n in zip(features, lengths, strict=True)
    ]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    return torch.randn(size, 4, generator=g), torch.cat(ids), offsets


def main(folder: Path) -> None:
    dlrm = model()
    with torch.no_grad():
        program = torch.export.export(dlrm, batch(8), dynamic_shapes=({0: Dim.DYNAMIC},) * 3)
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
        for size in SIZES:
            inputs = batch(size, seed=size)
            torch.save(inputs, folder / f"inputs{size}.pt")
            torch.save(dlrm(*inputs), folder / f"scores{size}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
