"""Recommendation models over the embeddings of :mod:`mprec.nn`."""

from mprec.models.dlrm import DLRM
from mprec.models.multi_path import PATHS, MultiPathDLRM

__all__ = ["DLRM", "KINDS", "PATHS", "MultiPathDLRM"]

# The names that checkpoints know models by.
KINDS = {"dlrm": DLRM, "multi-path dlrm": MultiPathDLRM}
