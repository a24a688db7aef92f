"""Gradients of pooling: native for float32 tables on the CPU, plain torch for everything else."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mprec import reference
from mprec._native import _C
from mprec.names import MODES
from mprec.ops._common import contiguous, ids, native
from mprec.ops._csr import Csr


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

    ``rows`` are needed for the maximum and for the gradient of the weights only. Of equal maxima the first
    one takes the gradient, as in torch.
    """
    num_bags = offsets.numel() - include_last_offset
    bag = reference.bag_ids(offsets, num_indices, num_bags)
    if mode == MODES["max"]:
        chosen = _first_maximum(rows, bag, num_bags, keep)
        grad_rows = torch.zeros_like(rows)
        full = chosen < num_indices  # an empty bag has none
        columns = torch.arange(rows.shape[1], device=rows.device).expand_as(chosen)
        grad_rows[chosen[full], columns[full]] = grad[full]
        return grad_rows, None
    grad_rows = grad[bag]
    if keep is not None:
        grad_rows = grad_rows * keep[:, None]
    if mode == MODES["mean"]:
        counted = bag if keep is None else bag[keep]
        counts = torch.bincount(counted, minlength=num_bags).clamp(min=1)
        grad_rows = grad_rows / counts[bag].to(grad.dtype)[:, None]
    grad_weights = (grad_rows * rows).sum(1) if need_weights else None
    if per_sample_weights is not None:
        grad_rows = grad_rows * per_sample_weights[:, None]
    return grad_rows, grad_weights


def _first_maximum(rows: Tensor, bag: Tensor, num_bags: int, keep: Tensor | None) -> Tensor:
    """The position of the first largest entry of each bag and column, ``[B, D]``; n where a bag is empty."""
    n = len(rows)
    where = bag[:, None].expand_as(rows)
    low = rows if keep is None else rows.masked_fill(~keep[:, None], -torch.inf)
    top = low.new_zeros(num_bags, rows.shape[1]).scatter_reduce(0, where, low, "amax", include_self=False)
    is_top = (low == top[bag]) | low.isnan()
    if keep is not None:
        is_top &= keep[:, None]
    positions = torch.arange(n, device=rows.device)[:, None].expand_as(rows).masked_fill(~is_top, n)
    none = positions.new_full((num_bags, rows.shape[1]), n)
    return none.scatter_reduce(0, where, positions, "amin")


def table_gradient(
    grad_rows: Tensor,
    indices: Tensor,
    num_embeddings: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
    sparse: bool,
) -> Tensor:
    """Scatter the gradients of looked-up rows ``[n, D]`` into the gradient of the table."""
    return torch.ops.aten.embedding_backward(
        grad_rows, indices.to(torch.int64), num_embeddings, padding_idx, scale_grad_by_freq, sparse
    )


def has_native_gradient(grad: Tensor, weight: Tensor, mode: int, scale_grad_by_freq: bool) -> bool:
    """Whether :func:`native_table_gradient` can serve."""
    return weight.is_cpu and native(weight, grad) and mode != MODES["max"] and not scale_grad_by_freq


def native_table_gradient(
    grad: Tensor,
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    mode: int,
    per_sample_weights: Tensor | None,
    padding_idx: int,
    sparse: bool,
) -> Tensor:
    """Gradient of a float32 table on the CPU given ``grad`` ``[B, D]`` of its pooled output.

    Dense, or a coalesced sparse tensor. Sums run in the order of the indices, whatever the threads.
    """
    csr = Csr(ids(indices, "indices"), ids(offsets, "offsets"), contiguous(per_sample_weights))
    if not sparse:
        return native_dense_gradients(grad, [weight], csr, mode, padding_idx)[0]
    rows = torch.empty(len(indices), dtype=torch.int64)
    values = torch.empty(len(indices), weight.shape[1])
    threads = torch.get_num_threads()
    count = _C.sparse_gradient(*csr, mode, padding_idx, len(weight), _adjacent(grad), rows, values, threads)
    return torch.sparse_coo_tensor(
        rows[None, :count], values[:count], weight.shape, check_invariants=False, is_coalesced=True
    )


def native_dense_gradients(
    grad: Tensor, weights: Sequence[Tensor], csr: Csr, mode: int, padding_idx: int = -1
) -> list[Tensor]:
    """Gradients of all tables from that of their outputs, side by side ``[B, sum D]``, in one native call."""
    grads = [torch.zeros(weight.shape) for weight in weights]
    assign, threads = 0, torch.get_num_threads()
    _C.update_tables(
        grads, None, None, *csr, mode, padding_idx, _adjacent(grad), None, assign, 0, 0, 0, 0, threads
    )
    return grads


def _adjacent(grad: Tensor) -> Tensor:
    """With a row's values side by side; the gradient of a sum, say, is one number, expanded."""
    return grad if grad.stride(1) == 1 else grad.clone(memory_format=torch.contiguous_format)
