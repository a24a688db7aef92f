"""Gradients of pooling: native on the CPU but for float64 tables, plain torch for everything else."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mprec import reference
from mprec._native import _C
from mprec.bags import Bags
from mprec.names import MODES
from mprec.ops._updates import update_tables


def wide(tensor: Tensor | None) -> Tensor | None:
    """16-bit numbers in float32: sums of gradients run there and are rounded once."""
    is_narrow = tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.to(torch.float32) if is_narrow else tensor


def pool_backward(grad: Tensor, rows: Tensor | None, bags: Bags) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``reference.pool`` of one feature's bags: for its rows ``[n, D]``, and for its weights
    ``[n]`` if ``rows`` are given.

    A maximum needs ``rows``, and has no weights. Plain torch: the result can be differentiated again.
    """
    grad, rows, keep = wide(grad), wide(rows), bags.positions_kept()
    count, num_bags = len(bags.indices), bags.batch
    bag = reference.bag_ids(bags.offsets, count, num_bags)
    if bags.mode == MODES["max"]:
        chosen = reference.maxima(rows.detach(), bag, num_bags, keep)
        to = grad.new_zeros(count + 1, grad.shape[1])  # the last row: of empty bags
        return to.scatter_add(0, chosen, grad)[:count], None
    grad_rows = grad.index_select(0, bag)
    if keep is not None:
        grad_rows = torch.where(keep[:, None], grad_rows, 0)
    if bags.mode == MODES["mean"]:
        sizes = reference.bag_sizes(bag, num_bags, keep).clamp(min=1)
        grad_rows = grad_rows / sizes[bag].to(grad.dtype)[:, None]
    grad_weights = None if rows is None else (grad_rows * rows).sum(1)
    if bags.per_sample_weights is not None:
        grad_rows = grad_rows * wide(bags.per_sample_weights)[:, None]
    return grad_rows, grad_weights


def maximal_ids(tables: Sequence[Tensor], bags: Bags) -> Tensor:
    """The IDs whose rows the bags' maxima were taken from: int64 ``[B, sum D]``, -1 where a bag is empty."""
    found = []
    for table, (_, _, part) in zip(tables, bags.with_last_offset().parts(len(tables)), strict=True):
        of_feature = part.indices.to(torch.int64)
        bag = reference.bag_ids(part.offsets, len(of_feature), part.batch)
        rows = table.index_select(0, of_feature)
        chosen = reference.maxima(rows, bag, part.batch, part.positions_kept())
        found.append(torch.nn.functional.pad(of_feature, (0, 1), value=-1)[chosen])
    return torch.cat(found, dim=1)


def maximum_gradient(grad: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    """The dense gradient of a table given ``grad`` ``[B, D]`` and the IDs of :func:`maximal_ids`."""
    taken = torch.where(chosen >= 0, wide(grad), 0)
    columns = torch.arange(grad.shape[1], device=grad.device).expand_as(chosen)
    zeros = taken.new_zeros(weight.shape)
    return zeros.index_put((chosen.clamp(min=0), columns), taken, accumulate=True).to(weight.dtype)


def table_gradient(
    grad_rows: Tensor, weight: Tensor, bags: Bags, scale_grad_by_freq: bool, sparse: bool, again: bool
) -> Tensor:
    """Scatter the gradients of looked-up rows ``[n, D]`` into the gradient of the table.

    ``again``: the result is to be differentiated itself; then by operators that can be.
    """
    indices = bags.indices.to(torch.int64)
    if not again:
        scattered = torch.ops.aten.embedding_backward(
            grad_rows, indices, len(weight), bags.padding_idx, scale_grad_by_freq, sparse
        )
        if sparse and weight.dtype != grad_rows.dtype:
            scattered = scattered.coalesce()  # summed before it is rounded
        return scattered.to(weight.dtype)
    if scale_grad_by_freq:
        times = indices.new_zeros(len(weight)).index_add(0, indices, torch.ones_like(indices))
        grad_rows = grad_rows / times[indices].to(grad_rows.dtype)[:, None]
    if sparse:
        kept = indices != bags.padding_idx
        scattered = torch.sparse_coo_tensor(
            indices[kept][None], grad_rows[kept], weight.shape, check_invariants=False
        )
        return scattered.coalesce().to(weight.dtype) if weight.dtype != grad_rows.dtype else scattered
    return grad_rows.new_zeros(weight.shape).index_add(0, indices, grad_rows).to(weight.dtype)


def native_sparse_gradient(grad: Tensor, weight: Tensor, bags: Bags) -> Tensor:
    """Coalesced, in the table's dtype. Sums run in float32 in the order of the indices, whatever the threads.

    ``bags`` of one feature, as native kernels take them; ``grad`` ``[B, D]``.
    """
    rows, values = row_gradients(grad, len(weight), bags)
    return torch.sparse_coo_tensor(
        rows[None], values.to(weight.dtype), weight.shape, check_invariants=False, is_coalesced=True
    )


def row_gradients(grad: Tensor, num_rows: int, bags: Bags) -> tuple[Tensor, Tensor]:
    """IDs ``[m]``, below ``num_rows``, and float32 gradients ``[m, D]`` of their rows, to be added where an
    ID occurs twice.

    On the CPU IDs rise and occur once; ``bags`` are as native kernels take them.
    """
    if not grad.is_cpu:
        keep = bags.positions_kept()
        rows, _ = pool_backward(grad, None, bags)
        return (bags.indices, rows) if keep is None else (bags.indices[keep], rows[keep])
    rows = torch.empty(len(bags.indices), dtype=torch.int64)
    values = torch.empty(len(bags.indices), grad.shape[1], dtype=torch.float32)
    count = _C.sparse_gradient(
        bags.indices, bags.offsets, bags.per_sample_weights, bags.mode, bags.padding_idx, num_rows,
        _adjacent(grad), rows, values, torch.get_num_threads(),
    )  # fmt: skip
    return rows[:count], values[:count]


def native_dense_gradients(grad: Tensor, weights: Sequence[Tensor], bags: Bags) -> list[Tensor]:
    """Gradients of all tables, in their dtypes, from that of their outputs, side by side ``[B, sum D]``.

    ``bags`` of the tables' features alone, as native kernels take them.
    """
    grads = [torch.zeros(weight.shape, dtype=torch.float32) for weight in weights]
    update_tables("assign", grads, (), bags, _adjacent(grad))
    return [g.to(weight.dtype) for g, weight in zip(grads, weights, strict=True)]


def _adjacent(grad: Tensor) -> Tensor:
    """In float32, with a row's values side by side; the gradient of a sum, say, is one number, expanded."""
    grad = grad.to(torch.float32)
    return grad if grad.stride(1) == 1 else grad.clone(memory_format=torch.contiguous_format)
