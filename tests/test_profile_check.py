"""A profile that is right, one that is wrong, and what is said of each."""

import time

import numpy as np
import pytest
import torch
from dispatch_fakes import fake_profile

from mprec.bags import Bags
from mprec.data import Batch
from mprec.dispatch import ScoringPath
from mprec.serving import profile_check
from mprec.serving.profile_check import profile_drift, profile_warnings


def draw(size, rng):
    return Batch(torch.zeros(size, 0), Bags(torch.arange(size), torch.arange(size + 1)), torch.zeros(size))


def test_drift_is_measured_over_profiled_time(monkeypatch):
    """The microbenchmark is given: each call takes 3 ms and 1 ms, whatever the batch."""
    asked = {}

    def measured(paths, make_input, sizes, **options):
        asked["sizes"] = sizes
        times = {"slow": 3e-3, "right": 1e-3}
        return {(path.name, size): [times[path.name]] * 5 for path in paths for size in sizes}

    monkeypatch.setattr(profile_check, "microbenchmark", measured)
    profile = fake_profile({"slow": (1e-3, 0.0), "right": (1e-3, 0.0)}, batch_sizes=(1, 4, 16, 64, 256))
    paths = [ScoringPath(name, "table", 0.5, None, name) for name in ("slow", "right")]
    assert profile_drift(paths, profile, draw) == {"slow": pytest.approx(3.0), "right": pytest.approx(1.0)}
    assert asked["sizes"] == [4, 16, 64]


def test_a_profile_of_a_faster_machine_is_noticed():
    """Real calls: a sleep of 2 ms lasts at least as long, against 0.2 ms in the profile."""

    def sleeps(batch):
        time.sleep(2e-3)
        return torch.zeros(len(batch))

    profile = fake_profile({"p": (2e-4, 0.0)}, batch_sizes=(1, 8, 64))
    drift = profile_drift([ScoringPath("p", "table", 0.5, sleeps, "p")], profile, draw, seconds=0.05)
    assert drift["p"] >= 9.9
    (text,) = profile_warnings(drift)
    assert "stale" in text
    assert "busy" in text
    assert f"p {drift['p']:.2f} times as long" in text


def test_a_right_profile_is_not_warned_of():
    assert profile_warnings({"a": 1.4, "b": 0.7}) == []
    assert len(profile_warnings({"a": 1.6, "b": np.nan})) == 1
