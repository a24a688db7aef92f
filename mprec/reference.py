"""Every operator in a few lines of plain torch: the specification, the tests' oracle, and the fallback.

Nothing here calls native code. All functions are differentiable and compute in ``dtype`` (float64 unless the
caller says otherwise). Bags are given as in the operators: ``offsets`` holds the start of each bag, or with
``include_last_offset`` also the end of the last one.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mprec.hashing import ARTIFACT_BUCKETS, ARTIFACT_PRIME, PRIME, check_family
from mprec.names import MODES

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0

__all__ = [
    "activate",
    "activation_gradient",
    "bag_ids",
    "decode",
    "dhe",
    "dhe_bag",
    "dhe_bag_multi",
    "dot_interaction",
    "embedding_bag",
    "embedding_bag_multi",
    "encode",
    "float8",
    "hash_values",
    "maxima",
    "mlp",
    "pool",
]


def hash_values(coefficients: Tensor, indices: Tensor, family: str) -> Tensor:
    """Integer hashes: int64 ``[n, k]`` from int32 coefficients ``[rows, k]`` and IDs ``[n]``."""
    x = indices.to(torch.int64)[:, None]
    if family.startswith("artifact"):
        a, b = coefficients.to(torch.int64)
        return torch.fmod(torch.fmod(a * x + b, ARTIFACT_PRIME), ARTIFACT_BUCKETS)
    a, b, c, d = coefficients.to(torch.int64)
    limb = 2**30 - 1
    x0, x1, x2 = x & limb, (x >> 30) & limb, (x >> 60) & 0xF
    return (a * x0 + c * x1 + d * x2 + b) % PRIME  # the sum is below 2**63: each limb is below 2**30


def encode(coefficients: Tensor, indices: Tensor, family: str) -> Tensor:
    """Real-valued hashes: float32 ``[n, k]``, the same bits on every device (but for the Gaussian family)."""
    h = hash_values(coefficients, indices, family)
    if family == "universal":
        return h.to(torch.float32) * 2.0**-30 - 1  # float32(2 / (p - 1)) is exactly 2**-30
    if family == "sign":
        high = h.new_full((), 3**-0.5, dtype=torch.float32)
        return torch.where(h >= 2**30, high, -high)
    if bits := check_family(family, 0).level_bits:  # evenly spaced levels of the high bits
        most = 2**bits - 1
        return (2 * (h >> (31 - bits)) - most).to(torch.float32) / most
    if family == "artifact":
        return h.to(torch.float32) / h.new_full((), ARTIFACT_BUCKETS - 1, dtype=torch.float32) * 2 - 1
    u = (h.to(torch.float64) + 1) / ARTIFACT_BUCKETS
    radius, angle = torch.sqrt(-2 * torch.log(u[:, 0::2])), 2 * torch.pi * u[:, 1::2]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).flatten(1).to(torch.float32)


def activate(x: Tensor, activation: str) -> Tensor:
    return {"none": lambda x: x, "relu": F.relu, "sigmoid": torch.sigmoid, "mish": F.mish}[activation](x)


def activation_gradient(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient for ``x`` given that of ``activate(x, activation)``."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, x, 0)
    if activation == "sigmoid":
        return torch.ops.aten.sigmoid_backward(grad, x.sigmoid())
    if activation == "mish":
        return torch.ops.aten.mish_backward(grad, x)
    return grad


def float8(x: Tensor) -> Tensor:
    """``float8_e4m3fn``, rounded to nearest even; beyond its largest number comes that; NaN stays."""
    # by way of float32, as the kernels round; torch makes NaN of large numbers
    return x.to(torch.float32).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)


def decode(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str, last_activation: str
) -> Tensor:
    """The MLP: ``[n, k]`` to ``[n, D]``; layer weights ``[out, in]`` as in ``torch.nn.Linear``.

    Weights in float8 multiply inputs in float8; their "biases" are ``[2, out]``, the outputs' scales first.
    """
    last = len(weights) - 1
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        bias = bias.to(x.dtype)
        if weight.dtype == FLOAT8:
            x = F.linear(float8(x).to(x.dtype), weight.to(x.dtype)) * bias[0] + bias[1]
        else:
            x = F.linear(x, weight.to(x.dtype), bias)
        x = activate(x, last_activation if layer == last else activation)
    return x


def dhe(
    indices: Tensor,
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    family: str = "universal",
    activation: str = "relu",
    last_activation: str = "sigmoid",
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Deep hash embedding of each ID: ``[n]`` to ``[n, D]``."""
    u = encode(coefficients, indices, family).to(dtype)
    return decode(u, weights, biases, activation, last_activation)


def bag_ids(offsets: Tensor, num_indices: int, num_bags: int) -> Tensor:
    """The bag of each index position: int64 ``[num_indices]``."""
    positions = torch.arange(num_indices, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[:num_bags].contiguous(), positions, right=True) - 1


def maxima(rows: Tensor, bag: Tensor, num_bags: int, keep: Tensor | None = None) -> Tensor:
    """The position in ``rows`` ``[n, D]`` of each bag's maximum: int64 ``[B, D]``, n where a bag is empty.

    Of equal numbers the first. As in torch's kernels, a later entry takes over if it is greater: a NaN stays
    where it is a bag's first entry, and is passed over elsewhere.
    """
    n = len(rows)
    where, positions = bag[:, None].expand_as(rows), torch.arange(n, device=rows.device)
    of_kept = positions if keep is None else torch.where(keep, positions, n)
    first = positions.new_full((num_bags,), n).scatter_reduce(0, bag, of_kept, "amin")
    is_first = positions == first[bag]
    rank = torch.where(rows.isnan(), torch.where(is_first, torch.inf, -torch.inf)[:, None], rows)
    if keep is not None:
        rank = torch.where(keep[:, None], rank, -torch.inf)
    top = rank.new_full((num_bags, rows.shape[1]), -torch.inf).scatter_reduce(0, where, rank, "amax")
    is_top = rank == top.gather(0, where)
    if keep is not None:
        is_top = is_top & keep[:, None]
    candidates = torch.where(is_top, positions[:, None], n)
    return positions.new_full((num_bags, rows.shape[1]), n).scatter_reduce(0, where, candidates, "amin")


def pool(
    rows: Tensor,
    offsets: Tensor,
    mode: int,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    keep: Tensor | None = None,
) -> Tensor:
    """Pool one vector per index, ``[n, D]``, into one per bag, ``[B, D]``; empty bags give zeros.

    ``keep`` (bool ``[n]``) leaves out entries (padding). The mean divides by the number of entries kept, also
    when they are weighted. A maximum's gradient goes to the entry that it was taken from, see :func:`maxima`.
    """
    num_bags = offsets.numel() - include_last_offset
    bag = bag_ids(offsets, len(rows), num_bags)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.to(rows.dtype)[:, None]
    if mode == MODES["max"]:
        chosen = maxima(rows.detach(), bag, num_bags, keep)
        return torch.cat([rows, rows.new_zeros(1, rows.shape[1])]).gather(0, chosen)
    if keep is not None:
        rows = torch.where(keep[:, None], rows, 0)
    total = rows.new_zeros(num_bags, rows.shape[1]).index_add(0, bag, rows)
    if mode == MODES["mean"]:
        total = total / bag_sizes(bag, num_bags, keep).clamp(min=1).to(rows.dtype)[:, None]
    return total


def bag_sizes(bag: Tensor, num_bags: int, keep: Tensor | None) -> Tensor:
    """The number of entries kept in each bag: int64 ``[B]``."""
    counted = torch.ones_like(bag) if keep is None else keep.to(bag.dtype)
    return bag.new_zeros(num_bags).index_add(0, bag, counted)


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    mode: int = 0,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Bags of rows of one table ``[N, D]``: ``[B, D]``."""
    rows = weight.index_select(0, indices).to(dtype)
    keep = None if padding_idx < 0 else indices != padding_idx
    return pool(rows, offsets, mode, per_sample_weights, include_last_offset, keep)


def dhe_bag(
    indices: Tensor,
    offsets: Tensor,
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    family: str = "universal",
    activation: str = "relu",
    last_activation: str = "sigmoid",
    mode: int = 0,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Bags of deep hash embeddings: ``[B, D]``."""
    rows = dhe(indices, coefficients, weights, biases, family, activation, last_activation, dtype=dtype)
    keep = None if padding_idx < 0 else indices != padding_idx
    return pool(rows, offsets, mode, per_sample_weights, include_last_offset, keep)


def _feature_bags(indices, offsets, per_sample_weights, features, num_features):
    """The CSR slices of some features: (indices, offsets with the last one, per-sample weights) of each."""
    batch = (offsets.numel() - 1) // num_features
    for f in features:
        part = offsets[f * batch : (f + 1) * batch + 1]
        begin, end = int(part[0]), int(part[-1])
        weights = None if per_sample_weights is None else per_sample_weights[begin:end]
        yield indices[begin:end], part - begin, weights


def embedding_bag_multi(
    weights: Sequence[Tensor],
    indices: Tensor,
    offsets: Tensor,
    mode: int = 0,
    per_sample_weights: Tensor | None = None,
    features: Sequence[int] | None = None,
    num_features: int | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """One table per feature, ``[B, sum D]``; see :func:`mprec.ops.embedding_bag_multi` for the layout."""
    features = range(len(weights)) if features is None else features
    bags = _feature_bags(indices, offsets, per_sample_weights, features, num_features or len(weights))
    parts = [
        embedding_bag(weight, ids, starts, mode, psw, True, dtype=dtype)
        for weight, (ids, starts, psw) in zip(weights, bags, strict=True)
    ]
    return torch.cat(parts, dim=1)


def dhe_bag_multi(
    indices: Tensor,
    offsets: Tensor,
    coefficients: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layers: Sequence[int],
    family: str = "universal",
    activation: str = "relu",
    last_activation: str = "sigmoid",
    mode: int = 0,
    per_sample_weights: Tensor | None = None,
    features: Sequence[int] | None = None,
    num_features: int | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """One decoder per feature, ``[B, sum D]``; see :func:`mprec.ops.dhe_bag_multi` for the flat arguments."""
    features = range(len(layers)) if features is None else features
    bags = _feature_bags(indices, offsets, per_sample_weights, features, num_features or len(layers))
    parts, first = [], 0
    for count, hashes, (ids, starts, psw) in zip(layers, coefficients, bags, strict=True):
        stack = slice(first, first + count)
        first += count
        mlp = (hashes, weights[stack], biases[stack], family, activation, last_activation)
        parts.append(dhe_bag(ids, starts, *mlp, mode, psw, True, dtype=dtype))
    return torch.cat(parts, dim=1)


def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str,
    last_activation: str,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Linear layers ``[B, in]`` to ``[B, out]``, ``activation`` behind all but the last."""
    x = input.to(dtype)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True), 1):
        name = last_activation if layer == len(weights) else activation
        x = activate(F.linear(x, weight.to(dtype), bias.to(dtype)), name)
    return x


def dot_interaction(
    vectors: Tensor,
    self_interaction: bool = False,
    first: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Products of vectors ``[B, V, D]``: the lower triangle of V V^T ``[B, pairs]``, row by row. With
    ``first`` ``[B, D]``, that and the products of it and the vectors: ``[B, D + pairs]``."""
    if first is not None:
        all_vectors = torch.cat([first.unsqueeze(1), vectors], dim=1)
        products = dot_interaction(all_vectors, self_interaction, dtype=dtype)
        return torch.cat([first.to(dtype), products], dim=1)
    vectors, count = vectors.to(dtype), vectors.shape[1]
    rows, columns = torch.tril_indices(count, count, 0 if self_interaction else -1, device=vectors.device)
    return torch.bmm(vectors, vectors.transpose(1, 2))[:, rows, columns]
