"""Tables whose gradients are applied rather than returned: the link between backward passes and optimizers.

``mprec.optim`` attaches tables here; the backward passes of ``embedding_bag`` and ``embedding_bag_multi``
ask. Under ``torch.compile`` a traced table is not the attached one: its gradient is returned as usual, and
the optimizer's ``step()`` applies it.
"""

import weakref
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mprec.names import MODES
from mprec.ops import _csr
from mprec.ops._common import contiguous, ids

__all__ = ["Owner", "apply", "attach", "attached"]


class Owner(Protocol):
    """What this module asks of an optimizer."""

    def group_key(self, weight: Tensor) -> object:
        """Tables of equal keys can be updated by one call."""

    def apply_bags(
        self,
        weights: Sequence[Tensor],
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None,
        mode: int,
        padding_idx: int,
        grad: Tensor,
        columns: Sequence[int] | None,
        features: Sequence[int],
        num_features: int,
    ) -> None:
        """Update the tables with the gradient of their pooled output. The batch holds only their features,
        or is on CUDA and holds others too."""


# Weak on both sides: an optimizer that is gone gives its tables back.
_owners: WeakIdKeyDictionary = WeakIdKeyDictionary()


def attach(weight: Tensor, owner: Owner) -> None:
    """From now on gradients of ``weight`` go to ``owner`` as they are computed."""
    _owners[weight] = weakref.ref(owner)


def attached(weight: Tensor) -> Owner | None:
    """The optimizer that has taken over the table, if any."""
    if not _owners:
        return None
    reference = _owners.get(weight)
    return None if reference is None else reference()


def apply(
    weights: Sequence[Tensor],
    owners: Sequence[Owner | None],
    csr: _csr.Csr,
    mode: int,
    padding_idx: int,
    grad: Tensor,
    features: Sequence[int] = (0,),
    num_features: int = 1,
) -> None:
    """Hand the gradient ``grad`` ``[B, sum of dims]`` of pooled tables to the optimizers that own them.

    ``csr`` holds the bags of ``num_features`` features, of which table t serves ``features[t]``; tables
    without an owner are left alone. One call serves all tables of one optimizer and parameter group.
    """
    if mode == MODES["max"]:
        raise NotImplementedError("mode: max is not for tables that an optimizer of mprec owns")
    csr = _csr.Csr(
        ids(csr.indices, "indices"), ids(csr.offsets, "offsets"), contiguous(csr.per_sample_weights)
    )
    grad = grad.contiguous()
    columns, column = [], 0
    groups: dict[tuple, list[int]] = {}
    for t, (weight, owner) in enumerate(zip(weights, owners, strict=True)):
        columns.append(column)
        column += weight.shape[1]
        if owner is not None:
            groups.setdefault((id(owner), owner.group_key(weight)), []).append(t)
    for tables in groups.values():
        served, part = [features[t] for t in tables], csr
        if not grad.is_cuda and num_features > 1:
            part = _csr.select(csr, served, num_features)
        owners[tables[0]].apply_bags(
            [weights[t] for t in tables],
            *part,
            mode,
            padding_idx,
            grad,
            [columns[t] for t in tables],
            served,
            num_features,
        )
