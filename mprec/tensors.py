"""Tensors in the form in which kernels take them."""

from typing import overload

import torch
from torch import Tensor

from mprec.errors import DtypeError
from mprec.tracing import may_look

__all__ = ["IDS", "as_ids", "plain"]

#: Types of IDs and offsets that kernels read.
IDS = (torch.int64, torch.int32)


@overload
def plain(tensor: Tensor) -> Tensor: ...
@overload
def plain(tensor: None) -> None: ...
def plain(tensor):
    """Contiguous, its elements aligned, without a lazy sign."""
    if tensor is None:
        return None
    if tensor.is_neg():
        return tensor.resolve_neg()
    if not tensor.is_contiguous():
        return tensor.contiguous()
    if tensor.is_cpu and may_look() and tensor.data_ptr() % tensor.itemsize:
        return tensor.clone()
    return tensor


def as_ids(tensor: Tensor, name: str) -> Tensor:
    """IDs or offsets of any type of integers as contiguous int32 or int64. ``DtypeError`` for other types."""
    if tensor.dtype in IDS:
        return plain(tensor)
    if tensor.is_floating_point() or tensor.is_complex():
        raise DtypeError(f"{name}: expected integers, got {tensor.dtype}")
    return tensor.to(torch.int64).contiguous()
