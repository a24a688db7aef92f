"""mprec: embeddings for recommendation models, with the representation chosen per feature and per batch.

============================  =====================================================================
:mod:`mprec.nn`               modules: tables, deep hash embeddings, hybrids, collections; ``swap``
:mod:`mprec.ops`              operators, also as ``torch.ops.mprec.*``
:mod:`mprec.optim`            optimizers that update tables during the backward pass
:mod:`mprec.data`             click logs: readers, batches, splits
:mod:`mprec.models`           DLRM; ``mprec.compile_path`` makes its whole path one native call
:mod:`mprec.training`         training loop; :mod:`mprec.checkpoint` saves and loads its results
:mod:`mprec.dispatch`         profiles of this device, and the choice of a path for each batch
:mod:`mprec.paths`            paths from trained models
:mod:`mprec.planner`          which representation for each feature under a memory budget
:mod:`mprec.cache`            rows of hot IDs in front of decoders
:mod:`mprec.serving`          a serving engine and a load test
:mod:`mprec.simulate`         serving in virtual time
:mod:`mprec.hashing`          hash families
:mod:`mprec.huge_pages`       memory for large tables
:mod:`mprec.reference`        every operator in a few lines of plain torch
:mod:`mprec.testing`          helpers for tests and benchmarks
============================  =====================================================================

``import mprec`` does not import torch, so that the command line answers at once: each module is imported on
first use, ``mprec.nn`` at the first ``mprec.nn``. Where torch has been imported before, the operators of
``torch.ops.mprec`` are registered at once. Otherwise importing :mod:`mprec.ops` does that, or any module that
computes with them, such as ``mprec.nn``.
"""

import importlib
import sys
from typing import Any

_MODULES = (
    "cache",
    "checkpoint",
    "data",
    "dispatch",
    "errors",
    "hashing",
    "huge_pages",
    "metrics",
    "models",
    "nn",
    "ops",
    "optim",
    "paths",
    "planner",
    "reference",
    "report",
    "serving",
    "simulate",
    "testing",
    "training",
)
_NATIVE = ("_C", "__version__")
_FUNCTIONS = {"compile_path": "mprec.models"}
__all__ = ["__version__", "compile_path", "nn", "ops"]


def __getattr__(name: str) -> Any:
    if name in _MODULES or name in _NATIVE:
        # First of all modules: it explains itself where torch or the native module cannot load.
        native = importlib.import_module("mprec._native")
        return getattr(native, name) if name in _NATIVE else importlib.import_module(f"mprec.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'mprec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_NATIVE, *_FUNCTIONS})


if "torch" in sys.modules:
    importlib.import_module("mprec.ops")
