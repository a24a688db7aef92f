"""Arguments of operators as launches take them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mprec.tracing import traced

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and on a 16-byte boundary as kernels expect of tensors in a table."""
    tensor = tensor.contiguous()
    return tensor.clone() if not traced() and tensor.data_ptr() % 16 else tensor


def columns_of(dims: Sequence[int]) -> list[int]:
    """The first column of each part."""
    return [sum(dims[:t]) for t in range(len(dims))]


def rounds(features: Sequence[int]) -> list[list[int]]:
    """Positions in ``features``, cut so that no feature occurs twice in a part.

    Kernels keep one row for each ID: of a feature that is served twice, one part at a time.
    """
    turns: dict[int, int] = {}
    parts: list[list[int]] = []
    for t, feature in enumerate(features):
        turn = turns[feature] = turns.get(feature, -1) + 1
        if turn == len(parts):
            parts.append([])
        parts[turn].append(t)
    return parts
