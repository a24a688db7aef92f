"""Hash family u8: 256 levels, the high eight bits of the universal hash."""

import pytest
import torch

from mprec import reference
from mprec.hashing import check_family, coefficients
from mprec.nn import (
    DeepHashEmbeddingBag,
    DheConfig,
    EmbeddingBagCollection,
    FeatureConfig,
    QuantizedEmbeddingBagCollection,
)
from mprec.ops import hash_encode
from mprec.testing import isa, runnable_isas


@pytest.mark.parametrize("name", runnable_isas())
def test_levels_by_hand(name):
    """h = (a x + b) mod p; level h >> 23; u = (2 level - 255) / 255."""
    hashes = coefficients(16, "u8", seed=5)
    ids = torch.tensor([0, 1, 77, 2**30 - 1])
    expected = []
    for x in ids.tolist():
        h = [(a * x + b) % (2**31 - 1) for a, b in zip(*hashes[:2].tolist(), strict=True)]
        expected.append([(2 * (value >> 23) - 255) / 255 for value in h])
    with isa(name):
        out = hash_encode(hashes, ids, "u8")
    assert torch.equal(out, torch.tensor(expected, dtype=torch.float64).to(torch.float32))
    assert check_family("u8", 16).level_bits == 8


def test_a_decoder_of_it():
    config = DheConfig(k=64, hidden=(16,), family="u8")
    bag = DeepHashEmbeddingBag(8, config, mode="mean")
    ids, offsets = torch.randint(2**40, (50,)), torch.arange(0, 50, 5)
    expected = reference.dhe_bag(ids, offsets, *bag.stack(), "u8", mode=1)
    with torch.no_grad():
        torch.testing.assert_close(bag(ids, offsets).double(), expected, rtol=1e-5, atol=1e-5)
    bag(ids, offsets).square().sum().backward()
    assert all(bool(parameter.grad.any()) for parameter in bag.parameters())


def test_what_needs_seven_bits_is_refused():
    collection = EmbeddingBagCollection([FeatureConfig("a", 9, 8, "dhe", DheConfig(k=16, family="u8"))])
    with pytest.raises(ValueError, match="int8 is for hash families universal, u7, got u8"):
        QuantizedEmbeddingBagCollection(collection, decoders="int8")
