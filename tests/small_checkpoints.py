"""Checkpoints of small untrained models, and what these models say of rows, computed sample by sample."""

import torch

from mprec import checkpoint
from mprec.models import DLRM
from mprec.nn import DheConfig, FeatureConfig, with_representation

VOCABULARIES, NAMES, NUM_DENSE = [50, 7], ["item", "day"], 2
QUALITY = {"table": 0.70, "hybrid": 0.72}


def save(folder, representation, num_dense=NUM_DENSE, vocabularies=VOCABULARIES):
    """A checkpoint file of random weights."""
    torch.manual_seed(len(representation))
    features = [FeatureConfig(name, size, 4) for name, size in zip(NAMES, vocabularies, strict=True)]
    features = with_representation(features, representation, dhe=DheConfig(k=8, hidden=(6,)))
    model = DLRM(features, num_dense, 4, bottom=(3,), top=(4,))
    quality = {"accuracy": QUALITY[representation], "auc": 1 - QUALITY[representation]}
    file = folder / f"{representation}.pt"
    checkpoint.save(file, model, {"representation": representation, "metrics": {"valid": quality}})
    return file


@torch.no_grad()
def expected(file, ids, dense):
    """Scores of rows of bags: ``ids[b][t]`` is a list."""
    model, _ = checkpoint.load(file)
    scores = []
    for bags, numbers in zip(ids, dense, strict=True):
        indices = torch.tensor([value for bag in bags for value in bag], dtype=torch.int64)
        offsets = torch.tensor([0, *(len(bag) for bag in bags)]).cumsum(0)
        scores.append(float(model(torch.tensor([numbers]), indices, offsets).sigmoid()))
    return scores
