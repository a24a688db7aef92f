"""Recommendation models over the embeddings of :mod:`mprec.nn`."""

from mprec.models.compiled import CompiledPath, compile_path
from mprec.models.dlrm import DLRM
from mprec.models.multi_path import PATHS, MultiPathDLRM

__all__ = ["DLRM", "KINDS", "PATHS", "CompiledPath", "MultiPathDLRM", "compile_path"]

# The names that checkpoints know models by.
KINDS = {"dlrm": DLRM, "multi-path dlrm": MultiPathDLRM}
