"""The native row cache against a model of what a cache may do, under threads, and on bad input."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mprec._native import _C
from mprec.errors import IdOutOfRangeError

ids_strategy = st.lists(
    st.one_of(st.integers(0, 60), st.integers(2**62, 2**62 + 20), st.sampled_from([2**31, 2**32, 2**63 - 1])),
    max_size=70,
)


def rows_of(ids: np.ndarray, dim: int, generation: int) -> np.ndarray:
    """Rows that name their ID and generation in every element, and differ between elements."""
    seed = np.asarray(ids, np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
    seed = seed + np.uint64(generation + 1) * np.arange(1, dim + 1, dtype=np.uint64)
    return ((seed ^ (seed >> np.uint64(29))) % np.uint64(1 << 24)).astype(np.float32)


class Lookup:
    """`RowCache.lookup` with its buffers."""

    def __init__(self, cache, ids, generation):
        n = len(ids)
        self.out = np.full((n, cache.dim), np.nan, np.float32)
        positions, distinct, inverse = (np.empty(n, np.int64) for _ in range(3))
        m, d = cache.lookup(ids, generation, self.out, positions, distinct, inverse)
        self.misses, self.distinct, self.inverse = positions[:m], distinct[:d], inverse[:m]
        self.hits = np.setdiff1d(np.arange(n), self.misses)


class RowCacheMachine(RuleBasedStateMachine):
    """A miss is always allowed; what is never allowed is a row that was not stored for that very ID under
    that very generation, more rows than the capacity, or counters that do not add up."""

    @initialize(dim=st.sampled_from([1, 3, 4, 7, 16, 33]), spare=st.integers(0, 3000))
    def create(self, dim, spare):
        budget = _C.RowCache.bytes_for(dim, 1) + spare
        self.cache = _C.RowCache(dim, budget)
        self.budget = budget
        self.stored: set[int] = set()  # offered under the current generation
        self.counts = dict.fromkeys(("hits", "misses", "admissions", "evictions", "rejections"), 0)

    def _count(self, **changes):
        for name, change in changes.items():
            self.counts[name] += change

    @rule(ids=ids_strategy)
    def lookup(self, ids):
        ids = np.array(ids, np.int64)
        generation = self.cache.generation
        found = Lookup(self.cache, ids, generation)
        expected = rows_of(ids, self.cache.dim, generation)
        assert np.array_equal(found.out[found.hits], expected[found.hits])
        assert set(ids[found.hits].tolist()) <= self.stored
        assert np.array_equal(found.misses, np.sort(found.misses))
        assert len(set(found.distinct.tolist())) == len(found.distinct)
        assert np.array_equal(found.distinct[found.inverse], ids[found.misses])
        held = np.empty(self.cache.capacity, np.int64)
        held = held[: self.cache.ids(held)]
        assert set(ids[found.hits].tolist()) == set(ids.tolist()) & set(held.tolist())
        self._count(hits=len(found.hits), misses=len(found.misses))

    @rule(ids=ids_strategy, hot=st.booleans(), stale=st.booleans())
    def store(self, ids, hot, stale):
        ids = np.array(ids, np.int64)
        generation = (self.cache.generation - stale) % 2**32
        before, size = self.cache.stats(), len(self.cache)
        call = self.cache.fill if hot else self.cache.admit
        stored = call(ids, rows_of(ids, self.cache.dim, generation), generation)
        after = self.cache.stats()
        evicted = after["evictions"] - before["evictions"]
        if stale:
            assert stored == 0
            assert after["rejections"] - before["rejections"] == len(ids)
        else:
            self.stored |= set(ids.tolist())
        assert len(self.cache) == size + stored - evicted
        assert stored <= len(set(ids.tolist())) or evicted
        assert not (hot and evicted)
        self._count(
            admissions=stored, evictions=evicted, rejections=after["rejections"] - before["rejections"]
        )

    @rule(ids=ids_strategy.filter(bool))
    def stored_when_there_is_room(self, ids):
        if len(self.cache) > 0:
            return
        first = np.array(ids[:1], np.int64)
        generation = self.cache.generation
        assert self.cache.admit(first, rows_of(first, self.cache.dim, generation), generation) == 1
        assert len(Lookup(self.cache, first, generation).hits) == 1
        self.stored |= set(first.tolist())
        self._count(admissions=1, hits=1)

    @rule()
    def invalidate(self):
        before = self.cache.generation
        assert self.cache.invalidate() == before + 1 == self.cache.generation
        assert len(self.cache) == 0
        self.stored.clear()

    @rule(ids=ids_strategy)
    def past_generations_are_invisible(self, ids):
        ids = np.array(ids, np.int64)
        found = Lookup(self.cache, ids, self.cache.generation + 1)
        assert len(found.hits) == 0
        self._count(misses=len(ids))

    @invariant()
    def within_budget_and_counted(self):
        cache = self.cache
        assert cache.nbytes <= self.budget
        # Not a group more would have fitted.
        assert _C.RowCache.bytes_for(cache.dim, cache.capacity + 1) > self.budget
        assert _C.RowCache.bytes_for(cache.dim, cache.capacity) == cache.nbytes
        assert cache.nbytes >= cache.capacity * (4 * cache.dim + 8)
        held = np.empty(cache.capacity, np.int64)
        n = cache.ids(held)
        assert n == len(cache) == len(set(held[:n].tolist())) <= cache.capacity
        assert set(held[:n].tolist()) <= self.stored
        assert cache.stats() == self.counts


RowCacheMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestRowCacheModel = RowCacheMachine.TestCase


def _zipf(rng, ids, n, a=1.05):
    weights = np.arange(1, len(ids) + 1) ** -a
    return rng.choice(ids, n, p=weights / weights.sum())


def test_frequent_ids_win_their_place():
    """On a skewed stream the hit rate comes near that of the best fixed set of IDs."""
    rng = np.random.default_rng(1)
    ids = rng.permutation(20_000).astype(np.int64)
    cache = _C.RowCache(4, _C.RowCache.bytes_for(4, 400))
    for step in range(1500):
        if step == 500:
            cache.reset_stats()
        batch = _zipf(rng, ids, 256)
        found = Lookup(cache, batch, 0)
        cache.admit(found.distinct, rows_of(found.distinct, 4, 0), 0)
    stats = cache.stats()
    weights = np.arange(1, len(ids) + 1) ** -1.05
    best = weights[: cache.capacity].sum() / weights.sum()
    assert stats["hits"] / (stats["hits"] + stats["misses"]) > best - 0.03


def test_popularity_may_change():
    """Ageing: what was hot gives way to what is."""
    cache = _C.RowCache(4, _C.RowCache.bytes_for(4, 60))
    old, new = np.arange(60, dtype=np.int64), np.arange(1000, 1060, dtype=np.int64)
    for ids in (old, new):
        for _ in range(200):
            found = Lookup(cache, ids, 0)
            cache.admit(found.distinct, rows_of(found.distinct, 4, 0), 0)
    assert len(Lookup(cache, new, 0).hits) > 45
    assert len(Lookup(cache, old, 0).hits) < 15


def test_a_scan_does_not_wash_out_hot_rows():
    cache = _C.RowCache(4, _C.RowCache.bytes_for(4, 600))
    hot = np.arange(300, dtype=np.int64)
    cache.fill(hot, rows_of(hot, 4, 0), 0)
    held = len(Lookup(cache, hot, 0).hits)
    for start in range(1000, 9000, 500):
        scan = np.arange(start, start + 500, dtype=np.int64)
        found = Lookup(cache, scan, 0)
        cache.admit(found.distinct, rows_of(found.distinct, 4, 0), 0)
        Lookup(cache, hot, 0)
    assert len(Lookup(cache, hot, 0).hits) == held


def test_fill_places_nearly_all():
    """Two choices of place: a hot set of the capacity's size finds room for over nine tenths of itself."""
    cache = _C.RowCache(8, _C.RowCache.bytes_for(8, 6000))
    ids = np.random.default_rng(0).integers(0, 2**63 - 1, 6000)
    assert cache.fill(ids, rows_of(ids, 8, 0), 0) > 0.93 * cache.capacity


@pytest.mark.parametrize("dim", [5, 64])
def test_threads_never_see_torn_or_foreign_rows(dim):
    """Readers, writers and an invalidator at once, in a cache so small that every place is fought for."""
    cache = _C.RowCache(dim, _C.RowCache.bytes_for(dim, 24))
    ids = np.arange(200, dtype=np.int64)
    stop, failures = threading.Event(), []
    checked = [0, 0]

    def read(which):
        rng = np.random.default_rng(which)
        while not stop.is_set():
            batch = rng.choice(ids, 2000)  # long enough for the GIL to be released
            generation = cache.generation
            found = Lookup(cache, batch, generation)
            expected = rows_of(batch, dim, generation)
            if not np.array_equal(found.out[found.hits], expected[found.hits]):
                failures.append(batch)
            checked[which] += len(found.hits)

    def write(seed):
        rng = np.random.default_rng(seed)
        while not stop.is_set():
            batch = rng.choice(ids, 1000)
            generation = cache.generation
            Lookup(cache, batch, generation)
            cache.admit(batch, rows_of(batch, dim, generation), generation)

    def invalidate():
        while not stop.wait(0.01):
            cache.invalidate()

    threads = [threading.Thread(target=read, args=(i,)) for i in range(2)]
    threads += [threading.Thread(target=write, args=(i,)) for i in (7, 8)]
    threads.append(threading.Thread(target=invalidate))
    for thread in threads:
        thread.start()
    threading.Event().wait(1.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert min(checked) > 0
    held = np.empty(cache.capacity, np.int64)
    n = cache.ids(held)
    assert n == len(set(held[:n].tolist())) == len(cache)


def test_takes_torch_tensors():
    cache = _C.RowCache(4, 10_000)
    ids, rows = torch.tensor([3, 5]), torch.arange(8.0).reshape(2, 4)
    assert cache.admit(ids, rows, 0) == 2
    out = torch.zeros(3, 8)[:, 2:6]  # rows apart
    positions, distinct, inverse = (torch.empty(3, dtype=torch.int64) for _ in range(3))
    assert cache.lookup(torch.tensor([5, 9, 3]), 0, out, positions, distinct, inverse) == (1, 1)
    assert out.tolist() == [[4, 5, 6, 7], [0, 0, 0, 0], [0, 1, 2, 3]]
    assert (positions[0], distinct[0], inverse[0]) == (1, 9, 0)


def test_bytes_for_gives_the_capacity():
    for dim, rows in ((1, 1), (16, 10_000), (64, 12_345)):
        nbytes = _C.RowCache.bytes_for(dim, rows)
        assert _C.RowCache(dim, nbytes).capacity >= rows
        assert _C.RowCache(dim, nbytes).nbytes == nbytes


@pytest.mark.parametrize(
    ("dim", "nbytes", "text"),
    [
        (0, 10_000, "dim: expected 1 to 1048576, got 0"),
        (-4, 10_000, "dim"),
        (1 << 40, 10_000, "dim"),
        (16, 100, "nbytes: 100 is less than"),
        (16, -1, "nbytes"),
    ],
)
def test_impossible_sizes(dim, nbytes, text):
    with pytest.raises(ValueError, match=text):
        _C.RowCache(dim, nbytes)


@pytest.mark.parametrize(("dim", "rows"), [(16, 0), (16, -1), (0, 5), (4, 2**35), (4, 2**62)])
def test_impossible_row_counts(dim, rows):
    with pytest.raises(ValueError, match=r"(rows|dim): expected 1 to"):
        _C.RowCache.bytes_for(dim, rows)


def test_more_memory_than_there_is():
    with pytest.raises(MemoryError):
        _C.RowCache(16, 2**62)


def test_bad_input():
    cache = _C.RowCache(4, 10_000)
    ids = np.array([1, -2], np.int64)
    good, rows = np.array([1, 2], np.int64), np.zeros((2, 4), np.float32)
    buffers = [np.empty(2, np.int64) for _ in range(3)]
    with pytest.raises(IdOutOfRangeError, match=r"ids\[1\] is -2"):
        cache.lookup(ids, 0, rows, *buffers)
    with pytest.raises(IdOutOfRangeError, match=r"ids\[1\] is -2"):
        cache.admit(ids, rows, 0)
    with pytest.raises(TypeError, match="ids: expected int64"):
        cache.admit(good.astype(np.int32), rows, 0)
    with pytest.raises(ValueError, match=r"rows: expected shape \[2, 4\], got \[1, 4\]"):
        cache.admit(good, rows[:1], 0)
    with pytest.raises(ValueError, match=r"rows: expected shape \[2, 4\], got \[2, 3\]"):
        cache.fill(good, rows[:, :3], 0)
    with pytest.raises(TypeError, match="rows: expected float32"):
        cache.fill(good, rows.astype(np.float64), 0)
    with pytest.raises(ValueError, match="adjacent"):
        cache.fill(good, np.zeros((4, 2), np.float32).T, 0)
    with pytest.raises(ValueError, match="positions: expected room for 2, got 1"):
        cache.lookup(good, 0, rows, buffers[0][:1], *buffers[1:])
    with pytest.raises(TypeError, match="expected a torch tensor or a numpy array"):
        cache.lookup([1, 2], 0, rows, *buffers)
    with pytest.raises(TypeError):
        cache.admit(good, rows, -1)
    assert len(cache) == 0
