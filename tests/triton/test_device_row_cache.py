"""Look-ups of cached rows on the device, against a dictionary; and a decoder behind a cache."""

import pytest
import torch
from mprec.triton_kernels import row_cache
from mprec.triton_kernels.dhe import dhe_forward
from test_device_dhe import decoder, ids_of
from test_device_hashing import coefficients_of


@pytest.mark.parametrize("cached", [0, 1, 500])
@pytest.mark.parametrize(("n", "dim"), [(0, 8), (1, 8), (300, 12)])
def test_lookup(n, dim, cached, device):
    ids = torch.randperm(3000)[:cached] * 2**33  # multiples of a power of two: many share a home
    rows = torch.randn(cached, dim)
    cache = row_cache.build(ids, rows.to(device))
    wanted = torch.randint(0, 3000, (n,)) * 2**33
    out = torch.full((n, dim + 1), torch.nan, device=device)
    misses = row_cache.lookup(cache, wanted.to(device), out)
    known = dict(zip(ids.tolist(), rows, strict=True))
    missing = [i for i, x in enumerate(wanted.tolist()) if x not in known]
    count = int(misses.bounds[1])
    assert misses.positions[:count].tolist() == missing
    assert misses.ids[:count].tolist() == wanted[missing].tolist()
    for i, x in enumerate(wanted.tolist()):
        if x in known:
            assert torch.equal(out[i, :dim].cpu(), known[x])
        else:
            assert out[i].isnan().all()
    assert out[:, dim:].isnan().all()


def test_every_key_is_found(device):
    ids = torch.randint(0, 2**62, (2000,)).unique()
    rows = torch.arange(len(ids), device=device)[:, None].float()
    cache = row_cache.build(ids, rows)
    out = torch.full((len(ids), 1), torch.nan, device=device)
    misses = row_cache.lookup(cache, ids.to(device), out)
    assert int(misses.bounds[1]) == 0
    assert torch.equal(out, rows)


def test_bad_ids_are_refused_when_building_and_missed_when_looked_up(device):
    with pytest.raises(ValueError, match="0 or more, got -4"):
        row_cache.build(torch.tensor([-4, 1]), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="repeated"):
        row_cache.build(torch.tensor([1, 1]), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"\[n\] and \[n, D\]"):
        row_cache.build(torch.tensor([1]), torch.zeros(2, 3))
    cache = row_cache.build(torch.tensor([1]), torch.zeros(1, 3, device=device))
    out = torch.empty(3, 3, device=device)
    misses = row_cache.lookup(cache, torch.tensor([-1, -2, 1], device=device), out)
    assert misses.positions[: int(misses.bounds[1])].tolist() == [0, 1]


@pytest.mark.parametrize("hits", [0, 40, 100])
def test_decoder_behind_a_cache(hits, device):
    ids, c = ids_of(100, device).unique(), coefficients_of("universal", 32).to(device)
    weights, biases = decoder(32, (16, 6), torch.float32, device)
    options = ("universal", "relu", "sigmoid")
    want = dhe_forward(ids, c, weights, biases, *options)
    cache = row_cache.build(ids[:hits], want[:hits] + 1)  # other values, to see where a row came from
    got = row_cache.cached_dhe_forward(cache, ids, c, weights, biases, *options)
    assert torch.equal(got[:hits], want[:hits] + 1)
    torch.testing.assert_close(got[hits:], want[hits:])
