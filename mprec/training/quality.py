"""Predictions of a model on a dataset, and how good they are."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import torch
from torch import nn

from mprec.data import ClickDataset
from mprec.errors import DataError
from mprec.metrics import Metrics
from mprec.models import PATHS, MultiPathDLRM

__all__ = ["evaluate", "evaluate_paths", "mean_over_paths", "predict"]


def predict(model: nn.Module, dataset: ClickDataset, *, batch_size: int = 4096) -> np.ndarray:
    """Click probabilities float32 [rows], in eval mode and without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = [model(b.dense, b.bags).sigmoid() for b in dataset.batches(batch_size)]
    finally:
        model.train(training)
    return torch.cat(parts).numpy() if parts else np.zeros(0, dtype=np.float32)


def evaluate(model: nn.Module, dataset: ClickDataset, *, batch_size: int = 4096) -> Metrics:
    """Quality of the model on a dataset. ``DataError`` for one that was read without labels."""
    if not dataset.labelled:
        raise DataError(f"{dataset.name} was read without labels: there is nothing to compare scores with")
    return Metrics.of(dataset.labels, predict(model, dataset, batch_size=batch_size))


def evaluate_paths(model: MultiPathDLRM, dataset: ClickDataset) -> dict[str, Metrics]:
    """Quality of a multi-path model along each of its paths."""
    return {name: evaluate(model.path(name), dataset) for name in PATHS}


def mean_over_paths(model: MultiPathDLRM, dataset: ClickDataset) -> Metrics:
    """Each metric's mean over the paths of a multi-path model."""
    found = [astuple(metrics) for metrics in evaluate_paths(model, dataset).values()]
    return Metrics(*np.mean(found, axis=0).tolist())
