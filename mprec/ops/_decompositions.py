"""Operators as plain torch, for exporters that know only aten's: ``torch.onnx.export`` finds these by itself.

They compute in the weights' precision and check neither IDs nor offsets. torch also asks the table of
decompositions for the shapes of results; those are the fakes' business, here and now as without this file.
Inductor is to call the kernels instead. Where the environment names ``CI`` it refuses to call an operator
that has a decomposition, unless it was told to: so it is told.
"""

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch._library.utils import get_layout_constraint_tag
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from mprec import reference
from mprec.bags import Bags
from mprec.names import MODES
from mprec.ops import _dense as _dense
from mprec.ops import _dhe as _dhe
from mprec.ops import _tables as _tables
from mprec.ops._table import OPS


def _decompose(name: str, formula: Callable) -> None:
    """``formula``: from the operator's call to its result."""
    op = OPS[name]

    def decomposition(*arguments, **options):
        call = op.call(*op.positional(arguments, options))
        return (op.shape if get_proxy_mode() is None else formula)(call)

    register_decomposition(op.overload)(decomposition)

    def fake(call, of_op=op.fake):
        _call_from_inductor(op.overload)
        return of_op(call)

    op.fake = fake


def _call_from_inductor(overload) -> None:
    """Inductor is told to call the kernel, as soon as it has been imported (it takes seconds) and traces."""
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is not None and overload not in lowering.lowerings:
        layout = lowering.tag_to_layout_constraint(get_layout_constraint_tag(overload))
        lowering.make_fallback(overload, layout_constraint=layout, warn=False)


def _bag_of_each(starts: Tensor, count: int) -> Tensor:
    """The bag of each of ``count`` positions, from where bags start ``[bags]``: how many later bags have
    started by then. (A search would be shorter, but exporters have none.)"""
    marks = starts.new_zeros(count + 1, dtype=torch.int64)
    later = starts[1:].to(torch.int64)
    return marks.scatter_add(0, later, torch.ones_like(later)).cumsum(0)[:count]


def _pool(
    rows: Tensor, bag: Tensor, bags: int, mode: int, weights: Tensor | None, keep: Tensor | None = None
) -> Tensor:
    """Vectors ``[n, D]`` pooled into ``[bags, D]``; those not to ``keep`` are left out."""
    where = bag[:, None].expand(-1, rows.shape[1])
    zeros = rows.new_zeros(bags, rows.shape[1])
    if mode == MODES["max"]:
        if keep is not None:
            rows = torch.where(keep[:, None], rows, -torch.inf)
        top = torch.full_like(zeros, -torch.inf).scatter_reduce(0, where, rows, "amax")
        return torch.where(top == -torch.inf, 0.0, top)
    if weights is not None:
        rows = rows * weights.to(rows.dtype)[:, None]
    ones = rows.new_ones(rows.shape[0])
    if keep is not None:
        rows, ones = torch.where(keep[:, None], rows, 0.0), keep.to(rows.dtype)
    total = zeros.scatter_add(0, where, rows)
    if mode == MODES["mean"]:
        total = total / rows.new_zeros(bags).scatter_add(0, bag, ones).clamp(min=1)[:, None]
    return total


def _parts(bags: Bags, count: int) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Of each of ``count`` parts its IDs ``[n]``, and what pools their vectors ``[n, D]``."""
    samples, mode, weights = bags.batch, bags.mode, bags.per_sample_weights
    starts = bags.offsets[: samples * bags.num_features]
    bag = _bag_of_each(starts, bags.indices.shape[0])
    if bags.num_features == 1:
        keep = bags.positions_kept()
        yield from [(bags.indices, lambda rows: _pool(rows, bag, samples, mode, weights, keep))] * count
        return
    for f in bags.served(count):
        at = ((bag >= f * samples) & (bag < (f + 1) * samples)).nonzero()[:, 0]
        own, psw = bag[at] - f * samples, None if weights is None else weights[at]
        yield bags.indices[at], lambda rows, own=own, psw=psw: _pool(rows, own, samples, mode, psw)


def _look_up(call) -> Tensor:
    parts = zip(call.tables, _parts(call.bags, len(call.tables)), strict=True)
    pooled = [pool(table[ids]) for table, (ids, pool) in parts]
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)


def _decode(call) -> Tensor:
    parts = zip(call.stacks, _parts(call.bags, len(call.stacks)), strict=True)
    pooled = [
        pool(reference.dhe(ids, *stack, *call.options, dtype=call.dtype)) for stack, (ids, pool) in parts
    ]
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)


for _name, _formula in {
    "embedding_bag": _look_up,
    "embedding_bag_multi": _look_up,
    "dhe_bag": _decode,
    "dhe_bag_multi": _decode,
    "mlp": OPS["mlp"].formula,
    "dot_interaction": OPS["dot_interaction"].formula,
}.items():
    _decompose(_name, _formula)
