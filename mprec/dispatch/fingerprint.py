"""What a measurement depends on, besides the paths measured."""

from __future__ import annotations

import importlib.metadata

import torch

from mprec import _native

__all__ = ["fingerprint"]


def fingerprint() -> dict[str, str | int | None]:
    """This machine and software as they are set up now (threads and ISA can change within a process)."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {
        "cpu": _native.cpu_model(),
        "isa": _native.isa(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "mprec": _native.__version__,
        "torch": torch.__version__,
        "triton": triton,
    }
