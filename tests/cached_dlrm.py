"""DLRMs with row caches before their decoders, and batches whose IDs come again."""

import torch

from mprec.cache import CachedEmbeddingBagCollection, Codebook
from mprec.models import DLRM
from mprec.nn import DheConfig, FeatureConfig

DHE, SIGN = DheConfig(k=24, hidden=(16,)), DheConfig(k=16, hidden=(), family="sign")
DIM = 16


def plain(hybrid="both", **options):
    torch.manual_seed(0)
    features = [
        FeatureConfig("city", 500, DIM, "dhe", DHE),
        FeatureConfig("tag", 50, DIM, mode="max"),
        FeatureConfig("item", 3000, DIM, "hybrid", DHE),
        FeatureConfig("words", 800, DIM, "dhe", DHE, mode="mean"),
        FeatureConfig("user", 3000, DIM, "dhe", SIGN, mode="max"),
    ]
    return DLRM(features, 5, DIM, (24,), (32,), hybrid, **options).eval()


def make(nbytes=60_000, hybrid="both", **options):
    model = plain(hybrid)
    model.embeddings = CachedEmbeddingBagCollection(model.embeddings, nbytes, **options)
    return model


def books(model, stages=4, share=0.5, names=("city", "item")):
    """Of the first IDs of these features."""
    found = {}
    for f in model.embeddings.features:
        if f.name in names:
            rows = model.embeddings.dhe[f.name].materialize(int(f.num_embeddings * share))
            found[f.name] = Codebook.fit(rows, stages, max_error=None)
    return found


def batch(model, samples, longest=3, seed=0, dtype=torch.int64):
    """Skewed, so that some IDs come again and again."""
    g = torch.Generator().manual_seed(seed + samples)
    found = model.embeddings.features
    lengths = torch.randint(0, longest + 1, (len(found), samples), generator=g)
    if longest == 1:
        lengths.fill_(1)
    ids = [
        (torch.rand(n, generator=g) ** 4 * f.num_embeddings).long()
        for f, n in zip(found, lengths.sum(1).tolist(), strict=True)
    ]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    return torch.randn(samples, model.num_dense, generator=g), torch.cat(ids).to(dtype), offsets.to(dtype)


def counts(stats):
    """All that is counted, without the times."""
    return stats.features, stats.calls, stats.coded, stats.decoded
