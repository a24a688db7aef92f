"""Gradients of look-ups: by kernels, in plain torch, or handed to an optimizer."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mprec.bags import Bags, new
from mprec.kernels import kernel
from mprec.names import MODES
from mprec.ops import _autograd, _backward, fused
from mprec.ops._common import NATIVE_TABLES
from mprec.ops._table import OPS, Op
from mprec.ops._table_calls import Tables


class Gradients(NamedTuple):
    """The call of a gradient: of tables given ``grad`` ``[B, sum D]``, and of per-sample weights."""

    grad: Tensor
    of: Tables
    need_tables: bool
    need_weights: bool

    @property
    def device(self) -> str:
        return self.of.device

    @property
    def is_dense_sum(self) -> bool:
        """Whether dense gradients of tables are all there is to compute, and not those of maxima."""
        of = self.of
        return of.bags.mode != MODES["max"] and not (of.by_freq or of.sparse or self.need_weights)

    def without_weights(self) -> Tensor:
        """What stands for the gradient of weights where it is not needed."""
        return self._like().new_empty(0)

    def _like(self) -> Tensor:
        psw = self.of.bags.per_sample_weights
        return self.grad if psw is None else psw


def check_gradient(call: Gradients) -> Gradients:
    grad, (tables, bags, by_freq, sparse, _), need_tables, need_weights = call
    of = new(Tables, (tables, bags.of_kernels(), by_freq, sparse, None))
    return new(Gradients, (grad, of, need_tables, need_weights))


def fake_gradient(call: Gradients) -> tuple[list[Tensor], Tensor]:
    need, bags = call.need_weights, call.of.bags
    grads = [torch.empty_like(t) if call.need_tables else call.grad.new_empty(0) for t in call.of.tables]
    return grads, call._like().new_empty(bags.indices.shape if need else 0)


def _has_native_gradient(call: Gradients) -> bool:
    of = call.of
    return (
        call.need_tables
        and not call.need_weights
        and not of.by_freq
        and of.bags.mode != MODES["max"]
        and all(table.dtype in NATIVE_TABLES for table in of.tables)
    )


def _columns(tensor: Tensor, of: Tables) -> Sequence[Tensor]:
    """Those of each table, of ``tensor`` ``[B, sum D]``."""
    return (tensor,) if len(of.tables) == 1 else tensor.split(of.dims, dim=1)


@kernel("embedding_bag_backward", "embedding_bag_multi_backward", device="cpu", supports=_has_native_gradient)
def _native_gradient(call: Gradients) -> tuple[list[Tensor], Tensor]:
    tables, bags = call.of.tables, call.of.bags.with_float_weights()
    if not call.of.sparse:
        bags = bags.only(bags.features)
        return _backward.native_dense_gradients(call.grad, tables, bags), call.without_weights()
    parts = zip(_columns(call.grad, call.of), tables, bags.parts(len(tables)), strict=True)
    grads = [_backward.native_sparse_gradient(grad, table, part) for grad, table, (_, _, part) in parts]
    return grads, call.without_weights()


def plain_gradient(call: Gradients, again: bool = False) -> tuple[list[Tensor], Tensor]:
    """In plain torch. ``again``: by operators that can be differentiated once more."""
    tables, bags = call.of.tables, call.of.bags
    if bags.indices.is_cpu and not again:  # plain torch trusts them
        bags.check_offsets()
        bags.check_ids([len(table) for table in tables])
    columns, grads = _columns(call.grad, call.of), []
    grad_psw = call._like().new_zeros(bags.indices.shape if call.need_weights else 0)
    for grad, table, (begin, end, part) in zip(columns, tables, bags.parts(len(tables)), strict=True):
        if part.mode == MODES["max"]:
            grads.append(_backward.maximum_gradient(grad, _backward.maximal_ids([table], part), table))
            continue
        grad_rows, grad_part = _backward.pool_backward(
            grad, table.index_select(0, part.indices) if call.need_weights else None, part
        )
        grads.append(
            _backward.table_gradient(grad_rows, table, part, call.of.by_freq, call.of.sparse, again)
            if call.need_tables
            else grad.new_empty(0)
        )
        if call.need_weights:  # a feature may serve several tables
            before, after = begin, len(grad_psw) - end
            grad_psw = grad_psw + torch.nn.functional.pad(grad_part.to(grad_psw.dtype), (before, after))
    return grads, grad_psw


class Pooling(torch.autograd.Function):
    """The result by kernels, its gradients by kernels or (of a gradient's own) by formula.

    Saved are the tables only where a gradient reads them, that is for per-sample weights: otherwise backward
    passes go on after a table was updated in place, as torch's do. Of a maximum the IDs it was taken from.
    """

    @staticmethod
    def apply_to(op: Op, keyset, *arguments):
        call = op.make_call(*arguments)
        indices, offsets, _, psw, *_ = call.bags
        return Pooling.apply(op, keyset, arguments, call, indices, offsets, psw, *call.tables)

    @staticmethod
    def forward(ctx, op, keyset, arguments, call, indices, offsets, psw, *tables):
        unseen = op.is_unseen(call, indices, offsets, psw, *tables)
        out = op.serve(call) if unseen else op.below(keyset, arguments)
        bags = call.bags
        chosen = None
        if bags.mode == MODES["max"]:
            chosen = torch.ops.mprec.embedding_bag_maximal_ids(
                [table.detach() for table in tables], bags.indices, bags.offsets, bags.padding_idx,
                bags.include_last_offset, bags.served(len(tables)), bags.num_features,
            )  # fmt: skip
        ctx.op, ctx.tables = op, tables
        ctx.bags, ctx.rest = (bags.mode, *bags[4:]), call[2:]
        reads = psw is not None and psw.requires_grad
        ctx.save_for_backward(indices, offsets, psw, chosen, *(tables if reads else ()))
        return out

    @staticmethod
    def backward(ctx, grad):
        indices, offsets, psw, chosen, *tables = ctx.saved_tensors
        tables = tables or ctx.tables
        mode, *others = ctx.bags
        bags = new(Bags, (indices, offsets, mode, psw, *others))
        call = new(Tables, (tables, bags, *ctx.rest))
        need_psw = ctx.needs_input_grad[6]
        nodes = [node for node, _ in ctx.next_functions[-len(tables) :]]
        fates = [
            fused.fate(table, node) if wanted else fused.SKIP
            for table, node, wanted in zip(tables, nodes, ctx.needs_input_grad[7:], strict=True)
        ]
        grads, grad_psw = [None] * len(tables), None
        if bags.mode == MODES["max"]:
            parts = zip(_columns(grad, call), _columns(chosen, call), tables, strict=True)
            grads = [_backward.maximum_gradient(*part) for part in parts]
        elif need_psw or fused.RETURN in fates:
            of = new(Gradients, (grad, call, fused.RETURN in fates, need_psw))
            if _autograd.differentiate_again(grad, psw, *tables):
                grads, grad_psw = plain_gradient(check_gradient(of), again=True)
            else:
                grads, grad_psw = _by_operator(ctx.op, of)
        owners = [fate if isinstance(fate, fused.Owned) else None for fate in fates]
        if any(owners):
            fused.contribute(tables, owners, bags, grad, scale_grad_by_freq=call.by_freq)
        grads = [g if fate is fused.RETURN else None for fate, g in zip(fates, grads, strict=True)]
        return None, None, None, None, None, None, grad_psw if need_psw else None, *grads


def _by_operator(op: Op, call: Gradients) -> tuple[list[Tensor], Tensor | None]:
    """Where someone watches, through the dispatcher: compilers see one operator."""
    (tables, bags, by_freq, sparse, _), need_psw = call.of, call.need_weights
    backward = OPS[f"{op.name}_backward"]
    if backward.is_unseen(call, call.grad, bags.indices, bags.offsets, bags.per_sample_weights, *tables):
        grads, grad_psw = backward.serve(call)
        return [grads] if op.name == "embedding_bag" else grads, grad_psw
    if op.name == "embedding_bag":
        grad, grad_psw = torch.ops.mprec.embedding_bag_backward(
            call.grad, tables[0], bags.indices, bags.offsets, bags.mode, bags.per_sample_weights,
            bags.include_last_offset, bags.padding_idx, by_freq, sparse, call.need_tables, need_psw,
        )  # fmt: skip
        return [grad], grad_psw
    return torch.ops.mprec.embedding_bag_multi_backward(
        call.grad, tables, bags.indices, bags.offsets, bags.mode, bags.per_sample_weights,
        bags.served(len(tables)), bags.num_features, sparse, need_psw,
    )  # fmt: skip
