"""Gradients of pooling: native on the CPU but for float64 tables, plain torch for everything else."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mprec import reference
from mprec._native import _C
from mprec.names import MODES
from mprec.ops._common import NATIVE_TABLES, ids
from mprec.ops._csr import Csr, feature_slices


def wide(tensor: Tensor | None) -> Tensor | None:
    """16-bit numbers in float32: sums of gradients run there and are rounded once."""
    is_narrow = tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16)
    return tensor.to(torch.float32) if is_narrow else tensor


def pool_backward(
    grad: Tensor,
    rows: Tensor | None,
    offsets: Tensor,
    num_indices: int,
    mode: int,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    keep: Tensor | None,
    need_weights: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``reference.pool`` for its rows ``[n, D]`` and, if ``need_weights``, its weights ``[n]``.

    ``rows`` are needed for the maximum and for the gradient of the weights only. Plain torch: the result can
    be differentiated again.
    """
    num_bags = offsets.numel() - include_last_offset
    bag = reference.bag_ids(offsets, num_indices, num_bags)
    if mode == MODES["max"]:
        chosen = reference.maxima(rows.detach(), bag, num_bags, keep)
        to = grad.new_zeros(num_indices + 1, grad.shape[1])  # the last row: of empty bags
        return to.scatter_add(0, chosen, grad)[:num_indices], None
    grad_rows = grad.index_select(0, bag)
    if keep is not None:
        grad_rows = torch.where(keep[:, None], grad_rows, 0)
    if mode == MODES["mean"]:
        sizes = reference.bag_sizes(bag, num_bags, keep).clamp(min=1)
        grad_rows = grad_rows / sizes[bag].to(grad.dtype)[:, None]
    grad_weights = (grad_rows * rows).sum(1) if need_weights else None
    if per_sample_weights is not None:
        grad_rows = grad_rows * per_sample_weights[:, None]
    return grad_rows, grad_weights


def maximal_ids(
    weights: Sequence[Tensor],
    indices: Tensor,
    offsets: Tensor,
    padding_idx: int,
    include_last_offset: bool,
    features: Sequence[int],
    num_features: int,
) -> Tensor:
    """The IDs whose rows the bags' maxima were taken from: int64 ``[B, sum D]``, -1 where a bag is empty."""
    indices, offsets = ids(indices, "indices"), ids(offsets, "offsets")
    if not include_last_offset:
        offsets = torch.nn.functional.pad(offsets, (0, 1), value=len(indices))
    parts = []
    for weight, (begin, end, starts) in zip(
        weights, feature_slices(Csr(indices, offsets, None), features, num_features), strict=True
    ):
        of_feature = indices[begin:end].to(torch.int64)
        keep = None if padding_idx < 0 else of_feature != padding_idx
        bag = reference.bag_ids(starts, len(of_feature), len(starts) - 1)
        chosen = reference.maxima(weight.index_select(0, of_feature), bag, len(starts) - 1, keep)
        parts.append(torch.nn.functional.pad(of_feature, (0, 1), value=-1)[chosen])
    return torch.cat(parts, dim=1)


def maximum_gradient(grad: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
    """The dense gradient of a table given ``grad`` ``[B, D]`` and the IDs of :func:`maximal_ids`."""
    taken = torch.where(chosen >= 0, wide(grad), 0)
    columns = torch.arange(grad.shape[1], device=grad.device).expand_as(chosen)
    zeros = taken.new_zeros(weight.shape)
    return zeros.index_put((chosen.clamp(min=0), columns), taken, accumulate=True).to(weight.dtype)


def table_gradient(
    grad_rows: Tensor,
    indices: Tensor,
    weight: Tensor,
    padding_idx: int,
    scale_grad_by_freq: bool,
    sparse: bool,
    again: bool,
) -> Tensor:
    """Scatter the gradients of looked-up rows ``[n, D]`` into the gradient of the table.

    ``again``: the result is to be differentiated itself; then by operators that can be.
    """
    indices = indices.to(torch.int64)
    if not again:
        scattered = torch.ops.aten.embedding_backward(
            grad_rows, indices, len(weight), padding_idx, scale_grad_by_freq, sparse
        )
        if sparse and weight.dtype != grad_rows.dtype:
            scattered = scattered.coalesce()  # summed before it is rounded
        return scattered.to(weight.dtype)
    if scale_grad_by_freq:
        times = indices.new_zeros(len(weight)).index_add(0, indices, torch.ones_like(indices))
        grad_rows = grad_rows / times[indices].to(grad_rows.dtype)[:, None]
    if sparse:
        kept = indices != padding_idx
        scattered = torch.sparse_coo_tensor(
            indices[kept][None], grad_rows[kept], weight.shape, check_invariants=False
        )
        return scattered.coalesce().to(weight.dtype) if weight.dtype != grad_rows.dtype else scattered
    return grad_rows.new_zeros(weight.shape).index_add(0, indices, grad_rows).to(weight.dtype)


def has_native_gradient(weight: Tensor, mode: int, scale_grad_by_freq: bool) -> bool:
    """Whether :func:`native_table_gradient` can serve."""
    return weight.is_cpu and weight.dtype in NATIVE_TABLES and mode != MODES["max"] and not scale_grad_by_freq


def native_table_gradient(
    grad: Tensor,
    weight: Tensor,
    csr: Csr,
    mode: int,
    padding_idx: int,
    sparse: bool,
) -> Tensor:
    """Gradient of a table on the CPU given ``grad`` ``[B, D]`` of its pooled output, in the table's dtype.

    Dense, or a coalesced sparse tensor. Sums run in float32 in the order of the indices, whatever the
    threads.
    """
    if not sparse:
        return native_dense_gradients(grad, [weight], csr, mode, padding_idx)[0]
    rows, values = native_row_gradients(grad, weight, csr, mode, padding_idx)
    return torch.sparse_coo_tensor(
        rows[None], values.to(weight.dtype), weight.shape, check_invariants=False, is_coalesced=True
    )


def native_row_gradients(
    grad: Tensor, weight: Tensor, csr: Csr, mode: int, padding_idx: int
) -> tuple[Tensor, Tensor]:
    """The rows that occur, rising, and their float32 gradients."""
    rows = torch.empty(len(csr.indices), dtype=torch.int64)
    values = torch.empty(len(csr.indices), weight.shape[1], dtype=torch.float32)
    threads = torch.get_num_threads()
    csr = csr.for_kernels()
    count = _C.sparse_gradient(*csr, mode, padding_idx, len(weight), _adjacent(grad), rows, values, threads)
    return rows[:count], values[:count]


def row_gradients(
    grad: Tensor, weight: Tensor, csr: Csr, mode: int, padding_idx: int
) -> tuple[Tensor, Tensor]:
    """IDs ``[m]`` and float32 gradients ``[m, D]`` of their rows, to be added where an ID occurs twice."""
    if grad.is_cpu:
        return native_row_gradients(grad, weight, csr, mode, padding_idx)
    keep = None if padding_idx < 0 else csr.indices != padding_idx
    last = len(csr.offsets) == len(grad) + 1
    rows, _ = pool_backward(
        wide(grad), None, csr.offsets, len(csr.indices), mode, wide(csr.per_sample_weights), last, keep, False
    )
    return (csr.indices, rows) if keep is None else (csr.indices[keep], rows[keep])


def native_dense_gradients(
    grad: Tensor, weights: Sequence[Tensor], csr: Csr, mode: int, padding_idx: int = -1
) -> list[Tensor]:
    """Gradients of all tables from that of their outputs, side by side ``[B, sum D]``, in one native call."""
    grads = [torch.zeros(weight.shape, dtype=torch.float32) for weight in weights]
    assign, threads = 0, torch.get_num_threads()
    csr = csr.for_kernels()
    _C.update_tables(
        grads, None, None, *csr, mode, padding_idx, _adjacent(grad), None, assign, 0, 0, 0, 0, threads
    )
    return [g.to(weight.dtype) for g, weight in zip(grads, weights, strict=True)]


def _adjacent(grad: Tensor) -> Tensor:
    """In float32, with a row's values side by side; the gradient of a sum, say, is one number, expanded."""
    grad = grad.to(torch.float32)
    return grad if grad.stride(1) == 1 else grad.clone(memory_format=torch.contiguous_format)
