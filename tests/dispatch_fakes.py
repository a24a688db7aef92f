"""Paths that cost what they say on a clock that only they move."""

from mprec.dispatch import Profile, ScoringPath, fingerprint


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def fake_path(name, quality, fixed_s, per_sample_s, clock=None, supports=None, shape=None):
    """A path that takes ``fixed_s + per_sample_s * batch size``; its inputs are batch sizes or batches."""

    def model(item):
        size = item if isinstance(item, int) else len(item)
        if clock is not None:
            clock.advance(fixed_s + per_sample_s * size)
        return item

    return ScoringPath(
        name, name, quality, model, shape if shape is not None else f"shape of {name}", supports
    )


def fake_profile(costs, batch_sizes=tuple(2**i for i in range(12)), tail=1.25, shapes=None) -> Profile:
    """A profile of exact affine costs: ``costs[name] = (fixed_s, per_sample_s)``."""

    def cell(fixed, per_sample):
        p50 = [fixed + per_sample * size for size in batch_sizes]
        tails = [tail * seconds for seconds in p50]
        ones = [1.0] * len(p50)
        return {
            "batch_sizes": list(batch_sizes),
            "calls": [100] * len(p50),
            "unique_share": ones,
            "p50": p50,
            "p95": tails,
            "p99": tails,
            "mean": p50,
        }

    shapes = shapes or {name: f"shape of {name}" for name in costs}
    return Profile(
        paths={name: {"representation": name, "quality": 0.0, "shape": shapes[name]} for name in costs},
        cells={name: {"warm": cell(*cost)} for name, cost in costs.items()},
        fingerprint={**fingerprint(), "paths": shapes},
    )
