"""Moving the tables of an existing model to huge pages."""

import torch
from torch import nn

from mprec import huge_pages


@torch.no_grad()
def use_huge_pages(module: nn.Module, min_bytes: int = huge_pages.LARGE) -> int:
    """Move the module's CPU parameters of at least ``min_bytes`` to huge pages; returns the bytes moved.

    New large tables of this package are there already; this is for torch's modules, and for parameters that
    were loaded with ``assign=True``. Values, state_dict and optimizers stay as they are (``parameter.data``
    is replaced); copies, ``.to()`` and unpickling give ordinary memory again.
    :func:`mprec.huge_pages.resident` tells whether it took effect.
    """
    moved = 0
    for parameter in module.parameters():
        if parameter.is_cpu and parameter.nbytes >= min_bytes and parameter.is_contiguous():
            copy = huge_pages.empty(*parameter.shape, dtype=parameter.dtype)
            parameter.data = copy.copy_(parameter)
            moved += parameter.nbytes
    return moved
