"""Recommendation models over the embeddings of :mod:`mprec.nn`."""

from mprec.models.captured import CapturedPath
from mprec.models.compile import compile_path
from mprec.models.compiled import CompiledPath
from mprec.models.dlrm import DLRM
from mprec.models.multi_path import PATHS, MultiPathDLRM

__all__ = ["DLRM", "KINDS", "PATHS", "CapturedPath", "CompiledPath", "MultiPathDLRM", "compile_path"]

# The names that checkpoints know models by.
KINDS = {"dlrm": DLRM, "multi-path dlrm": MultiPathDLRM}
