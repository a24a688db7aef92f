"""DLRM against the same model written out in float64."""

import copy

import pytest
import torch
from torch import nn

from mprec.models import DLRM
from mprec.nn import DheConfig, FeatureConfig, with_representation

B, D = 5, 4
FEATURES = [FeatureConfig("a", 11, D), FeatureConfig("b", 3, D), FeatureConfig("c", 7, D, mode="mean")]
DHE = DheConfig(k=8, hidden=(6,))


def model(representation="table", num_dense=3):
    torch.manual_seed(0)
    features = with_representation(FEATURES, representation, dhe=DHE, select_largest=1)
    return DLRM(features, num_dense, D, bottom=(8,), top=(9, 5))


def inputs(num_dense=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (3 * B,), generator=generator)
    sizes = torch.tensor([f.num_embeddings for f in FEATURES]).repeat_interleave(B)
    bounds = sizes.repeat_interleave(lengths)
    indices = torch.randint(0, 1 << 30, (int(lengths.sum()),), generator=generator) % bounds
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.randn(B, num_dense, generator=generator), indices, offsets


def reference(m, dense, indices, offsets):
    """Logits [B], one sample and one pair at a time."""
    double = {name: value.double() for name, value in m.state_dict().items()}

    def layers(x, prefix, relu_after_last):
        numbers = sorted(
            int(name.split(".")[1]) for name in double if name.startswith(prefix) and "weight" in name
        )
        for n in numbers:
            x = double[f"{prefix}.{n}.weight"] @ x + double[f"{prefix}.{n}.bias"]
            x = x.relu() if relu_after_last or n != numbers[-1] else x
        return x

    embedded = (
        copy.deepcopy(m.embeddings)(indices, offsets).detach().double()
    )  # a copy: nothing is kept for it
    logits = []
    for b in range(len(dense)):
        first = layers(dense[b].double(), "bottom", True) if m.num_dense else double["constant"]
        vectors = [first, *embedded[b].split(D)]
        products = [vectors[i] @ vectors[j] for i in range(len(vectors)) for j in range(i)]
        logits.append(layers(torch.cat([first, torch.stack(products)]), "top", False))
    return torch.stack(logits).squeeze(1)


@pytest.mark.parametrize("num_dense", [0, 3])
@pytest.mark.parametrize("representation", ["table", "dhe", "select", "hybrid"])
def test_forward(representation, num_dense):
    m = model(representation, num_dense)
    dense, indices, offsets = inputs(num_dense)
    logits = m(dense, indices, offsets)
    assert logits.shape == (B,)
    torch.testing.assert_close(logits.double(), reference(m, dense, indices, offsets), rtol=1e-4, atol=1e-5)


def test_hybrid_contributes_two_vectors_of_every_feature():
    assert model("hybrid").top[0].in_features == D + 7 * 6 // 2
    assert model("table").top[0].in_features == D + 4 * 3 // 2


@pytest.mark.parametrize("representation", ["select", "hybrid"])
def test_every_parameter_learns(representation):
    m = model(representation)
    nn.init.constant_(m.bottom[-2].bias, 1.0)  # no dead ReLU
    dense, indices, offsets = inputs()
    m(dense, indices, offsets).square().sum().backward()
    for name, parameter in m.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("representation", ["table", "dhe", "select", "hybrid"])
def test_config_round_trip(representation):
    m = model(representation)
    again = DLRM.from_config(m.config())
    again.load_state_dict(m.state_dict())
    assert again.config() == m.config()
    assert again.features == m.features
    torch.testing.assert_close(again(*inputs()), m(*inputs()), rtol=0, atol=0)


def test_empty_batch():
    m = model()
    none = torch.zeros(0, dtype=torch.int64)
    assert m(torch.zeros(0, 3), none, torch.zeros(1, dtype=torch.int64)).shape == (0,)


def test_nan_weights_reach_the_logits():
    m = model()
    with torch.no_grad():
        m.top[0].bias[0] = float("nan")
    assert m(*inputs()).isnan().all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="features"):
        DLRM([], 3, D)
    with pytest.raises(ValueError, match="num_dense: expected at least 0, got -1"):
        DLRM(FEATURES, -1, D)
    with pytest.raises(ValueError, match="'a' has embedding_dim 4; the interaction needs 8"):
        DLRM(FEATURES, 3, 8)
    dense, indices, offsets = inputs()
    with pytest.raises(ValueError, match=r"dense: expected \[B, 3\], got \[5, 2\]"):
        model()(dense[:, :2], indices, offsets)
    with pytest.raises(ValueError, match="dense has 4 rows, the bags make 5"):
        model()(dense[:4], indices, offsets)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_a_step_is_seen_by_the_next_forward(optimizer, fused):
    """Kernels keep packed copies of decoders; torch's fused optimizers raise no version counter."""
    m = model("dhe")
    batch = inputs()
    with torch.no_grad():
        m(*batch)
    m(*batch).square().sum().backward()
    optimizer(m.parameters(), lr=0.1, fused=fused).step()
    with torch.no_grad():
        torch.testing.assert_close(m(*batch).double(), reference(m, *batch), rtol=1e-4, atol=1e-5)


def test_interaction_cat():
    """Facebook's option: the top MLP sees the vectors themselves, the bottom's first."""
    torch.manual_seed(0)
    features = [FeatureConfig("a", 5, 4), FeatureConfig("b", 7, 4)]
    model = DLRM(features, 3, 4, (6,), (8,), interaction="cat").eval()
    assert model.top[0].in_features == 3 * 4
    dense, indices, offsets = torch.randn(2, 3), torch.tensor([1, 4, 0, 6]), torch.arange(5)
    tables = model.embeddings.tables
    vectors = [model.bottom(dense), tables["a"].weight[[1, 4]], tables["b"].weight[[0, 6]]]
    torch.testing.assert_close(model(dense, indices, offsets), model.top(torch.cat(vectors, 1)).squeeze(1))
    twin = DLRM.from_config(model.config())
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(dense, indices, offsets), model(dense, indices, offsets))
    assert "interaction" not in DLRM(features, 3, 4).config()  # as those of older checkpoints
    with pytest.raises(ValueError, match="interaction: expected 'dot' or 'cat', got 'sum'"):
        DLRM(features, 3, 4, interaction="sum")
