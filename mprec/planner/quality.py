"""From measured qualities of whole models to the effect of one feature's representation.

The model: quality is additive, ``Q(plan) = q0 + sum over features of effect[feature][option]``, with effect 0
for a table. Measurements of whole models (all features as DHE; the two largest as DHE; one feature changed
at a time, where somebody has measured that) are linear equations in the effects. Usually there are fewer
equations than effects; of the solutions the one with the least ``sum effect^2 / weight`` is taken, which
divides what was measured for several features together among them in proportion to their weights,
``log2(1 + vocabulary)`` (with ID counts: the effective vocabulary, 2^entropy): a representation of three IDs
can neither gain nor lose much. Measured models are reproduced exactly as long as they do not contradict each
other, else in the least-squares sense. It is an interpolation of measurements, not a measurement: train
the plan's model to know its quality.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mprec.nn import FeatureConfig

__all__ = ["Effects", "Measurement", "effective_vocabulary", "fit_effects"]

BASELINE = "table"


@dataclass(frozen=True)
class Measurement:
    """Quality (more is better) of a model whose features have ``options``: one label for all of them, or a
    label per feature name.
    """

    options: str | Mapping[str, str]
    quality: float

    def label(self, feature: str) -> str:
        return self.options if isinstance(self.options, str) else self.options[feature]


@dataclass(frozen=True)
class Effects:
    """``base``: quality with every feature a table; ``of[feature][label]``: what another option adds."""

    base: float
    of: Mapping[str, Mapping[str, float]]
    residual: float  # largest gap between a measured quality and this model's

    def labels(self, feature: str) -> list[str]:
        """The options that a quality is known for, the baseline first."""
        return [BASELINE, *self.of[feature]]

    def effect(self, feature: str, label: str) -> float:
        """``KeyError`` for an option that no measurement contains."""
        if label == BASELINE:
            return 0.0
        try:
            return self.of[feature][label]
        except KeyError:
            raise KeyError(f"no measured quality tells of option {label!r} for feature {feature!r}") from None


def effective_vocabulary(counts: np.ndarray) -> float:
    """``2^entropy`` of how often each ID occurs: the size of a uniform vocabulary as hard to predict."""
    counts = np.asarray(counts, dtype=np.float64)
    if counts.ndim != 1 or (counts < 0).any() or not counts.sum() > 0:
        raise ValueError("counts: expected a vector of counts, not all zero")
    shares = counts[counts > 0] / counts.sum()
    return float(2 ** -(shares * np.log2(shares)).sum())


def fit_effects(
    features: Sequence[FeatureConfig],
    measurements: Sequence[Measurement],
    counts: Mapping[str, np.ndarray] | None = None,
) -> Effects:
    """Effects of every (feature, option) that occurs in a measurement; ``counts`` are IDs' occurrences."""
    if not measurements:
        raise ValueError("measurements: expected at least one measured quality, got none")
    sizes = {f.name: float(f.num_embeddings) for f in features}
    sizes |= {name: effective_vocabulary(c) for name, c in (counts or {}).items() if name in sizes}
    weight = {name: math.log2(1 + size) for name, size in sizes.items()}
    pairs = sorted(
        {(f.name, m.label(f.name)) for f in features for m in measurements if m.label(f.name) != BASELINE}
    )
    column = {pair: i + 1 for i, pair in enumerate(pairs)}
    # Unknowns scaled by sqrt(weight), so that the least-norm solution is the one wanted; the base (column
    # 0) by so much that it costs nothing in the norm.
    scale = np.array([1e6, *(math.sqrt(weight[name]) for name, _ in pairs)])
    equations = np.zeros((len(measurements), len(scale)))
    equations[:, 0] = 1
    for row, measurement in zip(equations, measurements, strict=True):
        for feature in features:
            if (pair := (feature.name, measurement.label(feature.name))) in column:
                row[column[pair]] = 1
    measured = np.array([m.quality for m in measurements], dtype=np.float64)
    if not np.isfinite(measured).all():
        raise ValueError(f"measurements: expected finite qualities, got {measured.tolist()}")
    solution, *_ = np.linalg.lstsq(equations * scale, measured, rcond=1e-14)
    unknowns = solution * scale
    effects: dict[str, dict[str, float]] = {f.name: {} for f in features}
    for (name, label), i in column.items():
        effects[name][label] = float(unknowns[i])
    residual = float(np.abs(equations @ unknowns - measured).max())
    return Effects(float(unknowns[0]), effects, residual)
