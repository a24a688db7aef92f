"""``torch.ops.mprec.embedding_bag`` and ``embedding_bag_multi``: schemas, implementations, gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from mprec import reference
from mprec._native import _C
from mprec.names import MODES
from mprec.ops import _autograd, _backward, _csr, fused
from mprec.ops._checks import (
    check_bags,
    check_features,
    check_ids,
    check_mode,
    check_ndim,
    check_per_sample_weights,
    check_same_device,
    check_tables,
    check_weights,
    num_bags,
)
from mprec.ops._common import NATIVE_TABLES, ids, library, plain

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
library.define(
    "embedding_bag_maximal_ids(Tensor[] weights, Tensor indices, Tensor offsets, int padding_idx, "
    "bool include_last_offset, int[] features, int num_features) -> Tensor"
)


# ---------------------------------------------------------------------------------------------- one table


def checked(weight, indices, offsets, mode, per_sample_weights, include_last_offset):
    """``indices`` and ``offsets`` as kernels take them; the checks that need no look at their values."""
    check_same_device(weight=weight, indices=indices, offsets=offsets, per_sample_weights=per_sample_weights)
    check_weights(weight, "weight")
    check_mode(mode, per_sample_weights)
    check_ndim(indices, "indices")
    check_ndim(offsets, "offsets")
    check_per_sample_weights(per_sample_weights, weight.dtype, indices)
    num_bags(offsets, include_last_offset)
    return ids(indices, "indices"), ids(offsets, "offsets")


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
    indices, offsets = checked(weight, indices, offsets, mode, per_sample_weights, include_last_offset)
    if weight.is_cpu and weight.dtype in NATIVE_TABLES:
        csr = _csr.Csr(indices, offsets, per_sample_weights).for_kernels()
        threads = torch.get_num_threads()
        return _C.embedding_bag(plain(weight), *csr, mode, include_last_offset, padding_idx, None, threads)
    return _by_formula(
        weight, indices, offsets, mode, per_sample_weights, include_last_offset, padding_idx, torch.float64
    )


def _by_formula(weight, indices, offsets, mode, per_sample_weights, include_last_offset, padding_idx, dtype):
    if not _autograd.is_batched(offsets):
        check_bags(offsets, len(indices), include_last_offset)
        if not _autograd.is_batched(indices):
            check_ids(indices, offsets, [len(weight)], num_bags(offsets, include_last_offset))
    out = reference.embedding_bag(
        weight, indices, offsets, mode, per_sample_weights, include_last_offset, padding_idx, dtype=dtype
    )
    return out.to(weight.dtype)


def _formula(
    weight, indices, offsets, mode, per_sample_weights, include_last_offset, padding_idx, by_freq, sparse
):
    """The operator in plain torch, for what its kernels cannot be asked."""
    indices, offsets = checked(weight, indices, offsets, mode, per_sample_weights, include_last_offset)
    _refuse_in_transforms(offsets, scale_grad_by_freq=by_freq, sparse=sparse)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return _by_formula(
        weight, indices, offsets, mode, per_sample_weights, include_last_offset, padding_idx, dtype
    )


def _refuse_in_transforms(offsets: Tensor, **options: bool) -> None:
    for name, value in options.items():
        if value:
            raise NotImplementedError(
                f"{name}: not with torch.func transforms or forward-mode derivatives, whose gradients are "
                "dense and not scaled"
            )
    if _autograd.is_batched(offsets):
        raise NotImplementedError("offsets: torch.func.vmap cannot map over them; map over input [B, L]")


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
    again=False,
):
    """``again``: in plain torch that can be differentiated once more."""
    indices, offsets = ids(indices, "indices"), ids(offsets, "offsets")
    if (
        need_weight
        and not (need_per_sample_weights or again)
        and _backward.has_native_gradient(weight, mode, scale_grad_by_freq)
    ):
        csr = _csr.Csr(indices, offsets, per_sample_weights)
        gradient = _backward.native_table_gradient(grad, weight, csr, mode, padding_idx, sparse)
        return gradient, grad.new_empty(0)
    if indices.is_cpu and not again:  # plain torch trusts them
        check_bags(offsets, len(indices), include_last_offset)
        check_ids(indices, offsets, [len(weight)], num_bags(offsets, include_last_offset))
    if mode == MODES["max"]:
        chosen = _backward.maximal_ids([weight], indices, offsets, padding_idx, include_last_offset, [0], 1)
        return _backward.maximum_gradient(grad, chosen, weight), grad.new_empty(0)
    keep = None if padding_idx < 0 else indices != padding_idx
    rows = _backward.wide(weight.index_select(0, indices)) if need_per_sample_weights else None
    grad_rows, grad_psw = _backward.pool_backward(
        _backward.wide(grad),
        rows,
        offsets,
        len(indices),
        mode,
        _backward.wide(per_sample_weights),
        include_last_offset,
        keep,
        need_per_sample_weights,
    )
    grad_weight = grad.new_empty(0)
    if need_weight:
        grad_weight = _backward.table_gradient(
            grad_rows, indices, weight, padding_idx, scale_grad_by_freq, sparse, again
        )
    if need_per_sample_weights:
        return grad_weight, grad_psw.to(
            grad.dtype if per_sample_weights is None else per_sample_weights.dtype
        )
    return grad_weight, grad.new_empty(0)


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
    return grad_weight, (grad if per_sample_weights is None else per_sample_weights).new_empty(
        indices.shape if need_per_sample_weights else 0
    )


# ------------------------------------------------------------------------------------ one table per feature


def checked_multi(weights, indices, offsets, mode, per_sample_weights, features, num_features):
    """``indices``, ``offsets``, ``num_features`` as kernels take them; the checks that need no values."""
    check_same_device(
        weights=weights, indices=indices, offsets=offsets, per_sample_weights=per_sample_weights
    )
    check_tables(weights)
    check_features(features, num_features, len(weights))
    check_mode(mode, per_sample_weights)
    check_ndim(indices, "indices")
    check_ndim(offsets, "offsets")
    check_per_sample_weights(per_sample_weights, weights[0].dtype, indices, or_float32=True)
    num_features = len(weights) if num_features is None else num_features
    _csr.batch_size(offsets, num_features)
    return ids(indices, "indices"), ids(offsets, "offsets"), num_features


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
    indices, offsets, num_features = checked_multi(
        weights, indices, offsets, mode, per_sample_weights, features, num_features
    )
    if weights[0].is_cpu and weights[0].dtype in NATIVE_TABLES:
        csr = _csr.Csr(indices, offsets, per_sample_weights).for_kernels()
        return _C.embedding_bag_multi(
            [plain(weight) for weight in weights],
            *csr,
            mode,
            -1,
            None,
            None,
            torch.get_num_threads(),
            features=features,
            num_features=num_features,
        )
    return _multi_by_formula(
        weights, indices, offsets, mode, per_sample_weights, features, num_features, torch.float64
    )


def _multi_by_formula(weights, indices, offsets, mode, per_sample_weights, features, num_features, dtype):
    batch = _csr.batch_size(offsets, num_features)
    features = list(range(num_features)) if features is None else list(features)
    check_bags(offsets, len(indices), True, num_features)
    if not _autograd.is_batched(indices):
        check_ids(indices, offsets, [len(weight) for weight in weights], batch, features, num_features)
    out = reference.embedding_bag_multi(
        weights, indices, offsets, mode, per_sample_weights, features, num_features, dtype=dtype
    )
    return out.to(weights[0].dtype)


def _multi_formula(weights, indices, offsets, mode, per_sample_weights, features, num_features, sparse):
    indices, offsets, num_features = checked_multi(
        weights, indices, offsets, mode, per_sample_weights, features, num_features
    )
    _refuse_in_transforms(offsets, sparse=sparse)
    dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    return _multi_by_formula(
        weights, indices, offsets, mode, per_sample_weights, features, num_features, dtype
    )


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
    again=False,
):
    csr = _csr.Csr(ids(indices, "indices"), ids(offsets, "offsets"), per_sample_weights)
    psw_like = grad if per_sample_weights is None else per_sample_weights
    grad_psw = psw_like.new_zeros(indices.shape if need_per_sample_weights else 0)
    if not (again or sparse or need_per_sample_weights) and all(
        _backward.has_native_gradient(weight, mode, False) for weight in weights
    ):
        csr = _csr.select(csr.for_kernels(), features, num_features)
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
            csr.indices[begin:end],
            starts,
            mode,
            psw,
            True,
            -1,
            False,
            sparse,
            True,
            need_per_sample_weights,
            again,
        )
        grads.append(grad_weight)
        if need_per_sample_weights:  # a feature may serve several tables
            grad_psw = grad_psw + pad(grad_part, (begin, len(grad_psw) - end))
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
    psw_like = grad if per_sample_weights is None else per_sample_weights
    grad_psw = psw_like.new_empty(indices.shape if need_per_sample_weights else 0)
    return [torch.empty_like(weight) for weight in weights], grad_psw


# ------------------------------------------------------------------------------------------------ gradients


class _Pooling(torch.autograd.Function):
    """Either operator: its result by kernels, its gradients by kernels or (of a gradient's own) by formula.

    Saved are the tables only where a gradient reads them, that is for per-sample weights: otherwise backward
    passes go on after a table was updated in place, as torch's do. Of a maximum the IDs it was taken from.
    """

    @staticmethod
    def forward(ctx, op, keyset, options, mode, indices, offsets, psw, *weights):
        single = op is torch.ops.mprec.embedding_bag.default
        out = _autograd.below(
            op, keyset, weights[0] if single else weights, indices, offsets, mode, psw, *options
        )
        ctx.single, ctx.mode, ctx.options, ctx.tables = single, mode, options, weights
        chosen = None
        if mode == MODES["max"]:
            include_last, padding_idx = (options[0], options[1]) if single else (True, -1)
            features, num_features = ([0], 1) if single else _features(weights, options)
            chosen = torch.ops.mprec.embedding_bag_maximal_ids(
                [weight.detach() for weight in weights], indices, offsets, padding_idx, include_last,
                features, num_features,
            )  # fmt: skip
        reads = psw is not None and psw.requires_grad
        ctx.save_for_backward(indices, offsets, psw, chosen, *(weights if reads else ()))
        return out

    @staticmethod
    def backward(ctx, grad):
        indices, offsets, psw, chosen, *weights = ctx.saved_tensors
        weights = weights or ctx.tables
        need_psw = ctx.needs_input_grad[6]
        nodes = [node for node, _ in ctx.next_functions[-len(weights) :]]
        fates = [
            fused.fate(weight, node) if wanted else fused.SKIP
            for weight, node, wanted in zip(weights, nodes, ctx.needs_input_grad[7:], strict=True)
        ]
        grads, grad_psw = [None] * len(weights), None
        again = _autograd.differentiate_again(grad, psw, *weights)
        if ctx.mode == MODES["max"]:
            parts = zip(
                grad.split([weight.shape[1] for weight in weights], dim=1),
                chosen.split([weight.shape[1] for weight in weights], dim=1),
                weights,
                strict=True,
            )
            grads = [_backward.maximum_gradient(*part) for part in parts]
        elif need_psw or fused.RETURN in fates:
            grads, grad_psw = _gradients(
                ctx, grad, weights, indices, offsets, psw, fused.RETURN in fates, need_psw, again
            )
        owners = [fate if isinstance(fate, fused.Owned) else None for fate in fates]
        if any(owners):
            csr = _csr.Csr(indices, offsets, psw)
            by_freq = ctx.single and ctx.options[2]
            bags = (ctx.options[1], [0], 1) if ctx.single else (-1, *_features(weights, ctx.options))
            fused.contribute(weights, owners, csr, ctx.mode, grad, *bags, scale_grad_by_freq=by_freq)
        grads = [g if fate is fused.RETURN else None for fate, g in zip(fates, grads, strict=True)]
        return None, None, None, None, None, None, grad_psw if need_psw else None, *grads


def _features(weights, options) -> tuple[list[int], int]:
    features, num_features, _ = options
    features = list(range(len(weights))) if features is None else list(features)
    return features, len(weights) if num_features is None else num_features


def _gradients(ctx, grad, weights, indices, offsets, psw, need_weight, need_psw, again):
    """Those of all tables, and of the per-sample weights."""
    if ctx.single:
        backward = torch.ops.mprec.embedding_bag_backward
        arguments = grad, weights[0], indices, offsets, ctx.mode, psw, *ctx.options, need_weight, need_psw
        function = _embedding_bag_backward
    else:
        backward = torch.ops.mprec.embedding_bag_multi_backward
        features, num_features = _features(weights, ctx.options)
        sparse = ctx.options[2]
        arguments = (
            grad, weights, indices, offsets, ctx.mode, psw, features, num_features, sparse, need_psw,
        )  # fmt: skip
        function = _embedding_bag_multi_backward
    grads, grad_psw = function(*arguments, again=True) if again else backward(*arguments)
    return [grads] if ctx.single else grads, grad_psw


def _differentiable(op, keyset, weight, indices, offsets, mode, psw, *options):
    weights = [weight] if isinstance(weight, Tensor) else weight
    return _Pooling.apply(op, keyset, options, mode, indices, offsets, psw, *weights)


def _maximal_ids_fake(weights, indices, offsets, padding_idx, include_last_offset, features, num_features):
    batch = (offsets.shape[0] - include_last_offset) // num_features
    return indices.new_empty(batch, sum(weight.shape[1] for weight in weights), dtype=torch.int64)


for _name, _function, _fake in (
    ("embedding_bag", _embedding_bag, _embedding_bag_fake),
    ("embedding_bag_backward", _embedding_bag_backward, _embedding_bag_backward_fake),
    ("embedding_bag_multi", _embedding_bag_multi, _embedding_bag_multi_fake),
    ("embedding_bag_multi_backward", _embedding_bag_multi_backward, _embedding_bag_multi_backward_fake),
    ("embedding_bag_maximal_ids", _backward.maximal_ids, _maximal_ids_fake),
):
    # CompositeExplicitAutograd: one implementation for every device; it asks the tensors where they are.
    library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mprec::{_name}", _fake, lib=library)
_autograd.register("embedding_bag", _differentiable, _formula)
_autograd.register("embedding_bag_multi", _differentiable, _multi_formula)
