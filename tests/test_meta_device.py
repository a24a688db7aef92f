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
