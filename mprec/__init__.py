"""mprec: embeddings for recommendation models, with the representation chosen per feature and per batch.

============================  =====================================================================
:mod:`mprec.nn`               modules: tables, deep hash embeddings, hybrids, collections; ``swap``
:mod:`mprec.ops`              operators, also as ``torch.ops.mprec.*``
:mod:`mprec.optim`            optimizers that update tables during the backward pass
:mod:`mprec.data`             click logs: readers, batches, splits
:mod:`mprec.models`           DLRM
:mod:`mprec.training`         training loop; :mod:`mprec.checkpoint` saves and loads its results
:mod:`mprec.dispatch`         profiles of this device, and the choice of a path for each batch
:mod:`mprec.planner`          which representation for each feature under a memory budget
:mod:`mprec.cache`            rows of hot IDs in front of decoders
:mod:`mprec.serving`          a serving engine and a load test
:mod:`mprec.hashing`          hash families
:mod:`mprec.huge_pages`       memory for large tables
:mod:`mprec.reference`        every operator in a few lines of plain torch
:mod:`mprec.testing`          helpers for tests and benchmarks
============================  =====================================================================

``import mprec`` registers the operators and imports ``nn`` and ``ops``; the rest is imported on first use.
"""

import importlib
from types import ModuleType

from mprec import _native as _native  # first: explains itself where the native module cannot load
from mprec import nn, ops
from mprec._native import __version__

_LAZY = {
    "cache",
    "checkpoint",
    "data",
    "dispatch",
    "errors",
    "hashing",
    "huge_pages",
    "metrics",
    "models",
    "optim",
    "planner",
    "reference",
    "report",
    "serving",
    "testing",
    "training",
}
__all__ = ["__version__", "nn", "ops"]


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"mprec.{name}")
    raise AttributeError(f"module 'mprec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
