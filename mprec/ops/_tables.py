"""``torch.ops.mprec.embedding_bag`` and ``embedding_bag_multi``: schemas, implementations, gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mprec import reference
from mprec._native import _C
from mprec.names import MODES
from mprec.ops import _backward, _csr, fused
from mprec.ops._common import (
    NATIVE_TABLES,
    buffer,
    check_bags,
    check_ids,
    check_per_sample_weights,
    check_same_device,
    check_weights,
    contiguous,
    ids,
    library,
    native,
    needs_grad,
    num_bags,
    passed_only,
)

library.define(
    "embedding_bag(Tensor weight, Tensor indices, Tensor offsets, int mode=0, Tensor? "
    "per_sample_weights=None, "
    "bool include_last_offset=False, int padding_idx=-1, bool scale_grad_by_freq=False, bool "
    "sparse=False) -> Tensor"
)
library.define(
    "embedding_bag_backward(Tensor grad, Tensor weight, Tensor indices, Tensor offsets, int mode, "
    "Tensor? per_sample_weights, bool include_last_offset, int padding_idx, bool scale_grad_by_freq, "
    "bool sparse, "
    "bool need_weight, bool need_per_sample_weights) -> (Tensor, Tensor)"
)
library.define(
    "embedding_bag_multi(Tensor[] weights, Tensor indices, Tensor offsets, int mode=0, "
    "Tensor? per_sample_weights=None, int[]? features=None, int? num_features=None, bool sparse=False) "
    "-> Tensor"
)
library.define(
    "embedding_bag_multi_backward(Tensor grad, Tensor[] weights, Tensor indices, Tensor offsets, int mode, "
    "Tensor? per_sample_weights, int[] features, int num_features, bool sparse, bool "
    "need_per_sample_weights) "
    "-> (Tensor[], Tensor)"
)


# ---------------------------------------------------------------------------------------------- one table


def run_embedding_bag(
    weight, indices, offsets, mode, per_sample_weights, include_last_offset, padding_idx, out=None
):
    """The native kernel: one table on the CPU of a dtype in ``NATIVE_TABLES``; weights in float32."""
    out = buffer(out, num_bags(offsets, include_last_offset), weight.shape[1], weight.dtype)
    _C.embedding_bag(
        weight,
        indices,
        offsets,
        per_sample_weights,
        mode,
        include_last_offset,
        padding_idx,
        out,
        torch.get_num_threads(),
    )
    return out


def _float32(per_sample_weights: Tensor | None) -> Tensor | None:
    return None if per_sample_weights is None else contiguous(per_sample_weights.to(torch.float32))


def _embedding_bag(
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
    check_same_device(weight=weight, indices=indices, offsets=offsets, per_sample_weights=per_sample_weights)
    check_weights(weight, "weight")
    indices, offsets = ids(indices, "indices"), ids(offsets, "offsets")
    check_per_sample_weights(per_sample_weights, weight, indices)
    if weight.is_cpu and weight.dtype in NATIVE_TABLES:
        return run_embedding_bag(
            contiguous(weight),
            indices,
            offsets,
            mode,
            _float32(per_sample_weights),
            include_last_offset,
            padding_idx,
        )
    check_bags(offsets, len(indices), include_last_offset)
    check_ids(indices, len(weight))
    out = reference.embedding_bag(
        weight, indices, offsets, mode, per_sample_weights, include_last_offset, padding_idx
    )
    return out.to(weight.dtype)


def _embedding_bag_fake(
    weight,
    indices,
    offsets,
    mode=0,
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=-1,
    scale_grad_by_freq=False,
    sparse=False,
):
    return weight.new_empty(offsets.shape[0] - include_last_offset, weight.shape[1])


def _embedding_bag_backward(
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
    if (
        need_weight
        and not need_per_sample_weights
        and _backward.has_native_gradient(grad, weight, mode, scale_grad_by_freq)
    ):
        gradient = _backward.native_table_gradient(
            grad, weight, indices, offsets, mode, per_sample_weights, padding_idx, sparse
        )
        return gradient, grad.new_empty(0)
    keep = None if padding_idx < 0 else indices != padding_idx
    rows = weight[indices] if need_per_sample_weights or mode == MODES["max"] else None
    grad_rows, grad_psw = _backward.pool_backward(
        grad,
        rows,
        offsets,
        len(indices),
        mode,
        per_sample_weights,
        include_last_offset,
        keep,
        need_per_sample_weights,
    )
    grad_weight = grad.new_empty(0)
    if need_weight:
        grad_weight = _backward.table_gradient(
            grad_rows, indices, len(weight), padding_idx, scale_grad_by_freq, sparse
        )
    return grad_weight, grad.new_empty(0) if grad_psw is None else grad_psw


def _embedding_bag_backward_fake(
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
    grad_weight = torch.empty_like(weight) if need_weight else grad.new_empty(0)
    return grad_weight, grad.new_empty(indices.shape if need_per_sample_weights else 0)


def _save(ctx, tables: Sequence[Tensor], indices: Tensor, offsets: Tensor, psw: Tensor | None, mode: int):
    """For `_saved`. Only a maximum's gradient, and that of weights per sample, read the tables: others go
    through after a table was updated in place, as torch's do."""
    reads_tables = mode == MODES["max"] or (psw is not None and psw.requires_grad)
    ctx.tables = None if reads_tables else tables
    ctx.save_for_backward(indices, offsets, psw, *(tables if reads_tables else ()))


def _saved(ctx) -> tuple[Sequence[Tensor], Tensor, Tensor, Tensor | None]:
    indices, offsets, psw, *tables = ctx.saved_tensors
    return tables if ctx.tables is None else ctx.tables, indices, offsets, psw


def _setup(ctx, inputs, output):
    weight, indices, offsets, mode, psw, include_last, padding_idx, by_freq, sparse = inputs
    _save(ctx, [weight], indices, offsets, psw, mode)
    ctx.options = mode, include_last, padding_idx, by_freq, sparse


def _backward_of_embedding_bag(ctx, grad):
    (weight,), indices, offsets, psw = _saved(ctx)
    mode, include_last, padding_idx, by_freq, sparse = ctx.options
    need_weight, need_psw = needs_grad(ctx, 0), needs_grad(ctx, 4)
    owner = fused.attached(weight) if need_weight else None
    need_weight = need_weight and owner is None
    grad_weight = grad_psw = None
    if need_weight or need_psw:
        grad_weight, grad_psw = torch.ops.mprec.embedding_bag_backward(
            grad,
            weight,
            indices,
            offsets,
            mode,
            psw,
            include_last,
            padding_idx,
            by_freq,
            sparse,
            need_weight,
            need_psw,
        )
    if owner is not None:
        if by_freq:
            raise NotImplementedError("scale_grad_by_freq: not for tables that an optimizer of mprec owns")
        fused.apply([weight], [owner], _csr.Csr(indices, offsets, psw), mode, padding_idx, grad)
    grad_psw = grad_psw if need_psw else None
    grad_weight = grad_weight if need_weight else None
    return passed_only(ctx, grad_weight, None, None, None, grad_psw, None, None, None, None)


# ------------------------------------------------------------------------------------ one table per feature


def run_embedding_bag_multi(
    weights,
    indices,
    offsets,
    mode,
    per_sample_weights,
    out,
    out_columns,
    features=None,
    num_features=None,
    bits=None,
    threads=None,
):
    """The native kernel: tables on the CPU into columns of ``out``; dtypes as for one table.

    Tables of uint8 are quantised rows of ``bits[t]`` bits per value, in FBGEMM's fused layout.
    """
    if features is not None:
        csr = _csr.Csr(indices, offsets, per_sample_weights)
        indices, offsets, per_sample_weights = _csr.select(csr, features, num_features)
    _C.embedding_bag_multi(
        weights,
        indices,
        offsets,
        per_sample_weights,
        mode,
        -1,
        out,
        out_columns,
        threads or torch.get_num_threads(),
        bits,
    )
    return out


def _embedding_bag_multi(
    weights: Sequence[Tensor],
    indices: Tensor,
    offsets: Tensor,
    mode: int = 0,
    per_sample_weights: Tensor | None = None,
    features: Sequence[int] | None = None,
    num_features: int | None = None,
    sparse: bool = False,
) -> Tensor:
    check_same_device(
        weights=weights, indices=indices, offsets=offsets, per_sample_weights=per_sample_weights
    )
    for t, weight in enumerate(weights):
        check_weights(weight, f"weights[{t}]")
        if weight.dtype != weights[0].dtype:
            raise TypeError(f"weights[{t}]: expected {weights[0].dtype} as weights[0], got {weight.dtype}")
    indices, offsets = ids(indices, "indices"), ids(offsets, "offsets")
    check_per_sample_weights(per_sample_weights, weights[0], indices)
    num_features = len(weights) if num_features is None else num_features
    batch = _csr.batch_size(offsets, num_features)
    if weights[0].is_cpu and weights[0].dtype in NATIVE_TABLES:
        weights = [contiguous(weight) for weight in weights]
        out = torch.empty(batch, sum(weight.shape[1] for weight in weights), dtype=weights[0].dtype)
        psw = _float32(per_sample_weights)
        return run_embedding_bag_multi(
            weights, indices, offsets, mode, psw, out, None, features, num_features
        )
    check_bags(offsets, len(indices), True)
    features = range(num_features) if features is None else features
    csr = _csr.Csr(indices, offsets, per_sample_weights)
    for t, (begin, end, _) in enumerate(_csr.feature_slices(csr, features, num_features)):
        check_ids(indices[begin:end], len(weights[t]), f"indices of weights[{t}]")
    out = reference.embedding_bag_multi(
        weights, indices, offsets, mode, per_sample_weights, features, num_features
    )
    return out.to(weights[0].dtype)


def _embedding_bag_multi_fake(
    weights,
    indices,
    offsets,
    mode=0,
    per_sample_weights=None,
    features=None,
    num_features=None,
    sparse=False,
):
    batch = (offsets.shape[0] - 1) // (len(weights) if num_features is None else num_features)
    return weights[0].new_empty(batch, sum(weight.shape[1] for weight in weights))


def _embedding_bag_multi_backward(
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
    csr = _csr.Csr(ids(indices, "indices"), ids(offsets, "offsets"), contiguous(per_sample_weights))
    grad_psw = grad.new_zeros(indices.shape if need_per_sample_weights else 0)
    if (
        grad.is_cpu
        and native(grad, *weights)
        and mode != MODES["max"]
        and not (sparse or need_per_sample_weights)
    ):
        csr = _csr.select(csr, features, num_features)
        return _backward.native_dense_gradients(grad, weights, csr, mode), grad_psw
    grads = []
    columns = grad.split([weight.shape[1] for weight in weights], dim=1)
    for weight, part, (begin, end, starts) in zip(
        weights, columns, _csr.feature_slices(csr, features, num_features), strict=True
    ):
        psw = None if per_sample_weights is None else per_sample_weights[begin:end]
        grad_weight, grad_part = _embedding_bag_backward(
            part,
            weight,
            indices[begin:end],
            starts,
            mode,
            psw,
            True,
            -1,
            False,
            sparse,
            True,
            need_per_sample_weights,
        )
        grads.append(grad_weight)
        if need_per_sample_weights:
            grad_psw[begin:end] = grad_part
    return grads, grad_psw


def _embedding_bag_multi_backward_fake(
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
    grad_psw = grad.new_empty(indices.shape if need_per_sample_weights else 0)
    return [torch.empty_like(weight) for weight in weights], grad_psw


def _setup_multi(ctx, inputs, output):
    weights, indices, offsets, mode, psw, features, num_features, sparse = inputs
    _save(ctx, weights, indices, offsets, psw, mode)
    features = list(range(len(weights))) if features is None else list(features)
    ctx.options = features, len(weights) if num_features is None else num_features, mode, sparse


def _backward_of_multi(ctx, grad):
    weights, indices, offsets, psw = _saved(ctx)
    features, num_features, mode, sparse = ctx.options
    need_psw = needs_grad(ctx, 4)
    owners = [fused.attached(weight) for weight in weights]
    if need_psw or not all(owners):
        grads, grad_psw = torch.ops.mprec.embedding_bag_multi_backward(
            grad, weights, indices, offsets, mode, psw, features, num_features, sparse, need_psw
        )
    else:
        grads, grad_psw = [None] * len(weights), None
    if any(owners):
        csr = _csr.Csr(indices, offsets, psw)
        fused.apply(weights, owners, csr, mode, -1, grad, features, num_features)
        grads = [None if owner else g for owner, g in zip(owners, grads, strict=True)]
    grad_psw = grad_psw if need_psw else None
    return passed_only(ctx, grads, None, None, None, grad_psw, None, None, None)


for _name, _forward, _forward_fake, _gradient, _gradient_fake, _backward_formula, _context in (
    (
        "embedding_bag",
        _embedding_bag,
        _embedding_bag_fake,
        _embedding_bag_backward,
        _embedding_bag_backward_fake,
        _backward_of_embedding_bag,
        _setup,
    ),
    (
        "embedding_bag_multi",
        _embedding_bag_multi,
        _embedding_bag_multi_fake,
        _embedding_bag_multi_backward,
        _embedding_bag_multi_backward_fake,
        _backward_of_multi,
        _setup_multi,
    ),
):
    # CompositeExplicitAutograd: one implementation for every device; it asks the tensors where they are.
    library.impl(_name, _forward, "CompositeExplicitAutograd")
    library.impl(f"{_name}_backward", _gradient, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mprec::{_name}", _forward_fake, lib=library)
    torch.library.register_fake(f"mprec::{_name}_backward", _gradient_fake, lib=library)
    torch.library.register_autograd(f"mprec::{_name}", _backward_formula, setup_context=_context, lib=library)
