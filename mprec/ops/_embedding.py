"""Look-ups without pooling."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from mprec.ops import fused
from mprec.ops._common import NATIVE_TABLES, padding_from_start
from mprec.ops._functional import embedding_bag
from mprec.tracing import eager

__all__ = ["embedding", "singles"]

#: From so many IDs on the native gradient (a sort and one pass) is over sooner than torch's (a scatter), with
#: what a gradient that is written in Python costs a call: benchmarks/bench_embedding.py.
_MANY = 8192


def singles(count: int, device: torch.device) -> Tensor:
    """Offsets ``[count + 1]`` of bags of one ID each."""
    return torch.arange(count + 1, device=device)


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """``torch.nn.functional.embedding``: rows of ``weight`` by ID, ``[*]`` to ``[*, D]``.

    Arguments, results and exceptions are torch's. torch's own look-up is a copy of rows, which no kernel does
    faster, and serves all calls but two: a table that an optimizer of :mod:`mprec.optim` owns is updated by
    the backward pass, and gradients of many IDs come from the kernels of :func:`mprec.ops.embedding_bag`.

    Raises:
        IndexError: an ID is negative or not below N (:class:`mprec.errors.IdOutOfRangeError` where kernels
            of mprec run).
        RuntimeError, ValueError, NotImplementedError: as torch; ``scale_grad_by_freq`` in the backward pass
            of a table that an optimizer of ``mprec.optim`` owns.
    """
    if not _by_kernels(input, weight, scale_grad_by_freq or sparse):
        return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    if padding_idx is not None:
        padding_idx = _padding(padding_idx, len(weight))
    flat = input.reshape(-1)
    rows = embedding_bag(
        flat,
        weight,
        singles(len(flat), flat.device),
        max_norm,
        norm_type,
        scale_grad_by_freq,
        "sum",
        sparse,
        include_last_offset=True,
        padding_idx=padding_idx,
    )
    if padding_idx is not None:  # padding has no gradient, but a row it has
        rows = torch.where((flat == padding_idx)[:, None], weight.detach()[padding_idx], rows)
    return rows.view(*input.shape, rows.shape[1])


def _by_kernels(input: Tensor, weight: Tensor, special: bool) -> bool:
    """Whether the gradient is to come from the operator. ``special``: a form that only torch's has."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if type(input) is not Tensor or type(weight) not in (Tensor, Parameter) or not weight.requires_grad:
        return False
    if fused.attached(weight) is not None:
        return True
    many = input.numel() >= _MANY and weight.is_cpu and weight.dtype in NATIVE_TABLES
    return many and not special and eager()


def _padding(padding_idx: int, rows: int) -> int:
    try:
        return padding_from_start(padding_idx, rows)
    except RuntimeError:
        raise AssertionError("Padding_idx must be within num_embeddings") from None  # as torch
