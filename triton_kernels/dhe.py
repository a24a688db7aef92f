"""Deep hash embeddings on the device: IDs become encodings in registers and go straight into the matrix unit.

    h1  = activation(encode(ids) @ W1^T + b1)      encode: [n, K], never written to memory
    h2  = activation(h1 @ W2^T + b2)
    out = last_activation(h2 @ W3^T + b3)

Two designs, chosen by shape (`tuning.py`):

* *fused*: one kernel for up to three layers. A program owns BM IDs and all later layers' outputs; the first
  hidden layer is made BN columns at a time, each tile being multiplied into the second layer's accumulator
  at once. The hashes are computed again for each of the H1 / BN tiles.
* *first layer* apart: [hash + layer 1 + activation -> h1 in memory], a GEMM whose left operand is computed;
  each program owns BM x BN of h1. The other layers follow as ordinary GEMMs.

BM = 16 * warps, so that each warp's rows are its own: with more warps than that, the warps would split BN
and each would compute every hash of its rows again. Trip counts are compile-time constants: with run-time
counts ptxas serialises wgmma.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .dense import ACTIVATIONS, activate, dot_precision, load_bias, load_weight
from .hashing import FAMILIES, encode, hash_encode, is_narrow
from .tuning import first_layer_config, fused_config, target_of, tile_width


@triton.jit
def _hashed_product(
    x, coefficients, weight, n, K: tl.constexpr, N: tl.constexpr, FAMILY: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_N: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """encode(x) @ weight[n]^T in float32 [BM, BN], the encodings rounded to the weight's type."""
    EVEN_K: tl.constexpr = K % BK == 0
    accumulator = tl.zeros((BM, BN), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK)
        encodings = encode(x, coefficients, k, K, FAMILY, WIDE, EVEN_K).to(weight.dtype.element_ty)
        tile = load_weight(weight, n, k, N, K, EVEN_N, EVEN_K)
        accumulator = tl.dot(encodings, tile, accumulator, input_precision=PRECISION)
    return accumulator


@triton.jit(do_not_specialize=["count"])
def first_layer_kernel(
    ids, coefficients, weight, bias, out, count,
    K: tl.constexpr, N: tl.constexpr, FAMILY: tl.constexpr, ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[count, N] = activation(encode(ids) @ weight[N, K]^T + bias)."""
    EVEN_N: tl.constexpr = N % BN == 0
    TILES_N: tl.constexpr = (N + BN - 1) // BN
    m = (tl.program_id(0) // TILES_N).to(tl.int64) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % TILES_N) * BN + tl.arange(0, BN)
    x = tl.load(ids + m, mask=m < count, other=0).to(tl.int64)
    if is_narrow(x, FAMILY):
        h = _hashed_product(
            x[:, None], coefficients, weight, n, K, N, FAMILY, False, BM, BN, BK, EVEN_N, STAGES, PRECISION
        )
    else:
        h = _hashed_product(
            x[:, None], coefficients, weight, n, K, N, FAMILY, True, BM, BN, BK, EVEN_N, STAGES, PRECISION
        )
    h = activate(h + load_bias(bias, n, N, EVEN_N), ACTIVATION).to(out.dtype.element_ty)
    where = out + m[:, None] * N + n[None, :]
    if EVEN_N:
        tl.store(where, h, mask=(m < count)[:, None])
    else:
        tl.store(where, h, mask=(m < count)[:, None] & (n < N)[None, :])


@triton.jit
def _fused_layers(
    x, coefficients, w1, b1, w2, b2, w3, b3,
    K: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, H3: tl.constexpr, FAMILY: tl.constexpr,
    WIDE: tl.constexpr, ACTIVATION: tl.constexpr, LAST_ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BH2: tl.constexpr, BH3: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Two layers (H3 = 0) or three of a tile of IDs, float32 [BM, BH2 or BH3]."""
    n2 = tl.arange(0, BH2)
    accumulator = tl.zeros((BM, BH2), tl.float32)
    for n0 in tl.range(0, H1, BN, num_stages=1):
        n = n0 + tl.arange(0, BN)
        h = _hashed_product(
            x, coefficients, w1, n, K, H1, FAMILY, WIDE, BM, BN, BK, H1 % BN == 0, STAGES, PRECISION
        )
        # columns beyond H1 hold activation(0), which may not be zero: load_weight's zeros silence them
        h = activate(h + load_bias(b1, n, H1, H1 % BN == 0), ACTIVATION).to(w2.dtype.element_ty)
        tile = load_weight(w2, n2, n, H2, H1, H2 == BH2, H1 % BN == 0)
        accumulator = tl.dot(h, tile, accumulator, input_precision=PRECISION)
    accumulator += load_bias(b2, n2, H2, H2 == BH2)
    if H3 == 0:
        return activate(accumulator, LAST_ACTIVATION)
    else:
        n3 = tl.arange(0, BH3)
        h = activate(accumulator, ACTIVATION).to(w3.dtype.element_ty)
        tile = load_weight(w3, n3, n2, H3, H2, H3 == BH3, H2 == BH2)
        last = tl.dot(h, tile, input_precision=PRECISION) + load_bias(b3, n3, H3, H3 == BH3)
        return activate(last, LAST_ACTIVATION)


@triton.jit(do_not_specialize=["count"])
def fused_kernel(
    ids, coefficients, w1, b1, w2, b2, w3, b3, out, count,
    K: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, H3: tl.constexpr, FAMILY: tl.constexpr,
    ACTIVATION: tl.constexpr, LAST_ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BH2: tl.constexpr, BH3: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[count, H2 or H3] of two layers (H3 = 0) or three."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    x = tl.load(ids + m, mask=m < count, other=0).to(tl.int64)
    if is_narrow(x, FAMILY):
        h = _fused_layers(
            x[:, None], coefficients, w1, b1, w2, b2, w3, b3, K, H1, H2, H3, FAMILY, False,
            ACTIVATION, LAST_ACTIVATION, BM, BN, BK, BH2, BH3, STAGES, PRECISION,
        )  # fmt: skip
    else:
        h = _fused_layers(
            x[:, None], coefficients, w1, b1, w2, b2, w3, b3, K, H1, H2, H3, FAMILY, True,
            ACTIVATION, LAST_ACTIVATION, BM, BN, BK, BH2, BH3, STAGES, PRECISION,
        )  # fmt: skip
    D: tl.constexpr = H3 if H3 > 0 else H2
    n = tl.arange(0, BH3 if H3 > 0 else BH2)
    keep = (m < count)[:, None] & (n < D)[None, :]
    tl.store(out + m[:, None] * D + n[None, :], h.to(out.dtype.element_ty), mask=keep)


def first_layer(indices, coefficients, weight, bias, family: str, activation: str, config=None, out=None):
    """activation(encode(indices) @ weight^T + bias): [n, H1] of weight's dtype, in one kernel."""
    count, (width, k) = indices.numel(), weight.shape
    out = weight.new_empty((count, width)) if out is None else out
    if count:
        config = config or first_layer_config(target_of(indices.device), count, k, width, weight.dtype)
        grid = (triton.cdiv(count, config.BM) * triton.cdiv(width, config.BN),)
        first_layer_kernel[grid](
            indices, coefficients, weight, bias, out, count, k, width, FAMILIES[family],
            ACTIVATIONS[activation], config.BM, config.BN, config.BK, config.STAGES,
            dot_precision(target_of(indices.device)), num_warps=config.warps,
        )  # fmt: skip
    return out


def fused(
    indices,
    coefficients,
    weights,
    biases,
    family: str,
    activation: str,
    last_activation: str,
    config=None,
    out=None,
):
    """All of a decoder of two or three layers in one kernel: [n, D] of the weights' dtype."""
    count, k = indices.numel(), weights[0].shape[1]
    widths = [weight.shape[0] for weight in weights]
    out = weights[0].new_empty((count, widths[-1])) if out is None else out
    if count:
        config = config or fused_config(target_of(indices.device), count, k, widths, weights[0].dtype)
        h1, h2, h3 = (*widths, 0)[:3]
        fused_kernel[(triton.cdiv(count, config.BM),)](
            indices, coefficients, weights[0], biases[0], weights[1], biases[1], weights[-1], biases[-1],
            out, count, k, h1, h2, h3, FAMILIES[family], ACTIVATIONS[activation],
            ACTIVATIONS[last_activation], config.BM, config.BN, config.BK, tile_width(h2), tile_width(h3),
            config.STAGES, dot_precision(target_of(indices.device)), num_warps=config.warps,
        )  # fmt: skip
    return out


_TORCH_ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "mish": torch.nn.functional.mish,
}


def dhe_forward(
    indices: torch.Tensor,
    coefficients: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    family: str,
    activation: str,
    last_activation: str,
) -> torch.Tensor:
    """Embeddings [n, D] of IDs under one deep hash embedding, on the IDs' device.

    Args:
        indices: int32 or int64 [n], IDs >= 0.
        coefficients: int32 [R, k], the hash parameters as in `mprec.hashing`.
        weights, biases: of each layer, [out, in] and [out] as in `torch.nn.Linear`; float32, bfloat16 or
            float16. Sums are float32; encodings and hidden layers are rounded to the weights' type.
        family: "universal", "artifact", "artifact_gaussian", "sign" or "u7".
        activation: "none", "relu", "sigmoid" or "mish", after every layer but the last.
        last_activation: after the last layer.

    Raises:
        ValueError: for an unknown family or activation, or shapes that do not fit together.
        TypeError: for a dtype that the kernels lack.
    """
    _check(indices, coefficients, weights, biases, family, activation, last_activation)
    indices, coefficients = indices.contiguous(), coefficients.contiguous()
    weights = [weight.contiguous() for weight in weights]
    biases = [bias.contiguous() for bias in biases]
    widths = [weight.shape[0] for weight in weights]
    target, k = target_of(indices.device), coefficients.shape[1]
    config = fused_config(target, indices.numel(), k, widths, weights[0].dtype)
    if family == "artifact_gaussian":
        # logarithms and sines would spill next to accumulators: encodings go through memory
        return _dense_layers(
            hash_encode(indices, coefficients, family).to(weights[0].dtype), weights, biases,
            activation, last_activation,
        )  # fmt: skip
    if config is not None:
        return fused(indices, coefficients, weights, biases, family, activation, last_activation, config)
    first_activation = activation if len(weights) > 1 else last_activation
    hidden = first_layer(indices, coefficients, weights[0], biases[0], family, first_activation)
    return _dense_layers(hidden, weights[1:], biases[1:], activation, last_activation)


def _dense_layers(x, weights, biases, activation, last_activation):
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
        x = torch.nn.functional.linear(x, weight, bias)
        x = _TORCH_ACTIVATIONS[last_activation if layer == len(weights) else activation](x)
    return x


def _check(indices, coefficients, weights, biases, family, activation, last_activation):
    if family not in FAMILIES:
        raise ValueError(f"family: {family!r} is not one of {', '.join(FAMILIES)}")
    for name, value in (("activation", activation), ("last_activation", last_activation)):
        if value not in ACTIVATIONS:
            raise ValueError(f"{name}: {value!r} is not one of {', '.join(ACTIVATIONS)}")
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"indices: int32 or int64 of one dimension, got {indices.dtype} {list(indices.shape)}"
        )
    rows = 2 if family.startswith("artifact") else 4
    if coefficients.dtype != torch.int32:
        raise TypeError(f"coefficients: int32, got {coefficients.dtype}")
    if coefficients.dim() != 2 or coefficients.shape[0] != rows or coefficients.shape[1] == 0:
        raise ValueError(f"coefficients: [{rows}, k > 0] for family {family}, got {list(coefficients.shape)}")
    if family == "artifact_gaussian" and coefficients.shape[1] % 2:
        raise ValueError(f"coefficients: k is even for artifact_gaussian, got {coefficients.shape[1]}")
    if not weights or len(weights) != len(biases):
        raise ValueError(f"weights, biases: one of each per layer, got {len(weights)} and {len(biases)}")
    incoming, dtype = coefficients.shape[1], weights[0].dtype
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"weights: float32, bfloat16 or float16, got {dtype}")
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.dim() != 2 or weight.shape[1] != incoming or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"layer {layer}: weight [out, {incoming}] and bias [out], "
                f"got {list(weight.shape)} and {list(bias.shape)}"
            )
        if weight.dtype != dtype or bias.dtype != dtype:
            raise TypeError(f"layer {layer}: {dtype} like the first weight, got {weight.dtype}, {bias.dtype}")
        incoming = weight.shape[0]
    for name, tensor in (("coefficients", coefficients), ("weights", weights[0]), ("biases", biases[-1])):
        if tensor.device != indices.device:
            raise ValueError(f"{name}: on {tensor.device}, but indices are on {indices.device}")
