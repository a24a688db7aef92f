"""A vocabulary that grows in training: rows of a table of fixed size for the keys that are worth one."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from mprec.errors import DtypeError
from mprec.nn._keys import KeyIndex, mixed
from mprec.ops import fused
from mprec.tracing import not_compiled

__all__ = ["GrowingVocabulary"]

#: What an entry that is no key's has for its row, and one of a key that has none yet.
_FREE, _CANDIDATE = -2, -1
#: Training passes without a step, after which something is wrong.
_MOST_PASSES = 1000


class GrowingVocabulary(nn.Module):
    """Maps 64-bit keys, of which new ones keep coming, to rows of a table of ``capacity`` rows.

    A key has no row at first: it is mapped to a row that all such keys share. One that training has met
    ``min_count`` times is given a row of its own by the next :meth:`step`. If none is left, it takes that of
    the key that has not been met for the longest time, and that key is forgotten. The row then starts from
    the shared row, as what the key was embedded by until then, and its optimizer's state anew::

        vocabulary = GrowingVocabulary(100_000, min_count=3)
        table = mprec.nn.Embedding(vocabulary.capacity, 16)
        optimizer = mprec.optim.RowWiseAdagrad(table.parameters())
        for keys, labels in log:
            loss(table(vocabulary(keys)), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            vocabulary.step(table, optimizer)

    Rows change hands in :meth:`step` alone, so one training step may look keys up in any number of calls, and
    one vocabulary may serve several tables. In evaluation (``eval()``) nothing is counted and nothing
    changes. Results depend on the keys and steps alone: there are no random numbers.

    Memory is bounded, whatever comes: ``capacity`` keys with rows, ``candidates`` keys that are counted
    towards one, at most 48 bytes each (:attr:`nbytes`). Candidates that have not been met for the longest
    time are forgotten, and their counts with them.

    Everything is kept on the CPU, whatever the device of the keys, and is one entry of the state_dict, an
    int64 tensor. Compilers break the graph at a call.

    Args:
        capacity: rows of the table, the shared ones among them; at least ``shared`` + 1.
        min_count: how often training must have met a key; 1: once.
        shared: keys without a row share rows ``0`` to ``shared - 1``, by a hash of the key.
        candidates: how many keys without a row are counted at most; default ``capacity``.
        sharded: processes of ``torch.distributed`` have tables of their own. Otherwise, where there is more
            than one, training raises ``RuntimeError``: each would give the same row to another key.

    Shape: ``keys``, integers of any shape ``[*]``, output int64 ``[*]``, rows in ``[0, capacity)``.

    Raises:
        DtypeError: keys that are no integers.
        ValueError: an argument that is too small.
    """

    def __init__(
        self,
        capacity: int,
        min_count: int = 1,
        shared: int = 1,
        candidates: int | None = None,
        *,
        sharded: bool = False,
    ) -> None:
        super().__init__()
        candidates = capacity if candidates is None else candidates
        _at_least("shared", shared, 1)
        _at_least("capacity", capacity, shared + 1)
        _at_least("min_count", min_count, 1)
        _at_least("candidates", candidates, 1)
        if capacity + candidates >= 2**31:
            raise ValueError(
                f"capacity, candidates: expected less than 2**31 in all, got {capacity + candidates}"
            )
        self.capacity, self.min_count, self.shared = capacity, min_count, shared
        self.candidates, self.sharded = candidates, sharded
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget all keys."""
        entries = self.capacity - self.shared + self.candidates
        # Of each entry its key, how often and in which step that was met last, and its row.
        self._keys, self._counts, self._last = np.zeros((3, entries), dtype=np.int64)
        self._rows = np.full(entries, _FREE, dtype=np.int32)
        self._free = np.arange(entries, dtype=np.int32)[::-1].copy()  # the first `_num_free` are free entries
        self._num_free = entries
        self._num_known = self._num_candidates = 0
        self._index = KeyIndex(entries)
        self._step, self._passes = 1, 0
        self._met: list[np.ndarray] = []  # candidates of this step that have been met often enough
        self._oldest = np.zeros((2, 0), dtype=np.int64)  # entries with rows by age, and when they were met

    def __len__(self) -> int:
        """How many keys have a row."""
        return self._num_known

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays; they never grow."""
        arrays = (self._keys, self._counts, self._last, self._rows, self._free)
        return sum(array.nbytes for array in arrays) + self._index.nbytes

    @not_compiled
    def forward(self, keys: Tensor) -> Tensor:
        """The rows of ``keys``; in training, count them."""
        flat = _as_int64(keys)
        if self.training:
            self._check_training()
            distinct, places, counts = np.unique(flat, return_inverse=True, return_counts=True)
            rows = self._meet(distinct, counts)[places.reshape(-1)]
        else:
            rows = self._rows_of(flat, self._index.find(flat, self._keys))
        return torch.from_numpy(rows).view(keys.shape).to(keys.device)

    def known(self) -> tuple[Tensor, Tensor]:
        """The keys that have a row, rising, and their rows: int64 ``[len(self)]`` each."""
        entries = np.flatnonzero(self._rows >= 0)
        entries = entries[np.argsort(self._keys[entries])]
        return torch.from_numpy(self._keys[entries]), torch.from_numpy(self._rows[entries].astype(np.int64))

    @torch.no_grad()
    def step(
        self,
        tables: nn.Module | Tensor | Iterable[nn.Module | Tensor],
        optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
    ) -> Tensor:
        """Give rows to the keys that have been met often enough; after the optimizers' step.

        Args:
            tables: all tables that this vocabulary serves, modules with a ``weight`` or weights
                ``[capacity, D]``. A row that changes hands starts from the shared row.
            optimizers: of these tables, whose state of such a row starts anew; those of
                :mod:`mprec.optim` that have a table are found without. What is left of the row's gradient is
                zeroed.

        Returns:
            The rows that have been given to a key, int64.

        Raises:
            RuntimeError: in evaluation.
            ValueError: a table of another size.
        """
        if not self.training:
            raise RuntimeError("step: in evaluation a vocabulary does not change; call train() first")
        weights = [_weight(table, self.capacity) for table in _listed(tables)]
        entries = self._newcomers()
        spare = min(len(entries), self.capacity - self.shared - self._num_known)
        fresh = self.shared + self._num_known + np.arange(spare, dtype=np.int32)
        freed = self._evict(len(entries) - spare)
        rows = np.concatenate([fresh, freed])
        entries = entries[: len(rows)]
        self._rows[entries] = rows
        self._num_known += len(rows)
        self._num_candidates -= len(rows)
        self._step, self._passes = self._step + 1, 0
        changed = torch.from_numpy(rows.astype(np.int64))
        if len(rows):
            shared = torch.from_numpy(self._shared_rows(self._keys[entries]))
            for weight in weights:
                _start_anew(weight, changed.to(weight.device), shared.to(weight.device), _listed(optimizers))
        return changed

    def _check_training(self) -> None:
        ranks = torch.distributed
        alone = self.sharded or not ranks.is_available() or not ranks.is_initialized()
        if not alone and (size := ranks.get_world_size()) > 1:
            raise RuntimeError(
                "a growing vocabulary counts the keys of its own process, and torch.distributed runs "
                f"{size}: the same row would be another key's in each. Say sharded=True if each process "
                "holds tables of its own"
            )
        self._passes += 1
        if self._passes > _MOST_PASSES:
            raise RuntimeError(
                f"{_MOST_PASSES} training passes without step(tables, optimizers): without it no key is ever "
                "given a row"
            )

    def _meet(self, keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Count distinct keys, rising; returns their rows."""
        entries = self._index.find(keys, self._keys)
        old = entries >= 0
        met = entries[old]
        self._counts[met] += counts[old]
        self._last[met] = self._step
        entries[~old] = self._remember(keys[~old], counts[~old])
        met = entries[entries >= 0]
        enough = (self._rows[met] == _CANDIDATE) & (self._counts[met] >= self.min_count)
        self._met.append(met[enough])
        return self._rows_of(keys, entries)

    def _remember(self, keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """New candidates; returns their entries, -1 for those that found no room."""
        entries = np.full(len(keys), -1, dtype=np.int64)
        self._forget_candidates(len(keys))
        # The most frequent ones first, of equals the smaller keys.
        order = np.argsort(-counts, kind="stable")[: self.candidates - self._num_candidates]
        taken = self._free[self._num_free - len(order) : self._num_free][::-1]
        entries[order] = taken
        self._num_free -= len(order)
        self._num_candidates += len(order)
        self._keys[taken], self._counts[taken] = keys[order], counts[order]
        self._last[taken], self._rows[taken] = self._step, _CANDIDATE
        self._index.add(keys[order], taken)
        return entries

    def _forget_candidates(self, wanted: int) -> None:
        """Where ``wanted`` more find no room: at least a quarter of the candidates that are allowed, those
        met longest ago, of equals the rarer and then the smaller keys; never one that this step has met."""
        lacking = self._num_candidates + wanted - self.candidates
        if lacking <= 0:
            return
        old = np.flatnonzero((self._rows == _CANDIDATE) & (self._last < self._step))
        order = np.lexsort((self._keys[old], self._counts[old], self._last[old]))
        self._release(old[order[: max(lacking, self.candidates // 4)]])

    def _release(self, entries: np.ndarray) -> None:
        """Forget these entries."""
        keys = self._keys[entries]
        self._num_candidates -= int((self._rows[entries] == _CANDIDATE).sum())
        self._num_known -= int((self._rows[entries] >= 0).sum())
        self._rows[entries] = _FREE
        self._index.remove(keys, self._keys)
        if self._index.worn:
            left = np.flatnonzero(self._rows != _FREE)
            self._index.rebuild(self._keys[left], left)
        self._free[self._num_free : self._num_free + len(entries)] = entries
        self._num_free += len(entries)

    def _newcomers(self) -> np.ndarray:
        """Candidates that are to have a row: those met most often first, of equals the smaller keys."""
        found = np.unique(np.concatenate(self._met)) if self._met else np.zeros(0, dtype=np.int64)
        self._met = []
        return found[np.lexsort((self._keys[found], -self._counts[found]))]

    def _evict(self, count: int) -> np.ndarray:
        """Rows of the ``count`` keys met longest ago, of equals the smaller; fewer if this step has met all
        others."""
        rows: list[np.ndarray] = []
        while count > 0:
            if not self._oldest.shape[1]:
                self._queue(count)
                if not self._oldest.shape[1]:
                    break
            entries, met = self._oldest[:, :count]
            self._oldest = self._oldest[:, count:]
            # Those met since they were queued are not among the oldest any more.
            entries = entries[(self._last[entries] == met) & (self._rows[entries] >= 0)]
            rows.append(self._rows[entries])
            self._release(entries)
            count -= len(entries)
        return np.concatenate([np.zeros(0, dtype=np.int32), *rows])

    def _queue(self, count: int) -> None:
        """The oldest of the keys with rows, in order: enough for many steps, for it takes a look at all."""
        old = np.flatnonzero((self._rows >= 0) & (self._last < self._step))
        order = np.lexsort((self._keys[old], self._last[old]))[: max(count, self.capacity // 16)]
        self._oldest = np.stack([old[order], self._last[old[order]]])

    def _rows_of(self, keys: np.ndarray, entries: np.ndarray) -> np.ndarray:
        rows = np.where(entries >= 0, self._rows[entries], _CANDIDATE).astype(np.int64)
        without = rows < 0
        rows[without] = self._shared_rows(keys[without])
        return rows

    def _shared_rows(self, keys: np.ndarray) -> np.ndarray:
        if self.shared == 1:
            return np.zeros(len(keys), dtype=np.int64)
        return (mixed(keys) % np.uint64(self.shared)).astype(np.int64)

    def get_extra_state(self) -> Tensor:
        """int64 ``[4, 1 + n]``: the step, ``capacity``, ``shared`` and 0, then of each key that is remembered
        the key, its count, its last step and its row (-1: none)."""
        used = np.flatnonzero(self._rows != _FREE)
        used = used[np.argsort(self._keys[used])]
        head = np.array([[self._step], [self.capacity], [self.shared], [0]])
        body = np.stack([self._keys[used], self._counts[used], self._last[used], self._rows[used]])
        return torch.from_numpy(np.concatenate([head, body], axis=1, dtype=np.int64))

    def set_extra_state(self, state: Tensor) -> None:
        step, capacity, shared, _ = state[:, 0].tolist()
        keys, counts, last, rows = state[:, 1:].cpu().numpy()
        without = int((rows == _CANDIDATE).sum())
        if (capacity, shared) != (self.capacity, self.shared) or without > self.candidates:
            raise ValueError(
                f"a vocabulary of capacity {capacity}, {shared} shared rows and {without} candidates does "
                f"not fit into one of {self.capacity}, {self.shared} and at most {self.candidates}"
            )
        self.reset_parameters()
        self._step = step
        self._num_free -= len(keys)
        entries = self._free[self._num_free :].copy()
        self._keys[entries], self._counts[entries], self._last[entries], self._rows[entries] = (
            keys, counts, last, rows,
        )  # fmt: skip
        self._num_candidates, self._num_known = without, len(keys) - without
        self._index.add(keys, entries)
        met = entries[(rows == _CANDIDATE) & (last == step) & (counts >= self.min_count)]
        self._met = [met.astype(np.int64)]  # of a step that had begun

    def extra_repr(self) -> str:
        return (
            f"{self.capacity}, min_count={self.min_count}, shared={self.shared}, "
            f"candidates={self.candidates}: {self._num_known:,} keys with rows, "
            f"{self._num_candidates:,} candidates, {self.nbytes:,} bytes"
        )


def _at_least(name: str, value: int, bound: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < bound:
        raise ValueError(f"{name}: expected an integer of at least {bound}, got {value!r}")


def _as_int64(keys: Tensor) -> np.ndarray:
    if keys.is_floating_point() or keys.is_complex() or keys.dtype == torch.bool:
        raise DtypeError(f"keys: expected integers, got {keys.dtype}")
    wide = keys.view(torch.int64) if keys.dtype == torch.uint64 else keys.to(torch.int64)
    return wide.detach().cpu().reshape(-1).contiguous().numpy()


def _listed(given) -> list:
    return [given] if isinstance(given, (nn.Module, Tensor, torch.optim.Optimizer)) else list(given)


def _weight(table: nn.Module | Tensor, capacity: int) -> Tensor:
    # Of a module a parameter: that of a deep hash embedding is made as it is read.
    weight = table if isinstance(table, Tensor) else table._parameters.get("weight")
    if weight is None or not weight.is_leaf:
        raise ValueError(f"tables: expected modules with a weight, or weights, got {type(table).__name__}")
    if weight.dim() != 2 or len(weight) != capacity:
        raise ValueError(f"tables: expected a weight of {capacity} rows, got {tuple(weight.shape)}")
    return weight


def _start_anew(weight: Tensor, rows: Tensor, shared: Tensor, optimizers: list) -> None:
    """Rows of a weight, of what optimizers keep of them, and of its gradient."""
    weight[rows] = weight[shared]
    if weight.grad is not None:
        if weight.grad.is_sparse:
            weight.grad._values()[torch.isin(weight.grad._indices()[0], rows)] = 0
        else:
            weight.grad[rows] = 0
    owner = fused.owner_of(weight)
    known = any(owner is optimizer for optimizer in optimizers)
    for optimizer in optimizers if owner is None or known else [*optimizers, owner]:
        group = next((g for g in optimizer.param_groups if any(weight is p for p in g["params"])), None)
        if group is None:
            continue
        for name, value in optimizer.state.get(weight, {}).items():
            if isinstance(value, Tensor) and value.dim() and len(value) == len(weight):
                value[rows] = group.get("initial_accumulator_value", 0.0) if name == "sum" else 0.0
