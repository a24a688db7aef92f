"""Cached modules are copied, pickled and averaged like others; their layers may be pruned or parametrised."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.utils.prune as prune
from torch.optim.swa_utils import AveragedModel

from mprec.cache import CachedDeepHashEmbeddingBag, CachedEmbeddingBagCollection, Codebook
from mprec.nn import DeepHashEmbeddingBag, DheConfig, EmbeddingBagCollection, FeatureConfig

SMALL = DheConfig(k=16, hidden=(8,))
ROWS = torch.arange(6).view(2, 3)


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save": saved_and_loaded,
    "average": lambda m: AveragedModel(m).module,
    "share": lambda m: copy.deepcopy(m).share_memory(),
}


def modules():
    torch.manual_seed(0)
    yield CachedDeepHashEmbeddingBag(DeepHashEmbeddingBag(4, SMALL), 1 << 14), (ROWS,)
    features = [FeatureConfig("a", 9, 4), FeatureConfig("b", 99, 4, "dhe", dhe=SMALL)]
    collection = EmbeddingBagCollection(features)
    yield CachedEmbeddingBagCollection(collection, 1 << 14), (torch.arange(8), torch.arange(9))


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_copies_answer_alike_and_part_from_then_on(way):
    for module, call in modules():
        module(*call)
        expected = module(*call)
        other = WAYS[way](module)
        torch.testing.assert_close(other(*call), expected)
        torch.testing.assert_close(other(*call), expected)
        assert other.nbytes == module.nbytes > 0
        assert other.stats().calls == 2
        for parameter in other.parameters():
            parameter.add_(1.0)
        assert not torch.allclose(other(*call), expected)
        torch.testing.assert_close(module(*call), expected)
        assert other.fill({name: torch.ones(5) for name in other.stats().features}) if len(call) > 1 else True


@torch.no_grad()
def test_a_codebook_is_copied_while_it_is_of_these_weights():
    bag = DeepHashEmbeddingBag(4, SMALL)
    book = Codebook.fit(bag.materialize(50), max_error=None)
    cached = CachedDeepHashEmbeddingBag(bag, 1 << 14, codebook=book, admit=False)
    coded = cached(ROWS)
    assert torch.equal(copy.deepcopy(cached)(ROWS), coded)
    bag.decoder[0].weight.add_(1.0)
    torch.testing.assert_close(copy.deepcopy(cached)(ROWS), bag(ROWS))


@torch.no_grad()
def test_pruned_layers_are_decoded_without_the_cache():
    for module, call in modules():
        decoder = module if len(call) == 1 else module.dhe["b"]
        layer = decoder.decoder[0]
        before = module(*call)
        prune.l1_unstructured(layer, "weight", amount=0.5)
        out = module(*call)
        assert not torch.allclose(out, before)
        layer.weight_orig.mul_(2.0)  # as a step of an optimizer: the weight follows
        doubled = module(*call)
        assert not torch.allclose(doubled, out)
        prune.remove(layer, "weight")
        torch.testing.assert_close(module(*call), doubled)
        assert module.stats().calls >= 2  # the cache serves again


@torch.no_grad()
def test_parametrised_layers_are_decoded_without_the_cache():
    for module, call in modules():
        decoder = module if len(call) == 1 else module.dhe["b"]
        expected = module(*call)
        torch.nn.utils.parametrizations.weight_norm(decoder.decoder[0])
        torch.testing.assert_close(module(*call), expected)
