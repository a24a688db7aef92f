"""Modules made on the meta device: hash functions, pairs and mixings are right, whatever lay in memory."""

import copy

import pytest
import torch

from mprec import nn
from mprec.models import DLRM, MultiPathDLRM
from mprec.nn import DheConfig, FeatureConfig, with_representation

DHE = DheConfig(k=8, hidden=(4,), seed=3)
FEATURES = [FeatureConfig("a", 20, 4), FeatureConfig("b", 9, 4)]

MAKERS = {
    "dlrm, both": lambda: DLRM(with_representation(FEATURES, "hybrid", DHE), 2, 4, (8,), (8,)),
    "dlrm, mean": lambda: DLRM(with_representation(FEATURES, "hybrid", DHE), 2, 4, (8,), (8,), hybrid="mean"),
    "dlrm, no dense": lambda: DLRM(with_representation(FEATURES, "dhe", DHE), 0, 4, (8,), (8,)),
    "multi-path": lambda: MultiPathDLRM(with_representation(FEATURES, "hybrid", DHE), 2, 4, (8,), (8,)),
    "hybrid bag": lambda: nn.HybridEmbeddingBag(20, 4, DHE),
    "dhe": lambda: nn.DeepHashEmbedding(20, 4, DHE),
}


def dirty(module):
    """Memory as to_empty may find it."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.fill_(77)
    return module


@pytest.mark.parametrize("name", MAKERS)
def test_reset_after_to_empty(name):
    expected = MAKERS[name]()
    with torch.device("meta"):
        module = MAKERS[name]()
    assert all(t.is_meta for t in (*module.parameters(), *module.buffers()))
    module.to_empty(device="cpu")
    check_buffers(module, expected)
    dirty(module)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    check_buffers(module, expected)
    assert not any((p == 77).any() for p in module.parameters())
    assert all(p.isfinite().all() for p in module.parameters())


def low_rank():
    g = torch.Generator().manual_seed(1)
    tables = {
        f.name: nn.LowRankTable(
            *(torch.randn(*s, generator=g) for s in ((f.num_embeddings, 2), (2, 4), (4,)))
        )
        for f in FEATURES
    }
    with torch.device("cpu"):
        return nn.LowRankEmbeddingBagCollection(FEATURES, tables)


SERVING = {
    "means": lambda: nn.MeanForUnseen(
        nn.EmbeddingBagCollection([FeatureConfig("a", 20, 4, mode="mean"), FeatureConfig("b", 9, 4)]),
        {"a": torch.tensor([1, 5], device="cpu"), "b": [3]},
    ),
    "means, hybrid": lambda: nn.MeanForUnseen(
        nn.EmbeddingBagCollection(with_representation(FEATURES, "hybrid", DHE)), {"a": [0, 1, 2]}
    ),
    "low-rank codes": low_rank,
}


@pytest.mark.parametrize("name", SERVING)
@pytest.mark.parametrize("way", ["moved", "made there"])
def test_modules_for_serving_after_to_empty(name, way):
    """What no state_dict has, is right whatever lay in memory."""
    expected = SERVING[name]().eval()
    if way == "moved" or name == "low-rank codes":
        module = copy.deepcopy(expected).to("meta")
    else:
        with torch.device("meta"):
            module = SERVING[name]()
    assert all(t.is_meta for t in (*module.parameters(), *module.buffers()))
    assert repr(module)
    dirty(module.to_empty(device="cpu"))
    module.to("meta").to_empty(device="cpu")
    module.eval().load_state_dict(expected.state_dict())
    check_buffers(module, expected)
    batch = torch.tensor([1, 2, 19, 8, 0, 3]), torch.tensor([0, 2, 3, 3, 4, 5, 6])
    assert torch.equal(module(*batch), expected(*batch))


@pytest.mark.parametrize("name", SERVING)
def test_modules_for_serving_infer_shapes(name):
    module = SERVING[name]().eval()
    batch = torch.tensor([1, 2, 19, 8, 0, 3]), torch.tensor([0, 2, 3, 3, 4, 5, 6])
    expected = module(*batch)
    out = module.to("meta")(*(tensor.to("meta") for tensor in batch))
    assert (out.shape, out.dtype, out.device.type) == (expected.shape, expected.dtype, "meta")


def test_codes_of_low_rank_are_made_without_memory():
    with torch.device("meta"):
        module = nn.LowRankEmbeddingBagCollection(FEATURES, rank=2)
    expected = low_rank()
    module.to_empty(device="cpu").load_state_dict(expected.state_dict())
    batch = torch.tensor([1, 2, 19, 8, 0, 3]), torch.arange(7)
    assert torch.equal(module(*batch), expected(*batch))


@pytest.mark.parametrize("name", MAKERS)
def test_load_after_to_empty(name):
    expected = MAKERS[name]().eval()
    module = copy.deepcopy(expected).to("meta").to_empty(device="cpu")
    module.load_state_dict(expected.state_dict())
    check_buffers(module, expected)
    if name.startswith(("dlrm", "multi")):
        batch = torch.randn(3, expected.num_dense), torch.tensor([1, 2, 19, 8, 0, 3]), torch.arange(7)
        assert torch.equal(module(*batch), expected(*batch))


def check_buffers(module, expected):
    theirs = dict(expected.named_buffers())
    assert theirs
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, theirs[name]), name
