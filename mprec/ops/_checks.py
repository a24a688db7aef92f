"""Checks of tensors that operators share. Those of bags are in :mod:`mprec.bags`."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mprec.bags import Bags, check_ndim
from mprec.errors import DeviceError, DtypeError, IdOutOfRangeError

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check_same_device(**tensors: Tensor | Sequence[Tensor] | None) -> None:
    """``DeviceError`` naming the first tensor that is not where the first one is."""
    first = None
    for name, value in tensors.items():
        for tensor in (value,) if isinstance(value, Tensor) else value or ():
            if first is None:
                first = (name, tensor.device)
            elif tensor.device != first[1]:
                raise DeviceError(
                    f"{name} is on {tensor.device}, but {first[0]} is on {first[1]}: expected one device"
                )


def on_cpu(tensors: Iterable[Tensor]) -> bool:
    """True if all are there: a question that costs little before :func:`check_same_device` is asked."""
    for tensor in tensors:  # noqa: SIM110 - a generator costs twice as much
        if not tensor.is_cpu:
            return False
    return True


def check_floats(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in FLOATS:
        raise DtypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {tensor.dtype}")


def check_weights(weight: Tensor, name: str) -> None:
    check_ndim(weight, name, 2)
    check_floats(weight, name)


def check_tables(weights: Sequence[Tensor]) -> None:
    """At least one table, all of one dtype."""
    if not weights:
        raise ValueError("weights: expected at least one table")
    for t, weight in enumerate(weights):
        check_weights(weight, f"weights[{t}]")
        if weight.dtype != weights[0].dtype:
            raise DtypeError(f"weights[{t}]: expected {weights[0].dtype} as weights[0], got {weight.dtype}")


def check_id_list(ids: Tensor, bound: int, name: str) -> None:
    """The same of IDs ``[n]`` that no bags hold, by the argument's name."""
    try:
        Bags(ids.flatten(), ids.new_zeros(1), include_last_offset=False).check_ids([bound])
    except IdOutOfRangeError as error:
        raise IdOutOfRangeError(str(error).replace("indices", name, 1).replace(" (bag 0)", "")) from None
