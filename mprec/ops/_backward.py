"""Gradients of pooling, shared by tables and deep hash embeddings. Plain torch."""

import torch
from torch import Tensor

from mprec import reference
from mprec.names import MODES


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
