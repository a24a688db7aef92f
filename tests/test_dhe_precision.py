"""float16, bfloat16, int8 and look-up-table decoders against float64 arithmetic on the weights they store."""

import math

import pytest
import torch
from dhe_net import (
    ACTIVATE,
    ACTIVATIONS,
    FAMILIES,
    Net,
    assert_close,
    decode_reference,
    hash_reference,
    pool_reference,
    unit_reference,
)

from mprec._native import _C
from mprec.testing import isa, runnable_isas

torch.set_num_threads(1)


@pytest.fixture(params=runnable_isas(), autouse=True)
def each_isa(request):
    with isa(request.param):
        yield request.param


def quantised_first_layer(net: Net, precision: str):
    """The first layer's weights as the precision stores them, and its inputs, both float64."""
    w, family = net.weights[0].double(), net.family
    if precision == "float16":
        return w.half().double(), lambda h: unit_reference(h, family).double()
    if precision == "int8":
        step = w.abs().amax(1, keepdim=True) / 127
        w = (w / torch.where(step > 0, step, 1)).round() * step
        return w, lambda h: (2.0 * (h >> 24) - 127) / (127 if family == "u7" else 128)
    raise ValueError(precision)


def make_precise(net: Net, precision: str):
    return _C.Decoder(
        net.coefficients,
        net.weights,
        net.biases,
        FAMILIES[net.family],
        ACTIVATIONS[net.activation],
        ACTIVATIONS[net.last],
        precision,
    )


PRECISE = [("float16", f) for f in FAMILIES] + [("int8", "universal"), ("int8", "u7")]
SHAPES = [(1024, 128, 16), (1100, 200, 30), (20, 7), (2, 1, 3, 1), (530, 33, 17), (4400, 20, 8)]


@pytest.mark.parametrize(("precision", "family"), PRECISE)
@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("n", [1, 23])
def test_precision(precision, family, dims, n):
    """Against float64 arithmetic on the same stored weights: what is left is float32's rounding."""
    net = Net(dims, family, last="none")
    ids = torch.randint(0, 2**33, (n,), generator=torch.Generator().manual_seed(1))
    out = torch.full((n, dims[-1]), math.nan)
    _C.dhe_bag(make_precise(net, precision), ids, torch.arange(n), None, 0, False, -1, out, 1)
    w, unit = quantised_first_layer(net, precision)
    h = torch.tensor(hash_reference(net.coefficients, ids.tolist(), family)).reshape(n, -1)
    weights = [w, *net.weights[1:]]
    if precision == "float16":
        weights = [weight.half() for weight in net.weights]
    expected = decode_reference(unit(h), weights, net.biases, net.activation, net.last)
    if precision == "int8":  # a weight halfway between two steps may be rounded either way
        assert ((out - expected).abs() < 2e-3 * expected.abs().amax() + 1e-4).all()
        assert (out - expected).abs().mean() < 2e-5 * max(1.0, expected.abs().mean())
    else:
        assert_close(out, expected)


def bfloat16(x):
    return x.float().bfloat16().double()


def round_and_decode(net: Net, ids):
    """Weights and every layer's inputs rounded to bfloat16; the rest in float64."""
    h = torch.tensor(hash_reference(net.coefficients, ids.tolist(), net.family)).reshape(len(ids), -1)
    y = unit_reference(h, net.family)
    for i, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        y = bfloat16(y) @ bfloat16(weight).T + bias.double()
        y = ACTIVATE[net.last if i == len(net.weights) - 1 else net.activation](y)
    return y


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("n", [1, 23])
def test_bfloat16(family, dims, n):
    net = Net(dims, family, last="none")
    ids = torch.randint(0, 2**33, (n,), generator=torch.Generator().manual_seed(1))
    out = torch.full((n, dims[-1]), math.nan)
    _C.dhe_bag(make_precise(net, "bfloat16"), ids, torch.arange(n), None, 0, False, -1, out, 1)
    expected = round_and_decode(net, ids)
    if (
        len(dims) == 2 and family != "artifact_gaussian"
    ):  # inputs are the same bits: float32's rounding is left
        assert_close(out, expected)
    else:  # an input between two bfloat16 numbers may be rounded either way
        error, scale = (out - expected).abs(), 1 + expected.abs().amax()
        assert error.amax() < 8e-3 * scale
        assert error.mean() < 5e-4 * scale
    assert (out - net.vectors(ids)).abs().amax() > 0  # the precision is in effect


@pytest.mark.parametrize("dims", [*SHAPES, (7, 65, 3), (2100, 64, 4)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_look_up_tables(dims, activation):
    """Each entry of a table is off by at most half a step, so each output by at most groups of them."""
    net = Net((dims[0], dims[1]), "sign", last=activation)
    n = 9
    ids = torch.randint(0, 2**62, (n,), generator=torch.Generator().manual_seed(1))
    out = torch.full((n, dims[1]), math.nan)
    _C.dhe_bag(make_precise(net, "lut"), ids, torch.arange(n), None, 0, False, -1, out, 1)
    w = torch.nn.functional.pad(net.weights[0].double(), (0, -dims[0] % 4)).reshape(dims[1], -1, 4)
    step = 2 * w.abs().sum(2).amax(1) / 255 / math.sqrt(3)
    groups = w.shape[1]
    # The half steps add up like a random walk, of standard deviation step / sqrt(12): six of them.
    bound = (step / math.sqrt(12) * math.sqrt(groups) * 6).clamp(max=step.max() / 2 * groups) + 1e-4
    expected = net.vectors(ids)
    assert ((out - expected).abs() <= bound * 1.1).all()
    # The rest of the network runs in float32 as ever.
    deep = Net(dims, "sign")
    out = torch.full((n, dims[-1]), math.nan)
    _C.dhe_bag(make_precise(deep, "lut"), ids, torch.arange(n), None, 0, False, -1, out, 1)
    assert ((out - deep.vectors(ids)).abs() < 0.1).all()


@pytest.mark.parametrize(("precision", "family"), [("float16", "artifact"), ("int8", "u7"), ("lut", "sign")])
def test_precision_in_bags_with_duplicates_and_many_ids(precision, family):
    net = Net((140, 48, 12), family)
    handle = make_precise(net, precision)
    ids = torch.randint(0, 150, (700,), generator=torch.Generator().manual_seed(1))
    offsets = torch.arange(0, 701, 7)
    expected = torch.full((100, 12), math.nan)
    _C.dhe_bag(handle, ids, offsets, None, 0, True, -1, expected, 1, False)
    for threads in (1, 2):
        out = torch.full((100, 12), math.nan)
        _C.dhe_bag(handle, ids, offsets, None, 0, True, -1, out, threads, True)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    exact = pool_reference(net.vectors(ids), ids.tolist(), offsets.tolist(), 0, None, -1)
    assert ((expected - exact).abs() < 0.3).all()


def test_quantised_weights_that_are_not_finite_give_nan():
    for precision, family in (("int8", "u7"), ("lut", "sign")):
        net = Net((32, 24), family, last="relu")
        net.weights[0][3, 5] = math.nan
        out = torch.zeros(2, 24)
        _C.dhe_bag(
            make_precise(net, precision), torch.tensor([1, 2]), torch.arange(2), None, 0, False, -1, out, 1
        )
        assert out[:, 3].isnan().all()
        assert out.isnan().sum() == 2


def test_bad_precisions():
    with pytest.raises(ValueError, match="none of float32"):
        make_precise(Net((8, 4)), "float8")
    with pytest.raises(ValueError, match="int8 is not for hash family"):
        make_precise(Net((8, 4), "artifact"), "int8")
    with pytest.raises(ValueError, match="lut is not for hash family universal"):
        make_precise(Net((8, 4)), "lut")
    net = Net((8, 4))
    net.weights[0][1, 1] = 1e5
    with pytest.raises(ValueError, match=r"weights\[0\].*65504"):
        make_precise(net, "float16")
