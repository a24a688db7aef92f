"""Quality on a labelled sample with standard errors, of one path and of the difference between two.

The paths of one model are measured on the same samples, so their differences are known far better than their
values: errors of differences are those of paired samples. The AUC's are DeLong's (DeLong, DeLong and
Clarke-Pearson, Biometrics 44, 1988), computed from ranks (Sun and Xu, IEEE Signal Processing Letters 21,
2014).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

__all__ = ["METRICS", "Estimate", "Influence", "influence"]

#: Metric -> 1 if more is better, -1 if less is.
METRICS = {"auc": 1, "log_loss": -1, "accuracy": 1}


@dataclass(frozen=True)
class Estimate:
    """A value and its standard error."""

    value: float
    error: float

    def to_dict(self) -> dict[str, float]:
        return {"value": self.value, "error": self.error}


@dataclass(frozen=True)
class Influence:
    """A metric's ``value``, and each sample's part in it less their mean, in ``groups`` of independent
    samples: the variance of the value is the sum over groups of ``var / len``.
    """

    value: float
    groups: tuple[np.ndarray, ...]

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.value, _error(self.groups))

    def minus(self, other: Influence) -> Estimate:
        """The difference to a metric of the same samples, with the error of paired samples."""
        if [len(group) for group in self.groups] != [len(group) for group in other.groups]:
            raise ValueError("the two were measured on different samples")
        paired = tuple(a - b for a, b in zip(self.groups, other.groups, strict=True))
        return Estimate(self.value - other.value, _error(paired))


def influence(labels: np.ndarray, probabilities: np.ndarray) -> Mapping[str, Influence]:
    """AUC, log-loss (nats) and accuracy of click probabilities [n] for labels [n] of 0 and 1, as
    :mod:`mprec.metrics` defines them.

    ``ValueError`` unless there are at least two samples of each label and all probabilities are numbers.
    """
    labels = np.asarray(labels, dtype=bool)
    scores = np.asarray(probabilities, dtype=np.float64)
    if labels.shape != scores.shape or labels.ndim != 1:
        raise ValueError(
            f"labels and probabilities: expected vectors of one length, got {labels.shape}, {scores.shape}"
        )
    positives = int(labels.sum())
    if min(positives, len(labels) - positives) < 2:
        raise ValueError(
            f"labels: expected at least two samples of each kind, got {positives} positive of {len(labels)}"
        )
    if not np.isfinite(scores).all():
        raise ValueError("probabilities: expected numbers, got NaN or infinity")
    clipped = np.clip(scores, 1e-7, 1 - 1e-7)
    return {
        "auc": _auc(labels, scores),
        "log_loss": _mean(-np.log(np.where(labels, clipped, 1 - clipped))),
        "accuracy": _mean(((scores >= 0.5) == labels).astype(np.float64)),
    }


def _mean(values: np.ndarray) -> Influence:
    return Influence(float(values.mean()), (values - values.mean(),))


def _auc(labels: np.ndarray, scores: np.ndarray) -> Influence:
    above, below = scores[labels], scores[~labels]
    ranks = rankdata(scores)
    # For each positive the share of negatives below it, for each negative the share of positives above it.
    of_positives = (ranks[labels] - rankdata(above)) / len(below)
    of_negatives = 1 - (ranks[~labels] - rankdata(below)) / len(above)
    value = float(of_positives.mean())
    return Influence(value, (of_positives - value, of_negatives - value))


def _error(groups: tuple[np.ndarray, ...]) -> float:
    return float(np.sqrt(sum(group.var(ddof=1) / len(group) for group in groups)))
