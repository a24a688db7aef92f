"""Packed decoders after writes to weights that raise no version counter: what is seen, and when."""

import copy

import numpy as np
import pytest
import torch

from mprec import cache, ops
from mprec.nn import DeepHashEmbeddingBag, DheConfig, EmbeddingBagCollection, FeatureConfig

SMALL = DheConfig(k=16, hidden=(8,))
ROWS = torch.arange(6).view(2, 3)

WRITES = {
    "data": lambda t, at, x: t.data.view(-1).__setitem__(at, x),
    "numpy": lambda t, at, x: t.detach().numpy().reshape(-1).__setitem__(at, x),
    "dlpack": lambda t, at, x: np.from_dlpack(t.detach()).reshape(-1).__setitem__(at, x),
}


def fresh(module, *call):
    with torch.no_grad():
        return copy.deepcopy(module)(*call)


@torch.no_grad()
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("family", ["universal", "sign"])
def test_any_write_to_a_small_decoder_is_seen_at_once(write, family):
    """All its tensors are read at each call, whatever element is written."""
    torch.manual_seed(0)
    config = DheConfig(k=16, hidden=(8,), family=family)
    module = DeepHashEmbeddingBag(4, config)
    module(ROWS)
    for layer in module.decoder:
        for tensor in (layer.weight, layer.bias):
            for at in range(tensor.numel()):
                WRITES[write](tensor, at, 5.0 + at)
                assert torch.equal(module(ROWS), fresh(module, ROWS)), (tensor.shape, at)
    WRITES[write](module.coefficients, 3, 12345)
    assert torch.equal(module(ROWS), fresh(module, ROWS))


@torch.no_grad()
def test_two_numbers_that_change_places_are_seen():
    module = DeepHashEmbeddingBag(4, SMALL)
    module(ROWS)
    weight = module.decoder[0].weight.data
    weight[3, 7], weight[3, 11] = weight[3, 11].clone(), weight[3, 7].clone()
    assert torch.equal(module(ROWS), fresh(module, ROWS))


@torch.no_grad()
def test_a_pruned_unit_is_seen_at_once():
    torch.manual_seed(0)
    module = DeepHashEmbeddingBag(16, DheConfig())
    module(ROWS)
    module.decoder[0].weight.data[17].zero_()
    module.decoder[0].bias.data[17] = 0
    assert torch.equal(module(ROWS), fresh(module, ROWS))


def large():
    """As large as by default; the one element written is out of what short tensors show."""
    torch.manual_seed(0)
    return DeepHashEmbeddingBag(16, DheConfig())


@torch.no_grad()
@pytest.mark.parametrize("ids", [1, 6, 100])
def test_one_number_of_a_large_decoder_is_seen_within_2048_ids(ids):
    module, x = large(), torch.arange(ids)[:, None]
    module(x)
    module.decoder[0].weight.data[77, 777] = 9.0
    expected = fresh(module, x)
    calls = 0
    while not torch.equal(module(x), expected):
        calls += 1
        assert calls * (1 + ids) <= 2048 + 1 + ids


@torch.no_grad()
def test_a_call_of_many_ids_sees_it_at_once():
    module, x = large(), torch.arange(2048)[:, None]
    module(x)
    module.decoder[0].weight.data[77, 777] = 9.0
    assert torch.equal(module(x), fresh(module, x))


@torch.no_grad()
@pytest.mark.parametrize("how", ["module", "collection", "ops", "cache"])
def test_invalidate_is_at_once(how):
    if how == "collection":
        module = EmbeddingBagCollection([FeatureConfig("a", 99, 16, "dhe")])
        decoder, call = module.dhe["a"], (torch.arange(6), torch.arange(7))
        invalidate = module.invalidate
    else:
        module, call = large(), (ROWS,)
        decoder, invalidate = module, module.invalidate
        if how == "ops":
            invalidate = ops.clear_decoders
        if how == "cache":
            module = cache.CachedDeepHashEmbeddingBag(decoder, 1 << 14)
            invalidate = module.invalidate
    module(*call)
    module(*call)
    decoder.decoder[0].weight.data[77, 777] = 9.0
    invalidate()
    torch.testing.assert_close(module(*call), fresh(decoder if how == "cache" else module, *call))


@torch.no_grad()
def test_rows_of_a_cache_go_with_the_weights_they_were_made_with():
    torch.manual_seed(0)
    decoder = DeepHashEmbeddingBag(4, SMALL)
    cached = cache.CachedDeepHashEmbeddingBag(decoder, 1 << 14)
    cached(ROWS)
    cached(ROWS)
    decoder.decoder[1].weight.data.view(-1)[5] = 9.0
    torch.testing.assert_close(cached(ROWS), fresh(decoder, ROWS))


def test_a_backward_pass_compares_all_bytes():
    module = large()
    with torch.no_grad():
        module(ROWS)
    module.decoder[1].weight.data[3, 77] = 9.0
    module(ROWS).square().sum().backward()
    other = copy.deepcopy(module)
    for p in other.parameters():
        p.grad = None
    other(ROWS).square().sum().backward()
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@torch.no_grad()
def test_one_number_of_a_collections_decoder_is_seen_within_2048_ids_of_its_feature():
    torch.manual_seed(0)
    module = EmbeddingBagCollection([FeatureConfig(name, 99, 16, "dhe") for name in "abc"])
    call = (torch.arange(3 * 50) % 99, torch.arange(3 * 50 + 1))
    before = module(*call)
    module.dhe["b"].decoder[0].weight.data[77, 777] = 9.0
    calls = 1
    while torch.equal(module(*call), before):
        calls += 1
        assert calls * (1 + 50) <= 2048 + 1 + 50
