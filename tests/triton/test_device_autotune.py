"""Tuning keeps the fastest tile sizes on disk, decoding uses them, and a damaged file is reported."""

import pytest
import torch
from mprec.triton_kernels import autotune, dhe
from test_device_dhe import decoder, expected, ids_of
from test_device_hashing import coefficients_of


@pytest.fixture
def cache(tmp_path, monkeypatch, device):
    monkeypatch.setenv("MPREC_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotune, "_loaded", {})
    return autotune.path_of(device)


def test_tune_and_use(cache, device):
    k, widths, n = 16, [16, 6], 8
    ids, c = ids_of(n, device), coefficients_of("universal", k).to(device)
    weights, biases = decoder(k, widths, torch.float32, device)
    out, tried = torch.empty(n, 6, device=device), []

    def run(steps):
        tried.append(tuple(steps))
        dhe.decode_grouped(
            ids, None, 1, [0], [c], [weights], [biases], "universal", "relu", "none", out, steps
        )

    def seconds(call):  # a clock that likes two launches, and narrow tiles
        call()
        return [1.0 / len(tried[-1]) + 1e-3 * tried[-1][0][0].BN]

    best, _ = autotune.tune(device, n, k, widths, torch.float32, "universal", run, seconds)
    assert [layers for _, layers in best] == [1, 1]
    assert min(steps[0][0].BN for steps in tried if len(steps) == 2) == best[0][0].BN
    autotune._loaded.clear()  # as another process would find it
    key = autotune.key_of(n, k, widths, torch.float32, "universal")
    assert autotune.remembered(device, key) == best
    out.fill_(torch.nan)
    dhe.decode_grouped(ids, None, 1, [0], [c], [weights], [biases], "universal", "relu", "none", out)
    want = expected(ids, c, weights, biases, "universal", "relu", "none")
    torch.testing.assert_close(out.double(), want, rtol=2e-5, atol=2e-5)


def test_a_folder_that_cannot_be_written_is_reported(tmp_path, cache, monkeypatch):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "tuned.json"
    with pytest.warns(UserWarning, match="cannot be kept"):
        autotune._keep(path, "key", [])
    assert autotune._load(path) == {"key": []}


def test_another_version_has_another_file(cache, device, monkeypatch):
    monkeypatch.setattr(autotune.triton, "__version__", "0.0.1")
    assert autotune.path_of(device) != cache


@pytest.mark.parametrize("content", ["{", "[1]", '{"key": [[[1, 2], 1]]}'])
def test_a_damaged_file_is_reported_and_ignored(content, cache, device):
    cache.write_text(content)
    with pytest.warns(UserWarning, match="not readable"):
        assert autotune.remembered(device, "key") is None
