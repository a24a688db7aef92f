"""Tables whose gradients are applied rather than returned: the link between backward passes and optimizers.

``mprec.optim`` attaches tables here; the backward passes of ``embedding_bag`` and ``embedding_bag_multi``
contribute to the update, which is made when the pass is over: once for each table, however often the pass met
it. A pass that ``torch.autograd.grad`` runs would not write ``.grad``, and so does not update tables either.

Under ``torch.compile`` a traced table is not the attached one: its gradient is returned as usual, and the
optimizer's ``step()`` applies it.
"""

import gc
import weakref
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mprec.bags import Bags
from mprec.names import MODES
from mprec.ops import _backward

__all__ = [
    "RETURN",
    "SKIP",
    "Owned",
    "Owner",
    "attach",
    "attached",
    "contribute",
    "detach",
    "fate",
    "owner_of",
]


class Owner(Protocol):
    """What this module asks of an optimizer."""

    #: Whether backward passes update its tables. If not, gradients are returned to autograd.
    in_backward: bool

    def group_key(self, weight: Tensor) -> object:
        """Tables of equal keys can be updated by one call."""

    def check_ranks(self) -> None:
        """``RuntimeError`` if other processes train replicas of the tables that would not see an update."""

    def apply_bags(
        self,
        weights: Sequence[Tensor],
        bags: Bags,
        grad: Tensor,
        columns: Sequence[int] | None,
    ) -> None:
        """Update the tables with the gradient of their pooled output. The batch holds only their features,
        or is on CUDA and holds others too."""


# By id of the table. Weak on both sides: an optimizer that is gone gives its tables back. torch's
# WeakIdKeyDictionary takes 4 us for a look-up, and each backward pass makes one for each table.
_owners: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Owner]]] = {}


def attach(weight: Tensor, owner: Owner) -> None:
    """From now on gradients of ``weight`` go to ``owner``.

    Raises:
        ValueError: another optimizer has it.
    """
    if owner_of(weight) not in (None, owner):
        gc.collect()  # one that only a circle holds, as a learning rate schedule makes, is gone
        if (other := owner_of(weight)) not in (None, owner):
            raise ValueError(
                f"params: the table {tuple(weight.shape)} belongs to another optimizer of mprec.optim, "
                f"{type(other).__name__}; delete that one first, or call its release()"
            )
    key = id(weight)

    def forget(gone: weakref.ref) -> None:
        if _owners.get(key, (None,))[0] is gone:
            del _owners[key]

    _owners[key] = weakref.ref(weight, forget), weakref.ref(owner)


def detach(weight: Tensor, owner: Owner) -> None:
    """Gradients of ``weight`` no longer go to ``owner``."""
    if owner_of(weight) is owner:
        del _owners[id(weight)]


def owner_of(weight: Tensor) -> Owner | None:
    """The optimizer that has the table, if any."""
    found = _owners.get(id(weight))
    return found[1]() if found is not None and found[0]() is weight else None


def attached(weight: Tensor) -> Owner | None:
    """The optimizer that backward passes are to update the table for, if any."""
    owner = owner_of(weight)
    return owner if owner is not None and owner.in_backward else None


class Owned(NamedTuple):
    """The fate of a gradient that goes to an optimizer."""

    owner: Owner


#: Fates of other gradients: returned to autograd, or of no use in this pass.
RETURN, SKIP = "return", "skip"


def fate(weight: Tensor, node) -> Owned | str:
    """What becomes of the gradient of ``weight`` in the backward pass that runs now.

    ``node`` is the weight's in autograd's graph. An optimizer that owns the table takes the gradient if the
    pass would add it to ``.grad``; it is returned if ``torch.autograd.grad`` asks for it.
    """
    owner = attached(weight)
    if owner is None:
        return RETURN
    try:
        return Owned(owner) if torch._C._will_engine_execute_node(node) else SKIP
    except RuntimeError:  # of a leaf that torch.autograd.grad asks for
        return RETURN


class _Part(NamedTuple):
    """What one look-up adds to the gradients of its tables."""

    weights: Sequence[Tensor]
    owners: Sequence[Owned | None]
    bags: Bags
    grad: Tensor  # [B, sum of dims]

    def columns(self) -> list[int]:
        ends = accumulate(weight.shape[1] for weight in self.weights)
        return [0, *ends][:-1]

    def row_gradients(self, t: int) -> tuple[Tensor, Tensor]:
        """IDs of table t and the gradients of their rows."""
        column, weight = self.columns()[t], self.weights[t]
        feature = self.bags.served(len(self.weights))[t]
        ((_, _, bags),) = self.bags._replace(features=[feature]).parts(1)
        return _backward.row_gradients(self.grad[:, column : column + weight.shape[1]], len(weight), bags)


class _Pass:
    """The contributions of one backward pass; kept by autograd until the pass is over or has failed."""

    def __init__(self) -> None:
        self.parts: list[_Part] = []

    @torch.no_grad()
    def update(self) -> None:
        uses: dict[int, list[tuple[_Part, int]]] = {}
        for part in self.parts:
            for t, (weight, owned) in enumerate(zip(part.weights, part.owners, strict=True)):
                if owned is not None:
                    uses.setdefault(id(weight), []).append((part, t))
        for part in self.parts:
            _update(part, [t for t, w in enumerate(part.weights) if len(uses.get(id(w), ())) == 1])
        for places in uses.values():
            if len(places) > 1:
                _update_shared(places)


_passes: weakref.WeakValueDictionary[int, _Pass] = weakref.WeakValueDictionary()


def contribute(
    weights: Sequence[Tensor],
    owners: Sequence[Owned | None],
    bags: Bags,
    grad: Tensor,
    scale_grad_by_freq: bool = False,
) -> None:
    """Add the gradient ``grad`` ``[B, sum of dims]`` of pooled tables to what this backward pass is to apply.

    Tables without an owner are left alone.
    """
    if bags.mode == MODES["max"]:
        raise NotImplementedError("mode: max is not for tables that an optimizer of mprec owns")
    if scale_grad_by_freq:
        raise NotImplementedError("scale_grad_by_freq: not for tables that an optimizer of mprec owns")
    for owner in {id(owned.owner): owned.owner for owned in owners if owned is not None}.values():
        owner.check_ranks()
    for weight, owned in zip(weights, owners, strict=True):
        if owned is not None and (weight._backward_hooks or weight._post_accumulate_grad_hooks):
            raise RuntimeError(
                f"the table {tuple(weight.shape)} has hooks on its gradient, and a backward pass that "
                "updates it makes none: give its optimizer of mprec.optim in_backward=False"
            )
    task = torch._C._current_graph_task_id()
    running = _passes.get(task)
    if running is None:
        running = _passes[task] = _Pass()
        # The bound method is all that keeps the pass: if the backward pass fails, both are gone.
        torch.autograd.Variable._execution_engine.queue_callback(running.update)
    grad = grad.detach().contiguous()
    if grad.is_cpu:
        bags = bags.of_kernels().with_float_weights()
        grad = grad if grad.dtype is weights[0].dtype else grad.to(torch.float32)
    running.parts.append(_Part(weights, owners, bags, grad))


def _update(part: _Part, tables: Sequence[int]) -> None:
    """One call serves all tables of one optimizer and parameter group."""
    columns, features = part.columns(), part.bags.served(len(part.weights))
    groups: dict[tuple, list[int]] = {}
    for t in tables:
        owner = part.owners[t].owner
        groups.setdefault((id(owner), owner.group_key(part.weights[t])), []).append(t)
    for members in groups.values():
        served, bags = [features[t] for t in members], part.bags
        bags = bags._replace(features=served) if part.grad.is_cuda else bags.only(served)
        weights, places = [part.weights[t] for t in members], [columns[t] for t in members]
        part.owners[members[0]].owner.apply_bags(weights, bags, part.grad, places)


def _update_shared(places: Sequence[tuple[_Part, int]]) -> None:
    """One step of a table that several bags of the pass read: with the sum of their gradients."""
    part, t = places[0]
    found = [part.row_gradients(t) for part, t in places]
    rows, values = torch.cat([rows for rows, _ in found]), torch.cat([values for _, values in found])
    each = torch.arange(len(rows) + 1, device=rows.device)
    part.owners[t].owner.apply_bags([part.weights[t]], Bags(rows, each), values, None)
