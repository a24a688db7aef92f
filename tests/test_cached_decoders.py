"""Decoders behind row caches give what the decoders give, whatever the caches hold."""

import itertools

import numpy as np
import pytest
import torch

from mprec._native import _C
from mprec.errors import IdOutOfRangeError, InvalidOffsetsError


def decoder(dim: int, seed: int = 0, k: int = 24, hidden: int = 20) -> "_C.Decoder":
    g = torch.Generator().manual_seed(seed)
    coefficients = torch.randint(1, 2**31 - 1, (4, k), dtype=torch.int32, generator=g)
    widths = [k, hidden, dim]
    weights = [torch.randn(b, a, generator=g) / a**0.5 for a, b in itertools.pairwise(widths)]
    biases = [torch.randn(b, generator=g) for b in widths[1:]]
    return _C.Decoder(coefficients, weights, biases, 0, 1, 2)


def batch(features: int, bags: int, largest_bag: int, vocabulary: int = 300, seed: int = 0):
    """Feature-major indices (skewed, so that some repeat) and offsets."""
    rng = np.random.default_rng(seed)
    sizes = (
        rng.integers(0, largest_bag + 1, features * bags)
        if largest_bag > 1
        else np.ones(features * bags, int)
    )
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    indices = (rng.random(offsets[-1]) ** 3 * vocabulary).astype(np.int64)
    return torch.from_numpy(indices), torch.from_numpy(offsets.astype(np.int64))


def forward(
    cached, indices, offsets, out, *, weights=None, mode=0, padding_idx=-1, bound=None, admit=True, threads=1
):
    arguments = indices, offsets, weights, mode, True, padding_idx, bound, out, admit, threads
    return _C.cached_dhe_bag(cached, *arguments)


DIMS = (5, 16, 32)


@pytest.mark.parametrize("largest_bag", [1, 4])
@pytest.mark.parametrize(("mode", "weighted"), [(0, False), (0, True), (1, False), (1, True), (2, False)])
@pytest.mark.parametrize("threads", [1, 2])
def test_equals_the_decoders(largest_bag, mode, weighted, threads):
    decoders = [decoder(dim, seed) for seed, dim in enumerate(DIMS)]
    caches = [_C.RowCache(dim, _C.RowCache.bytes_for(dim, 30)) for dim in DIMS]
    caches[1] = None
    cached = _C.CachedDecoders(decoders, caches, [0, 1, 2], [0, 5, 21], 3)
    hits = []
    for step in range(6):
        indices, offsets = batch(3, 40, largest_bag, seed=step)
        weights = torch.rand(len(indices)) if weighted else None
        expected = torch.full((40, 53), torch.nan)
        _C.dhe_bag_multi(decoders, indices, offsets, weights, mode, -1, expected, None, 1)
        out = torch.full((40, 53), torch.nan)
        forward(cached, indices, offsets, out, weights=weights, mode=mode, threads=threads)
        # The decoder adds in another order for a handful of IDs than for many.
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        hits.append(caches[0].stats()["hits"])
    assert hits[-1] > hits[0]
    assert cached.stats()["calls"] == 6
    assert 0 < cached.stats()["decoded"] < 6 * 120 * largest_bag


def test_hits_are_the_decoders_rows_to_the_bit():
    """Rows made in large batches come back unchanged, from any batch and any bag."""
    d = decoder(16)
    ids, rows = torch.arange(200), torch.empty(200, 16)
    _C.dhe_bag(d, ids, torch.arange(201), None, 0, True, -1, rows, 1)
    cache = _C.RowCache(16, _C.RowCache.bytes_for(16, 400))
    assert cache.fill(ids, rows, cache.generation) == 200
    cached = _C.CachedDecoders([d], [cache], [0], [0], 1)
    indices = torch.randint(0, 200, (64,), generator=torch.Generator().manual_seed(0))
    out = forward(cached, indices, torch.arange(65), torch.empty(64, 16))
    assert torch.equal(out, rows[indices])
    expected, offsets = torch.empty(16, 16), torch.arange(0, 65, 4)
    for mode in (0, 1, 2):
        _C.dhe_bag(d, indices, offsets, None, mode, True, -1, expected, 1)
        assert torch.equal(forward(cached, indices, offsets, torch.empty(16, 16), mode=mode), expected)
    assert cache.stats()["misses"] == 0
    assert cached.stats()["decoded"] == 0


def test_distinct_misses_are_decoded_once():
    cache = _C.RowCache(16, _C.RowCache.bytes_for(16, 60))
    cached = _C.CachedDecoders([decoder(16)], [cache], [0], [0], 1)
    indices = torch.tensor([7, 9, 7, 7, 9])
    forward(cached, indices, torch.arange(6), torch.empty(5, 16), admit=False)
    assert (cached.stats()["decoded"], len(cache)) == (2, 0)
    forward(cached, indices, torch.arange(6), torch.empty(5, 16))
    assert (cached.stats()["decoded"], len(cache)) == (4, 2)
    forward(cached, indices, torch.arange(6), torch.empty(5, 16))
    assert cached.stats()["decoded"] == 4


def test_some_features_of_a_batch_into_their_columns():
    d = decoder(4)
    cached = _C.CachedDecoders([d, d], [None, None], [1, 3], [2, 10], 4)
    indices, offsets = batch(4, 8, 3)
    out = forward(cached, indices, offsets, torch.full((8, 15), -1.0))
    expected = torch.empty(8, 16)
    _C.dhe_bag_multi([d] * 4, indices, offsets, None, 0, -1, expected, None, 1)
    torch.testing.assert_close(out[:, 2:6], expected[:, 4:8], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out[:, 10:14], expected[:, 12:16], rtol=1e-6, atol=1e-6)
    assert (out[:, [0, 1, 6, 7, 8, 9, 14]] == -1).all()
    with pytest.raises(ValueError, match="out: expected a tensor"):
        forward(cached, indices, offsets, None)


def test_padding_and_int32():
    d = decoder(8)
    cache = _C.RowCache(8, _C.RowCache.bytes_for(8, 60))
    cached = _C.CachedDecoders([d], [cache], [0], [0], 1)
    indices = torch.tensor([3, 5, 3, 8, 3], dtype=torch.int32)
    offsets = torch.tensor([0, 2, 3, 5], dtype=torch.int32)
    for _ in range(2):
        for mode in (0, 1, 2):
            out = forward(cached, indices, offsets, torch.empty(3, 8), mode=mode, padding_idx=3)
            expected = torch.empty(3, 8)
            _C.dhe_bag(d, indices, offsets, None, mode, True, 3, expected, 1)
            torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    held = np.empty(10, np.int64)
    assert sorted(held[: cache.ids(held)]) == [5, 8]


def test_decoders_of_different_generations_do_not_mix():
    """One cache, two decoders in turn: what the first one stored is invisible to the second."""
    cache = _C.RowCache(8, _C.RowCache.bytes_for(8, 60))
    indices, offsets = torch.arange(20), torch.arange(21)
    old, new = decoder(8, 1), decoder(8, 2)
    before = _C.CachedDecoders([old], [cache], [0], [0], 1)
    forward(before, indices, offsets, torch.empty(20, 8))
    cache.invalidate()
    after = _C.CachedDecoders([new], [cache], [0], [0], 1)
    for cached, d in ((after, new), (before, old), (after, new), (before, old)):
        expected = torch.empty(20, 8)
        _C.dhe_bag(d, indices, offsets, None, 0, True, -1, expected, 1)
        out = forward(cached, indices, offsets, torch.empty(20, 8))
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bags", [0, 1])
def test_empty(bags):
    cached = _C.CachedDecoders([decoder(8)], [_C.RowCache(8, 10_000)], [0], [0], 1)
    out = forward(
        cached,
        torch.empty(0, dtype=torch.int64),
        torch.zeros(bags + 1, dtype=torch.int64),
        torch.ones(bags, 8),
    )
    assert out.shape == (bags, 8)
    assert not out.any()


def test_bad_input():
    d, cache = decoder(8), _C.RowCache(8, 10_000)
    with pytest.raises(ValueError, match=r"caches\[0\]: has rows of 4, but decoders\[0\] makes 8"):
        _C.CachedDecoders([d], [_C.RowCache(4, 10_000)], [0], [0], 1)
    with pytest.raises(ValueError, match="at least one"):
        _C.CachedDecoders([], [], [], [], 1)
    with pytest.raises(ValueError, match="expected one for each of 1 decoders"):
        _C.CachedDecoders([d], [], [0], [0], 1)
    with pytest.raises(ValueError, match=r"positions\[1\] is 0"):
        _C.CachedDecoders([d, d], [None, None], [0, 0], [0, 8], 2)
    with pytest.raises(ValueError, match=r"positions\[0\] is 3, expected rising numbers from 0 to 2"):
        _C.CachedDecoders([d], [None], [3], [0], 3)
    with pytest.raises(ValueError, match=r"columns\[0\]"):
        _C.CachedDecoders([d], [None], [0], [-1], 1)

    cached = _C.CachedDecoders([d], [cache], [0], [0], 1)
    indices, offsets, out = torch.arange(3), torch.arange(4), torch.empty(3, 8)
    with pytest.raises(IdOutOfRangeError, match=r"indices\[1\] \(bag 1\) is -5"):
        forward(cached, torch.tensor([1, -5, 2]), offsets, out)
    with pytest.raises(InvalidOffsetsError, match=r"offsets\[0\]"):
        forward(cached, indices, torch.tensor([1, 2, 2, 3]), out)
    with pytest.raises(InvalidOffsetsError, match=r"offsets\[3\] \(the end\) is 2"):
        forward(cached, indices, torch.tensor([0, 1, 1, 2]), out)
    with pytest.raises(InvalidOffsetsError, match="multiple of the number of features"):
        forward(_C.CachedDecoders([d], [None], [0], [0], 2), indices, offsets, out)
    # None of what callers serve in another way
    assert forward(cached, indices, offsets, out[:2]) is None
    assert forward(cached, indices, offsets, out, weights=torch.ones(2)) is None
    assert forward(cached, indices, offsets, out, weights=torch.ones(3), mode=2) is None
    with pytest.raises(ValueError, match="out: expected at least 8 columns, got 7"):
        forward(cached, indices, offsets, out[:, :7])
    with pytest.raises(ValueError, match="threads"):
        forward(cached, indices, offsets, out, threads=0)
    assert len(cache) == 0
