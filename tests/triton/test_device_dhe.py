"""Deep hash embeddings on the device against float64 torch, the encodings taken from the device itself."""

import pytest
import torch
from mprec.triton_kernels import dhe, tuning
from mprec.triton_kernels.dhe import dhe_forward
from mprec.triton_kernels.hashing import hash_encode
from test_device_hashing import coefficients_of

from mprec import reference

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "mish": torch.nn.functional.mish,
}
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def decoder(k, widths, dtype, device):
    weights, biases = [], []
    for out in widths:
        weights.append((torch.randn(out, k) / k**0.5).to(dtype).to(device))
        biases.append((torch.randn(out) * 0.1).to(dtype).to(device))
        k = out
    return weights, biases


def expected(ids, c, weights, biases, family, activation, last_activation):
    """float64, but with every layer's input rounded to the weights' type, as the kernels do."""
    x = hash_encode(ids, c, family)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = x.to(weight.dtype).double() @ weight.double().T + bias.double()
        x = ACTIVATIONS[last_activation if layer == len(weights) - 1 else activation](x)
    return x


def decoder_in_float8(k, widths, device):
    """Weights in float8, and [scales, biases] of each layer."""
    weights, affines = [], []
    for out in widths:
        weights.append(reference.float8(torch.randn(out, k) * 60).to(device))
        affines.append(torch.stack([(1 + torch.rand(out)) / 120 / k**0.5, torch.randn(out) / 10]).to(device))
        k = out
    return weights, affines


def assert_close_but_for_steps(got, want):
    """A hidden value differs where float32 and float64 fall on two sides of a step between float8 numbers."""
    error = (got.double().cpu() - want.double().cpu()).abs()
    assert (error <= 1e-5).double().mean() > 0.9
    assert error.max() < 0.05


def ids_of(n, device, wide=False):
    return torch.randint(0, 2**62 if wide else 2**30, (n,), device=device)


def assert_close(got, want, dtype):
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("family", ["universal", "artifact", "artifact_gaussian", "sign", "u7"])
@pytest.mark.parametrize("widths", [(17,), (24, 10), (40, 33, 7), (16, 16, 16, 16)], ids=str)
def test_forward(widths, family, dtype, device):
    k, ids = 70, ids_of(21, device)
    c = coefficients_of(family, k).to(device)
    weights, biases = decoder(k, widths, dtype, device)
    got = dhe_forward(ids, c, weights, biases, family, "relu", "sigmoid")
    assert_close(got, expected(ids, c, weights, biases, family, "relu", "sigmoid"), dtype)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("last_activation", list(ACTIVATIONS))
def test_activations(activation, last_activation, device):
    ids, c = ids_of(5, device), coefficients_of("universal", 32).to(device)
    weights, biases = decoder(32, (16, 8), torch.float32, device)
    got = dhe_forward(ids, c, weights, biases, "universal", activation, last_activation)
    assert_close(
        got, expected(ids, c, weights, biases, "universal", activation, last_activation), torch.float32
    )


def group_of(shapes, family, dtype, device):
    """Coefficients, weights and biases of one decoder per entry of `shapes`, each (k, widths)."""
    stacks = [
        (coefficients_of(family, k, t).to(device), *decoder(k, w, dtype, device))
        for t, (k, w) in enumerate(shapes)
    ]
    return [list(column) for column in zip(*stacks, strict=True)]


@pytest.mark.parametrize(
    ("steps", "counts"),
    [
        *(([2], counts) for counts in ([0], [1], [63, 0, 65], [0, 64, 0])),
        *((steps, [5, 130, 1]) for steps in ([2], [1, 1], [3], [1, 2], [2, 1])),
    ],
    ids=str,
)
def test_groups_write_their_rows_and_nothing_else(steps, counts, device):
    """Outputs start as NaN in a larger buffer of NaN; the last feature of the batch is not in the group."""
    k, widths, batch = 96, (72, 40, 20)[: sum(steps)], 1
    ids = torch.randint(0, 2**40, (sum(counts) + 3,), device=device)
    ends = torch.tensor([0, *counts, 3]).cumsum(0)
    features = list(range(len(counts)))
    coefficients, weights, biases = group_of([(k, widths)] * len(counts), "universal", torch.float32, device)
    buffer = torch.full((len(ids) + 2, widths[-1] + 3), torch.nan, device=device)
    configs = [(tuning.Config(64, 32, 32, 2, 4), layers) for layers in steps]
    dhe.decode_grouped(
        ids, ends.to(device), batch, features, coefficients, weights, biases,
        "universal", "relu", "none", buffer[1:-1], configs,
    )  # fmt: skip
    written = torch.zeros_like(buffer, dtype=torch.bool)
    for t in features:
        rows = slice(1 + int(ends[t]), 1 + int(ends[t + 1]))
        written[rows, : widths[-1]] = True
        want = expected(
            ids[ends[t] : ends[t + 1]], coefficients[t], weights[t], biases[t], "universal", "relu", "none"
        )
        assert_close(buffer[rows, : widths[-1]], want, torch.float32)
    assert buffer[~written].isnan().all()


@pytest.mark.parametrize("family", ["universal", "artifact_gaussian", "sign"])
@pytest.mark.parametrize("steps", [[1], [2], [1, 1], [3], [1, 2], [2, 1]], ids=str)
def test_float8(steps, family, device):
    """Two decoders of a group; outputs are float32, and hidden layers in memory float8."""
    if device.type == "cuda" and tuning.target_of(device) not in dhe.FLOAT8_TARGETS:
        pytest.skip("this GPU has no float8 products")
    k, widths = 70, (72, 40, 20)[: sum(steps)]
    coefficients = [coefficients_of(family, k, t).to(device) for t in range(2)]
    weights, affines = zip(*(decoder_in_float8(k, widths, device) for _ in range(2)), strict=True)
    ids, out = (
        ids_of(75, device, wide=family != "artifact_gaussian"),
        torch.full((75, widths[-1]), torch.nan, device=device),
    )
    configs = [(tuning.Config(64, 32, 32, 2, 4), layers) for layers in steps]
    options = (family, "relu", "none")
    offsets = torch.tensor([0, 70, 75], device=device)
    dhe.decode_grouped(ids, offsets, 1, [0, 1], coefficients, weights, affines, *options, out, configs)
    for t, rows in enumerate((slice(0, 70), slice(70, 75))):
        encodings = hash_encode(ids[rows], coefficients[t], family)
        want = reference.decode(encodings.double(), weights[t], affines[t], "relu", "none")
        assert want.abs().max() > 0.1
        assert_close_but_for_steps(out[rows], want)


def test_float8_saturates_and_keeps_nan(device):
    if device.type == "cuda" and tuning.target_of(device) not in dhe.FLOAT8_TARGETS:
        pytest.skip("this GPU has no float8 products")
    c = coefficients_of("universal", 32).to(device)
    weights, affines = decoder_in_float8(32, (16, 16), device)
    affines[0][1] = torch.tensor([1e9, -1e9, *[0.0] * 14])
    weights[1] = torch.eye(16).to(torch.float8_e4m3fn).to(device)
    affines[1] = torch.tensor([[1.0], [0.0]]).repeat(1, 16).to(device)
    ids, out = ids_of(3, device), torch.empty(3, 16, device=device)
    arguments = (None, 1, [0], [c], [weights], [affines], "universal", "none", "none", out)
    dhe.decode_grouped(ids, *arguments)
    assert out[:, :2].tolist() == [[448.0, -448.0]] * 3
    affines[0][1, 0] = torch.nan
    dhe.decode_grouped(ids, *arguments)
    assert out[:, 0].isnan().all()


def test_offsets_beyond_the_ids_are_not_followed(device):
    coefficients, weights, biases = group_of([(32, (16, 8))] * 2, "universal", torch.float32, device)
    ids, buffer = ids_of(10, device), torch.full((12, 8), torch.nan, device=device)
    offsets = torch.tensor([-5, 4, 1 << 40], device=device)
    dhe.decode_grouped(
        ids, offsets, 1, [0, 1], coefficients, weights, biases, "universal", "relu", "none", buffer[1:-1]
    )
    for t, rows in enumerate((slice(0, 4), slice(4, 10))):
        want = expected(ids[rows], coefficients[t], weights[t], biases[t], "universal", "relu", "none")
        assert_close(buffer[1:-1][rows], want, torch.float32)
    assert buffer[[0, -1]].isnan().all()


def test_wide_narrow_and_int32_ids_in_one_call(device):
    ids = torch.cat([ids_of(64, device), ids_of(64, device, wide=True), ids_of(9, device)])
    c = coefficients_of("universal", 64).to(device)
    weights, biases = decoder(64, (32, 16), torch.float32, device)
    got = dhe_forward(ids, c, weights, biases, "universal", "mish", "none")
    assert_close(got, expected(ids, c, weights, biases, "universal", "mish", "none"), torch.float32)
    small = ids[:64].int()
    assert torch.equal(dhe_forward(small, c, weights, biases, "universal", "mish", "none"), got[:64])


def test_nan_weights_reach_the_output(device):
    c = coefficients_of("universal", 32).to(device)
    weights, biases = decoder(32, (16, 8), torch.float32, device)
    weights[0][3] = torch.nan
    for activation in ACTIVATIONS:
        assert (
            dhe_forward(ids_of(3, device), c, weights, biases, "universal", activation, "none").isnan().all()
        )


def test_bad_input(device):
    c = coefficients_of("universal", 32).to(device)
    weights, biases = decoder(32, (16, 8), torch.float32, device)
    ids = ids_of(3, device)
    with pytest.raises(ValueError, match="family: 'md5'"):
        dhe_forward(ids, c, weights, biases, "md5", "relu", "none")
    with pytest.raises(ValueError, match="last_activation: 'gelu'"):
        dhe_forward(ids, c, weights, biases, "universal", "relu", "gelu")
    with pytest.raises(TypeError, match="indices: int32 or int64"):
        dhe_forward(ids.float(), c, weights, biases, "universal", "relu", "none")
    with pytest.raises(ValueError, match=r"coefficients: \[2, k > 0\]"):
        dhe_forward(ids, c, weights, biases, "artifact", "relu", "none")
    with pytest.raises(ValueError, match=r"layer 1: weight \[out, 16\]"):
        dhe_forward(ids, c, weights[:1] * 2, biases[:1] * 2, "universal", "relu", "none")
    with pytest.raises(TypeError, match=r"layer 1: torch\.float32"):
        dhe_forward(ids, c, [weights[0], weights[1].half()], biases, "universal", "relu", "none")
