"""Deep hash embeddings on the device: IDs become encodings in registers and go straight into the matrix unit.

    h1  = activation(encode(ids) @ W1^T + b1)      encode: [n, k], never written to memory
    h2  = activation(h1 @ W2^T + b2)
    out = last_activation(h2 @ W3^T + b3)

Two designs, chosen by shape (`tuning.py`):

* *fused*: one kernel for two or three layers. A program owns BM IDs and all outputs of the later layers; the
  first hidden layer is made BN columns at a time, and each tile is multiplied into the second layer's
  accumulator at once. The hashes are computed again for each of the H1 / BN tiles.
* *first layer* apart: [hash + layer 1 + activation -> h1 in memory] with BM x BN of h1 per program, then the
  other layers, again two at a time where they fit.

Both serve any number of features of equal shape in one persistent launch (`grouped.py`), and both take
hidden vectors in place of IDs (HASHED = False) for the layers after the first.

BM = 16 * warps, so that each warp's rows are its own: with more warps than that, the warps would split BN
and each would compute every hash of its rows again. Trip counts over k are compile-time constants: with
run-time counts ptxas serialises wgmma.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from mprec.hashing import check_family, coefficient_rows
from mprec.names import ACTIVATIONS, FAMILIES

from . import autotune
from .dense import activate, add_bias, dot_precision, is_float8, load_weight, multiply_add
from .grouped import address, count_tiles, device_table, find_tile, lanes, programs
from .hashing import encode, is_narrow
from .launching import launchable
from .tuning import fused_config, layer_config, target_of, tile_width

# Columns of a group's pointer table: feature, coefficients, then weight and bias of each layer.
_FIRST_WEIGHT = 2


@triton.jit
def _product(
    rows, source, weight, n, K: tl.constexpr, N: tl.constexpr, FAMILY: tl.constexpr, HASHED: tl.constexpr,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr, BACKWARD: tl.constexpr = False,
):  # fmt: skip
    """left @ weight[n]^T in float32 [BM, BN], the left operand in the weight's type.

    HASHED: left = encode(rows [BM, 1] as IDs) with `source` the coefficients; else rows of `source` [., K].
    """
    EVEN_K: tl.constexpr = K % BK == 0
    accumulator = tl.zeros((BM, BN), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK)
        if HASHED:
            left = encode(rows, source, k, K, FAMILY, WIDE, EVEN_K).to(weight.dtype.element_ty)
        elif EVEN_K:
            left = tl.load(source + rows * K + k[None, :])
        else:
            left = tl.load(source + rows * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        tile = load_weight(weight, n, k, N, K, N % BN == 0, EVEN_K, BACKWARD)
        accumulator = multiply_add(left, tile, accumulator, PRECISION)
    return accumulator


@triton.jit
def _two_or_three_layers(
    rows, source, w1, b1, w2, b2, w3, b3,
    K: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, H3: tl.constexpr, FAMILY: tl.constexpr,
    HASHED: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, LAST_ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BH2: tl.constexpr, BH3: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Two layers (H3 = 0) or three of a tile of rows, float32 [BM, BH2 or BH3]."""
    SCALED: tl.constexpr = is_float8(w1.dtype.element_ty)
    n2 = tl.arange(0, BH2)
    accumulator = tl.zeros((BM, BH2), tl.float32)
    for n0 in tl.range(0, H1, BN, num_stages=1):
        n = n0 + tl.arange(0, BN)
        h = _product(rows, source, w1, n, K, H1, FAMILY, HASHED, WIDE, BM, BN, BK, STAGES, PRECISION)
        # columns beyond H1 hold activation(0), which may not be zero: load_weight's zeros silence them
        h = activate(add_bias(h, b1, n, H1, H1 % BN == 0, SCALED), ACTIVATION).to(w2.dtype.element_ty)
        tile = load_weight(w2, n2, n, H2, H1, H2 == BH2, H1 % BN == 0)
        accumulator = multiply_add(h, tile, accumulator, PRECISION)
    accumulator = add_bias(accumulator, b2, n2, H2, H2 == BH2, SCALED)
    if H3 == 0:
        return activate(accumulator, LAST_ACTIVATION)
    else:
        n3 = tl.arange(0, BH3)
        h = activate(accumulator, ACTIVATION).to(w3.dtype.element_ty)
        tile = load_weight(w3, n3, n2, H3, H2, H3 == BH3, H2 == BH2)
        last = multiply_add(h, tile, tl.zeros((BM, BH3), tl.float32), PRECISION)
        return activate(add_bias(last, b3, n3, H3, H3 == BH3, SCALED), LAST_ACTIVATION)


@triton.jit(do_not_specialize=["batch", "count"])
def layer_kernel(
    inputs, table, hashes, w, b, offsets, out, batch, count, stride_out: tl.constexpr,
    T: tl.constexpr, LANES: tl.constexpr, STRIDE: tl.constexpr, COLUMN: tl.constexpr, DTYPE: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, FAMILY: tl.constexpr, HASHED: tl.constexpr, ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """out[i, :N] = activation(left[i] @ weight^T + bias); left is hashed from inputs[i], or is inputs[i].

    BACKWARD: out[i, :N] = inputs[i] @ weight, the way gradients go; no bias.
    The tensors of a group are in `table`; those of one feature alone are `hashes`, `w` and `b`.
    """
    SCALED: tl.constexpr = is_float8(DTYPE)
    BIAS: tl.constexpr = tl.float32 if SCALED else DTYPE
    ACROSS: tl.constexpr = (N + BN - 1) // BN
    tiles = count_tiles(offsets, table, batch, count, T, STRIDE, LANES, BM) * ACROSS
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        member, first, stop = find_tile(tile // ACROSS, offsets, table, batch, count, T, STRIDE, LANES, BM)
        m = first + tl.arange(0, BM)
        n = (tile % ACROSS) * BN + tl.arange(0, BN)
        at = member * STRIDE
        weight, bias = address(w, table, at + COLUMN, DTYPE), address(b, table, at + COLUMN + 1, BIAS)
        if HASHED:
            source = address(hashes, table, at + 1, tl.int32)
            x = tl.load(inputs + m, mask=m < stop, other=0).to(tl.int64)
            if is_narrow(x, FAMILY):
                h = _product(
                    x[:, None], source, weight, n, K, N, FAMILY, True, False, BM, BN, BK, STAGES, PRECISION
                )
            else:
                h = _product(
                    x[:, None], source, weight, n, K, N, FAMILY, True, True, BM, BN, BK, STAGES, PRECISION
                )
        else:
            x = tl.minimum(m, stop - 1)  # rows beyond the end repeat the last one and are not stored
            h = _product(
                x[:, None], inputs, weight, n, K, N, FAMILY, False, False, BM, BN, BK, STAGES, PRECISION,
                BACKWARD,
            )  # fmt: skip
        if not BACKWARD:
            h = activate(add_bias(h, bias, n, N, N % BN == 0, SCALED), ACTIVATION)
        h = h.to(out.dtype.element_ty)
        keep = (m < stop)[:, None]
        if N % BN != 0:
            keep = keep & (n < N)[None, :]
        tl.store(out + m[:, None] * stride_out + n[None, :], h, mask=keep)


@triton.jit(do_not_specialize=["batch", "count"])
def fused_kernel(
    inputs, table, hashes, w_1, b_1, w_2, b_2, w_3, b_3, offsets, out, batch, count, stride_out: tl.constexpr,
    T: tl.constexpr, LANES: tl.constexpr, STRIDE: tl.constexpr, COLUMN: tl.constexpr, DTYPE: tl.constexpr,
    K: tl.constexpr, H1: tl.constexpr, H2: tl.constexpr, H3: tl.constexpr, FAMILY: tl.constexpr,
    HASHED: tl.constexpr, ACTIVATION: tl.constexpr, LAST_ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BH2: tl.constexpr, BH3: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[i, :H2 or :H3] = two layers (H3 = 0) or three of left[i], as in `layer_kernel`."""
    BIAS: tl.constexpr = tl.float32 if is_float8(DTYPE) else DTYPE
    tiles = count_tiles(offsets, table, batch, count, T, STRIDE, LANES, BM)
    D: tl.constexpr = H3 if H3 > 0 else H2
    n = tl.arange(0, BH3 if H3 > 0 else BH2)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        member, first, stop = find_tile(tile, offsets, table, batch, count, T, STRIDE, LANES, BM)
        m = first + tl.arange(0, BM)
        at = member * STRIDE
        w1, b1 = address(w_1, table, at + COLUMN, DTYPE), address(b_1, table, at + COLUMN + 1, BIAS)
        w2, b2 = address(w_2, table, at + COLUMN + 2, DTYPE), address(b_2, table, at + COLUMN + 3, BIAS)
        w3, b3 = w2, b2
        if H3 > 0:
            w3, b3 = address(w_3, table, at + COLUMN + 4, DTYPE), address(b_3, table, at + COLUMN + 5, BIAS)
        if HASHED:
            source = address(hashes, table, at + 1, tl.int32)
            x = tl.load(inputs + m, mask=m < stop, other=0).to(tl.int64)
            if is_narrow(x, FAMILY):
                h = _two_or_three_layers(
                    x[:, None], source, w1, b1, w2, b2, w3, b3, K, H1, H2, H3, FAMILY, True, False,
                    ACTIVATION, LAST_ACTIVATION, BM, BN, BK, BH2, BH3, STAGES, PRECISION,
                )  # fmt: skip
            else:
                h = _two_or_three_layers(
                    x[:, None], source, w1, b1, w2, b2, w3, b3, K, H1, H2, H3, FAMILY, True, True,
                    ACTIVATION, LAST_ACTIVATION, BM, BN, BK, BH2, BH3, STAGES, PRECISION,
                )  # fmt: skip
        else:
            x = tl.minimum(m, stop - 1)
            h = _two_or_three_layers(
                x[:, None], inputs, w1, b1, w2, b2, w3, b3, K, H1, H2, H3, FAMILY, False, False,
                ACTIVATION, LAST_ACTIVATION, BM, BN, BK, BH2, BH3, STAGES, PRECISION,
            )  # fmt: skip
        keep = (m < stop)[:, None] & (n < D)[None, :]
        tl.store(out + m[:, None] * stride_out + n[None, :], h.to(out.dtype.element_ty), mask=keep)


# whose matrix units multiply float8_e4m3fn, as Triton names it
FLOAT8_TARGETS = ("sm_90", "sm_100")
_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float8_e4m3fn: tl.float8e4nv,
}


def decode_grouped(
    indices, offsets, batch, features, coefficients, weights, biases,
    family, activation, last_activation, out, configs=None,
):  # fmt: skip
    """Write the embeddings of every ID of `features` into its row of out [n, >= D], and nothing else.

    Args:
        offsets: [features * batch + 1] of the whole batch, or None for one feature with all IDs.
        features: which feature of the offsets each decoder is for. One decoder that is for feature 0 has
            its tensors passed as they are, and torch.compile sees them; a group's are in a table.
        coefficients, weights, biases: per decoder; contiguous, all decoders of equal shape and dtype.
            Weights in float8_e4m3fn have float32 "biases" [2, out]: what their outputs are multiplied by,
            then what is added; encodings and hidden layers are rounded to float8, within +-448.
        configs: tile sizes of each step in place of those by `tuning`.
    """
    dtype, device, count = weights[0][0].dtype, indices.device, indices.numel()
    if dtype == torch.float8_e4m3fn and target_of(device) not in FLOAT8_TARGETS:
        raise TypeError(
            "weights: float8_e4m3fn needs a GPU of compute capability 9.0 or more, and this one is served as "
            f"{target_of(device)}"
        )
    if not count:
        return
    # int(): sizes that are compiled in; what torch.compile took for a variable is fixed here
    members, widths = len(features), [int(weight.shape[0]) for weight in weights[0]]
    table, alone = None, list(features) == [0]
    if not alone:
        rows = zip(features, coefficients, weights, biases, strict=True)
        table = device_table([(f, hashes, *_paired(ws, bs)) for f, hashes, ws, bs in rows], device)
    given = [coefficients[0], *_paired(weights[0], biases[0])] if alone else [None] * (2 * len(widths) + 1)
    group = {"T": members, "LANES": lanes(members), "STRIDE": 2 * len(widths) + 2, "DTYPE": _DTYPES[dtype]}
    group |= {"FAMILY": FAMILIES[family], "PRECISION": dot_precision(target_of(device))}
    inputs, k, layer = indices, int(coefficients[0].shape[1]), 0
    if configs is None:
        key = autotune.key_of(count, k, widths, dtype, family)
        configs = autotune.remembered(device, key) or default_steps(
            target_of(device), count, k, widths, dtype
        )
    for step in configs:
        config, layers = step
        hashed, last = layer == 0, layer + layers == len(widths)
        width = widths[layer + layers - 1]
        result = out if last else out.new_empty((count, width), dtype=dtype)
        final = ACTIVATIONS[last_activation if last else activation]
        options = {"HASHED": hashed, "COLUMN": _FIRST_WEIGHT + 2 * layer, "K": k, "num_warps": config.warps}
        options |= {"BM": config.BM, "BN": config.BN, "BK": config.BK, "STAGES": config.STAGES}
        tiles = triton.cdiv(count, config.BM) + (0 if offsets is None else members)
        own = given[2 * layer + 1 : 2 * (layer + layers) + 1]
        if layers == 1:
            grid = (programs(tiles * triton.cdiv(width, config.BN), config.warps, device),)
            launchable(layer_kernel)[grid](
                inputs, table, given[0], *own, offsets, result, batch, count, int(result.stride(0)),
                N=width, ACTIVATION=final, BACKWARD=False, **group, **options,
            )  # fmt: skip
        else:
            h1, h2, h3 = (*widths[layer : layer + layers], 0)[:3]
            grid = (programs(tiles, config.warps, device),)
            own += [None] * (6 - len(own))
            launchable(fused_kernel)[grid](
                inputs, table, given[0], *own, offsets, result, batch, count, int(result.stride(0)),
                H1=h1, H2=h2, H3=h3, BH2=tile_width(h2), BH3=tile_width(h3),
                ACTIVATION=ACTIVATIONS[activation], LAST_ACTIVATION=final, **group, **options,
            )  # fmt: skip
        inputs, k, layer = result, widths[layer + layers - 1], layer + layers


def layer_grouped(inputs, offsets, batch, features, weights, biases, out) -> None:
    """One layer of equal shape for each of `features`: out = inputs @ weight^T + bias, row by row.

    Without biases the other way, as gradients go: out = inputs @ weight. Arguments as `decode_grouped`.
    """
    count, k, width, device = len(inputs), int(inputs.shape[1]), int(out.shape[1]), inputs.device
    if not count:
        return
    members, backward, dtype = len(features), biases is None, weights[0].dtype
    pairs = list(zip(weights, weights if backward else biases, strict=True))
    alone = list(features) == [0]
    table = None if alone else device_table([(f, *p) for f, p in zip(features, pairs, strict=True)], device)
    config = layer_config(target_of(device), count, k, width, dtype, hashed=False)
    tiles = triton.cdiv(count, config.BM) + (0 if offsets is None else members)
    grid = (programs(tiles * triton.cdiv(width, config.BN), config.warps, device),)
    launchable(layer_kernel)[grid](
        inputs, table, None, *(pairs[0] if alone else (None, None)), offsets, out, batch, count,
        int(out.stride(0)), T=members, LANES=lanes(members), STRIDE=3, COLUMN=1, DTYPE=_DTYPES[dtype],
        K=k, N=width, FAMILY=0, HASHED=False, ACTIVATION=0, BM=config.BM, BN=config.BN, BK=config.BK,
        STAGES=config.STAGES, PRECISION=dot_precision(target_of(device)), BACKWARD=backward,
        num_warps=config.warps,
    )  # fmt: skip


def _paired(weights, biases):
    return [tensor for pair in zip(weights, biases, strict=True) for tensor in pair]


def default_steps(target, count, k, widths, dtype):
    """How the layers are cut into launches: (config, number of layers) of each."""
    steps, layer = [], 0
    while layer < len(widths):
        for layers in (3, 2, 1):
            if layer + layers > len(widths):
                continue
            these = widths[layer : layer + layers]
            if layers > 1:
                config = fused_config(target, count, k, these, dtype, layer == 0)
            else:
                config = layer_config(target, count, k, these[0], dtype, layer == 0)
            if config is not None:
                steps.append((config, layers))
                k, layer = these[-1], layer + layers
                break
    return steps


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
        family: one of those of `mprec.hashing`.
        activation: "none", "relu", "sigmoid" or "mish", after every layer but the last.
        last_activation: after the last layer.

    Raises:
        ValueError: for an unknown family or activation, or shapes that do not fit together.
        TypeError: for a dtype that the kernels lack.
    """
    _check(indices, coefficients, weights, biases, family, activation, last_activation)
    out = weights[0].new_empty((indices.numel(), weights[-1].shape[0]))
    decode_grouped(
        indices.contiguous(), None, 1, [0], [coefficients.contiguous()],
        [[weight.contiguous() for weight in weights]], [[bias.contiguous() for bias in biases]],
        family, activation, last_activation, out,
    )  # fmt: skip
    return out


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
    rows = coefficient_rows(family)
    if coefficients.dtype != torch.int32:
        raise TypeError(f"coefficients: int32, got {coefficients.dtype}")
    if coefficients.dim() != 2 or coefficients.shape[0] != rows or coefficients.shape[1] == 0:
        raise ValueError(f"coefficients: [{rows}, k > 0] for family {family}, got {list(coefficients.shape)}")
    check_family(family, coefficients.shape[1])
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
