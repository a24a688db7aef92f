"""Layers that do more than their weights say are called: hooks, adapters, quantised layers."""

import copy
import itertools

import pytest
import torch
from torch import nn

from mprec import ops, reference
from mprec.errors import PathCompileError
from mprec.layers import run_as_modules
from mprec.models import DLRM, compile_path
from mprec.names import MODES
from mprec.nn import MLP, DeepHashEmbeddingBag, DheConfig, EmbeddingBagCollection, FeatureConfig

IDS, OFFSETS = torch.tensor([1, 2, 3, 2, 5, 7]), torch.tensor([0, 2, 2, 5])
WEIGHTS = torch.tensor([0.5, 2.0, -1.0, 0.25, 3.0, 1.0])
CONFIG = DheConfig(k=8, hidden=(6,), activation="mish")


class Adapter(nn.Module):
    """As libraries of adapters have it: in the layer's place, with its ``weight``."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.more = layer, nn.Linear(layer.in_features, layer.out_features, bias=False)

    @property
    def weight(self):
        return self.layer.weight

    @property
    def bias(self):
        return self.layer.bias

    def forward(self, x):
        return self.layer(x) + self.more(x)


def adapt(layers):
    layers[0] = Adapter(layers[0])


def without_bias(layers):
    layers[-1].bias = None


def own_forward(layers):
    layers[0].forward = lambda x: x.new_ones(len(x), layers[0].out_features)


CHANGES = {
    "adapter": adapt,
    "no bias": without_bias,
    "own forward": own_forward,
    "one more layer": lambda layers: layers.append(nn.Tanh()),
    "forward hook": lambda layers: layers[0].register_forward_hook(lambda m, i, o: 2 * o),
    "pre-hook": lambda layers: layers[1].register_forward_pre_hook(lambda m, i: (i[0] - 1,)),
}


def dhe(mode="sum", **options):
    torch.manual_seed(0)
    return DeepHashEmbeddingBag(4, CONFIG, mode, **options)


def collection():
    torch.manual_seed(0)
    features = [FeatureConfig(name, 50, 4, representation="dhe", dhe=CONFIG) for name in "ab"]
    return EmbeddingBagCollection([*features, FeatureConfig("c", 50, 4)])


def called(module, ids):
    """The vectors of IDs, in float64."""
    layers = copy.deepcopy(module.decoder).double()
    c = module.config
    x = reference.encode(module.coefficients, ids, c.family).double()
    for i, layer in enumerate(layers, 1):
        x = reference.activate(layer(x), c.last_activation if i == len(layers) else c.activation)
    return x


def pooled(vectors, ends, mode, weights=None):
    rows = vectors if weights is None else vectors * weights[:, None]
    bags = [rows[a:b] for a, b in itertools.pairwise(ends)]
    pool = {"sum": lambda x: x.sum(0), "mean": lambda x: x.mean(0), "max": lambda x: x.amax(0)}[mode]
    return torch.stack([pool(bag) if len(bag) else vectors.new_zeros(vectors.shape[1]) for bag in bags])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_layers_are_called(change, mode, weighted):
    if weighted and mode == "max":
        pytest.skip("weights are for sums and means")
    module, weights = dhe(mode), WEIGHTS if weighted else None
    with torch.no_grad():
        before = module(IDS, OFFSETS, weights)  # packed
    CHANGES[change](module.decoder)
    expected = pooled(called(module, IDS), [0, 2, 2, 5, 6], mode, weights).float()
    assert not torch.allclose(expected, before)
    with torch.no_grad():
        torch.testing.assert_close(module(IDS, OFFSETS, weights), expected)
    torch.testing.assert_close(module(IDS, OFFSETS.int(), weights), expected)
    torch.testing.assert_close(module.materialize(8), called(module, torch.arange(8)).float().detach())
    with pytest.raises(TypeError, match="decoder: expected nn"):
        module.stack()


def test_padding_is_left_out_and_bounds_are_kept():
    module = dhe(padding_idx=2, num_embeddings=8)
    expected = module(IDS, OFFSETS).detach()
    module.decoder[0].register_forward_hook(lambda m, i, o: o)
    torch.testing.assert_close(module(IDS, OFFSETS), expected)
    for bad in (8, -1):
        with pytest.raises(IndexError):
            module(torch.tensor([bad]), torch.tensor([0]))
    with pytest.raises(ValueError, match="offsets"):
        module(IDS, torch.tensor([0, 9]))


def test_an_adapter_alone_is_trained():
    module = dhe().requires_grad_(False)
    adapt(module.decoder)
    module.decoder[0].layer.requires_grad_(False)
    module(IDS, OFFSETS).sum().backward()
    assert module.decoder[0].more.weight.grad.abs().sum() > 0
    assert module.decoder[0].layer.weight.grad is None


def test_a_hook_is_run_until_it_is_removed():
    module, seen = dhe(), []
    with torch.no_grad():
        before = module(IDS, OFFSETS)
        handle = module.decoder[1].register_forward_hook(lambda m, i, o: seen.append(len(o)))
        torch.testing.assert_close(module(IDS, OFFSETS), before)
        handle.remove()
        torch.testing.assert_close(module(IDS, OFFSETS), before)
    assert seen == [6]


@pytest.mark.parametrize("change", CHANGES)
def test_collections_call_changed_layers(change):
    module = collection()
    indices, offsets = torch.cat([IDS, IDS + 1, IDS + 2]), torch.arange(0, 19, 3)
    with torch.no_grad():
        before = module(indices, offsets)
    CHANGES[change](module.dhe["b"].decoder)
    expected = before.clone()
    expected[:, 4:8] = pooled(called(module.dhe["b"], IDS + 1), [0, 3, 6], "sum").float()
    with torch.no_grad():
        torch.testing.assert_close(module(indices, offsets), expected)
    torch.testing.assert_close(module(indices, offsets), expected)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_layers_of_an_mlp_are_called(change):
    torch.manual_seed(0)
    module, x = MLP([5, 7, 3], "relu", "sigmoid"), torch.randn(6, 5)
    before = module(x)
    CHANGES[change](module.layers)
    out = x
    for i, layer in enumerate(module.layers, 1):
        out = reference.activate(layer(out), "sigmoid" if i == len(module.layers) else "relu")
    torch.testing.assert_close(module(x), out)
    assert not torch.allclose(out, before)


def test_quantised_layers_are_called():
    """What ``torch.ao`` puts in the place of linear layers has no weight to read."""
    module, plain = dhe(), dhe()
    torch.ao.quantization.quantize_dynamic(module, {nn.Linear}, inplace=True)
    with torch.no_grad():
        torch.testing.assert_close(module(IDS, OFFSETS), plain(IDS, OFFSETS), atol=0.05, rtol=0)


@pytest.mark.parametrize("change", ["adapter", "own forward", "forward hook"])
def test_compiled_paths_refuse_changed_layers_also_later(change):
    torch.manual_seed(0)
    model = DLRM([FeatureConfig("a", 50, 4, representation="dhe", dhe=CONFIG)], 2, 4, (8,), (8,)).eval()
    path, arguments = compile_path(model), (torch.randn(6, 2), IDS, torch.arange(7))
    before = path(*arguments)
    CHANGES[change](model.embeddings.dhe["a"].decoder)
    with torch.no_grad():
        expected = torch.sigmoid(model(*arguments))
        torch.testing.assert_close(path(*arguments), expected)
    assert not torch.allclose(expected, before)
    with pytest.raises(PathCompileError, match="decoder"):
        compile_path(model)


def test_torchs_own_hooks_are_no_reason_to_call():
    module = dhe()
    nn.utils.weight_norm(module.decoder[0])
    assert not run_as_modules(module.decoder)
    assert ops.dhe_bag(IDS, OFFSETS, *module.stack()).shape == (4, 4)
