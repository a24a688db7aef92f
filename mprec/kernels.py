"""The list of kernels. Each is declared where it lives, with what it supports."""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Kernel", "kernel", "kernels"]


class Kernel(NamedTuple):
    """One implementation of an operator for one kind of device.

    Attributes:
        run: from the operator's call (:class:`mprec.ops._table.Op`) to its result.
        supports: whether it serves a call, as dtypes, row formats and options tell.
    """

    run: Callable[[Any], Any]
    supports: Callable[[Any], bool]


_kernels: dict[tuple[str, str], list[Kernel]] = {}

#: Modules whose kernels need imports that only their device has: imported at the first call there.
_LATE = {"cuda": ["mprec.triton_kernels.tables", "mprec.triton_kernels.decoders"]}


def kernel(*operators: str, device: str, supports: Callable[[Any], bool] = lambda call: True):
    """Declare a function to be a kernel of these operators.

    Of several kernels the first that supports a call runs.
    """

    def declare(run):
        for name in operators:
            _kernels.setdefault((name, device), []).append(Kernel(run, supports))
        return run

    return declare


def kernels(operator: str, device: str) -> list[Kernel]:
    """An operator's kernels for a kind of device (``"cpu"``, ``"cuda"``), first choice first."""
    if device in _LATE:
        for module in _LATE[device]:
            importlib.import_module(module)
        _LATE.pop(device, None)
    return _kernels.get((operator, device), [])
