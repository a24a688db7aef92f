"""Members of collections that are called, because they do more than their weights say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mprec.bags import Bags
from mprec.layers import call, does_more
from mprec.tracing import eager

__all__ = ["pool_each", "some_do_more"]


def some_do_more(members: Sequence[Any]) -> bool:
    """Whether one of them does more than its weights say."""
    return any(does_more(member) for member in members)


def pool_each(members: Sequence[Any], bags: Bags, read: Callable[[Any, Bags], Tensor]) -> Tensor:
    """Pooled vectors of members, side by side, one by one: of those that do more by calling them, of the
    others by ``read(member, bags of its feature)``. Bags are those of the batch."""
    if eager():
        bags.check_offsets()
    vectors = []
    for member, (_, _, own) in zip(members, bags.parts(len(members)), strict=True):
        if does_more(member):
            vectors.append(call(member, own.indices, own.offsets, own.per_sample_weights))
        else:
            vectors.append(read(member, own))
    return torch.cat(vectors, dim=1)
