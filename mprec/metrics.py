"""Quality of predicted click probabilities: AUC, log-loss, accuracy, calibration, normalised entropy."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import rankdata

__all__ = ["Metrics", "accuracy", "auc", "calibration", "log_loss", "normalised_entropy"]


def _pair(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels, dtype=bool), np.asarray(scores, dtype=np.float64)
    if labels.shape != scores.shape or labels.ndim != 1:
        raise ValueError(
            f"labels, scores: expected vectors of one length, got {labels.shape}, {scores.shape}"
        )
    if not len(labels):
        raise ValueError("no samples to measure")
    return labels, scores


def known(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Probability that a positive scores above a negative, ties half (area under the ROC curve); NaN if
    one of the classes, or a number among the scores, is missing.
    """
    labels, scores = _pair(labels, scores)
    positives = int(labels.sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return float("nan")
    ranks = rankdata(scores)  # NaN if a score is
    return float((ranks[labels].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean negative log-likelihood of the labels, in nats; probabilities are kept 1e-7 away from 0 and 1."""
    labels, probabilities = _pair(labels, probabilities)
    probabilities = np.clip(probabilities, 1e-7, 1 - 1e-7)
    return float(-np.log(np.where(labels, probabilities, 1 - probabilities)).mean())


def accuracy(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Share of samples on the right side of 1/2."""
    labels, probabilities = _pair(labels, probabilities)
    return float(((probabilities >= 0.5) == labels).mean())


def calibration(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean prediction over the share of clicks: 1 where as many clicks come as are predicted; NaN if none
    come.
    """
    labels, probabilities = _pair(labels, probabilities)
    return float(probabilities.mean() / labels.mean()) if labels.any() else float("nan")


def normalised_entropy(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Log-loss over that of predicting the share of clicks for every sample (He et al. 2014): below 1 if the
    predictions tell anything; NaN if one of the classes is missing.
    """
    share = float(_pair(labels, probabilities)[0].mean())
    if not 0 < share < 1:
        return float("nan")
    return log_loss(labels, probabilities) / -(share * np.log(share) + (1 - share) * np.log(1 - share))


@dataclass(frozen=True)
class Metrics:
    """Quality over one dataset; log-loss in nats per sample."""

    auc: float
    log_loss: float
    accuracy: float
    calibration: float
    normalised_entropy: float

    @classmethod
    def of(cls, labels: np.ndarray, probabilities: np.ndarray) -> Metrics:
        return cls(
            auc(labels, probabilities),
            log_loss(labels, probabilities),
            accuracy(labels, probabilities),
            calibration(labels, probabilities),
            normalised_entropy(labels, probabilities),
        )

    def __str__(self) -> str:
        return (
            f"AUC {self.auc:.4f}, log-loss {self.log_loss:.4f}, normalised entropy "
            f"{self.normalised_entropy:.4f}, accuracy {self.accuracy:.4f}, calibration {self.calibration:.3f}"
        )

    def to_dict(self) -> dict[str, float]:
        return asdict(self)
