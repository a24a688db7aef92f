"""Tables on CUDA (and ROCm) tensors: bags, gradients, optimizers and quantised rows; see ``_cuda``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mprec.names import MODES
from mprec.ops import _csr, _quantized, _tables, _updates
from mprec.ops._checks import num_bags
from mprec.ops._common import ids, mutated, plain
from mprec.ops._cuda_common import KERNEL_DTYPES, aligned, columns_of, rounds, with_last_offset


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    mode: int = 0,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    indices, offsets = _tables.checked(
        weight, indices, offsets, mode, per_sample_weights, include_last_offset
    )
    if weight.dtype not in KERNEL_DTYPES:
        return _tables._embedding_bag(
            weight, indices, offsets, mode, per_sample_weights, include_last_offset, padding_idx
        )
    from mprec.triton_kernels.embedding_bag import embedding_bag_grouped

    batch = num_bags(offsets, include_last_offset)
    out = weight.new_empty(batch, weight.shape[1])
    embedding_bag_grouped(
        [aligned(weight)],
        indices,
        with_last_offset(offsets, len(indices), include_last_offset),
        batch,
        [0],
        mode,
        plain(per_sample_weights),
        padding_idx,
        out,
        [0],
    )
    return out


def embedding_bag_multi(
    weights: Sequence[Tensor],
    indices: Tensor,
    offsets: Tensor,
    mode: int = 0,
    per_sample_weights: Tensor | None = None,
    features: Sequence[int] | None = None,
    num_features: int | None = None,
    sparse: bool = False,
) -> Tensor:
    indices, offsets, num_features = _tables.checked_multi(
        weights, indices, offsets, mode, per_sample_weights, features, num_features
    )
    if weights[0].dtype not in KERNEL_DTYPES:
        return _tables._embedding_bag_multi(
            weights, indices, offsets, mode, per_sample_weights, features, num_features
        )
    from mprec.triton_kernels.embedding_bag import embedding_bag_grouped

    batch = _csr.batch_size(offsets, num_features)
    dims = [weight.shape[1] for weight in weights]
    out = weights[0].new_empty(batch, sum(dims))
    embedding_bag_grouped(
        [aligned(weight) for weight in weights],
        indices,
        offsets,
        batch,
        range(len(weights)) if features is None else features,
        mode,
        plain(per_sample_weights),
        -1,
        out,
        columns_of(dims),
    )
    return out


# ------------------------------------------------------------------------------------------------ gradients


def embedding_bag_backward(
    grad,
    weight,
    indices,
    offsets,
    mode,
    per_sample_weights,
    include_last_offset,
    padding_idx,
    scale_grad_by_freq,
    sparse,
    need_weight,
    need_per_sample_weights,
):
    dense_sum = mode != MODES["max"] and not (scale_grad_by_freq or sparse or need_per_sample_weights)
    if not dense_sum or weight.dtype not in KERNEL_DTYPES:
        return _tables._embedding_bag_backward(
            grad, weight, indices, offsets, mode, per_sample_weights, include_last_offset, padding_idx,
            scale_grad_by_freq, sparse, need_weight, need_per_sample_weights,
        )  # fmt: skip
    if not need_weight:
        return grad.new_empty(0), grad.new_empty(0)
    indices, offsets = ids(indices, "indices"), ids(offsets, "offsets")
    offsets = with_last_offset(offsets, len(indices), include_last_offset)
    (gradient,) = _table_gradients(
        grad, [weight], indices, offsets, mode, per_sample_weights, [0], 1, padding_idx
    )
    return gradient, grad.new_empty(0)


def embedding_bag_multi_backward(
    grad,
    weights,
    indices,
    offsets,
    mode,
    per_sample_weights,
    features,
    num_features,
    sparse,
    need_per_sample_weights,
):
    dense_sum = mode != MODES["max"] and not (sparse or need_per_sample_weights)
    if not dense_sum or weights[0].dtype not in KERNEL_DTYPES:
        return _tables._embedding_bag_multi_backward(
            grad, weights, indices, offsets, mode, per_sample_weights, features, num_features, sparse,
            need_per_sample_weights,
        )  # fmt: skip
    indices, offsets = ids(indices, "indices"), ids(offsets, "offsets")
    gradients = _table_gradients(
        grad, weights, indices, offsets, mode, per_sample_weights, features, num_features, -1
    )
    return gradients, grad.new_empty(0)


def _table_gradients(
    grad, weights, indices, offsets, mode, per_sample_weights, features, num_features, padding_idx
):
    from mprec.triton_kernels import gradient

    columns = columns_of([weight.shape[1] for weight in weights])
    found: dict[int, Tensor] = {}
    for parts, segments in _sorted(
        weights, indices, offsets, mode, per_sample_weights, features, num_features, padding_idx
    ):
        grads = gradient.weight_gradients(
            [weights[t] for t in parts], segments, plain(grad), [columns[t] for t in parts]
        )
        found |= zip(parts, grads, strict=True)
    return [found[t] for t in range(len(weights))]


def _sorted(weights, indices, offsets, mode, per_sample_weights, features, num_features, padding_idx):
    """(which tables, their entries sorted by row), no feature twice at a time."""
    from mprec.triton_kernels.gradient import sort_entries

    batch = _csr.batch_size(offsets, num_features)
    for parts in rounds(features):
        yield parts, sort_entries(
            [len(weights[t]) for t in parts], indices, offsets, batch, [features[t] for t in parts],
            num_features, mode, per_sample_weights, padding_idx,
        )  # fmt: skip


# ----------------------------------------------------------------------------------- optimizers, other rows


def table_sgd_(weights, grad, indices, offsets, mode, per_sample_weights, padding_idx, features,
               num_features, columns, lr):  # fmt: skip
    indices, offsets = _updates.checked(
        grad, weights, None, indices, offsets, mode, per_sample_weights, features, num_features, columns
    )
    from mprec.triton_kernels import gradient

    for parts, segments in _sorted(
        weights, indices, offsets, mode, per_sample_weights, features, num_features, padding_idx
    ):
        chosen = [weights[t] for t in parts], segments, plain(grad), [columns[t] for t in parts]
        gradient.sgd_(*chosen, lr)
    mutated(*weights)


def table_rowwise_adagrad_(weights, sums, grad, indices, offsets, mode, per_sample_weights, padding_idx,
                           features, num_features, columns, lr, eps):  # fmt: skip
    indices, offsets = _updates.checked(
        grad, weights, sums, indices, offsets, mode, per_sample_weights, features, num_features, columns
    )
    from mprec.triton_kernels import gradient

    for parts, segments in _sorted(
        weights, indices, offsets, mode, per_sample_weights, features, num_features, padding_idx
    ):
        states = [sums[t] for t in parts]
        chosen = segments, plain(grad), [columns[t] for t in parts]
        gradient.rowwise_adagrad_([weights[t] for t in parts], states, *chosen, lr, eps)
    mutated(*weights, *sums)


def quantized_embedding_bag_multi(rows, bits, indices, offsets, mode=0, per_sample_weights=None,
                                  features=None, num_features=None):  # fmt: skip
    """A launch for each kind of rows."""
    indices, offsets, num_features, dims = _quantized.checked(
        rows, bits, indices, offsets, mode, per_sample_weights, features, num_features
    )
    from mprec.triton_kernels import embedding_bag as kernels

    features = list(range(len(rows))) if features is None else list(features)
    batch = _csr.batch_size(offsets, num_features)
    kinds: dict[tuple, list[int]] = {}
    for t, (table, width) in enumerate(zip(rows, bits, strict=True)):
        kind = kernels.FLOAT if table.dtype != torch.uint8 else kernels.INT8 if width == 8 else kernels.INT4
        kinds.setdefault((kind, table.dtype), []).append(t)
    columns = columns_of(dims)
    out = rows[0].new_empty(batch, sum(dims), dtype=torch.float32)
    for (kind, _), parts in kinds.items():
        kernels.embedding_bag_grouped(
            [aligned(rows[t]) for t in parts], indices, offsets, batch, [features[t] for t in parts], mode,
            plain(per_sample_weights), -1, out, [columns[t] for t in parts], kind,
        )  # fmt: skip
    return out
