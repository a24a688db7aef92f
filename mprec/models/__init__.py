"""Recommendation models over the embeddings of :mod:`mprec.nn`."""

from mprec.models.dlrm import DLRM

__all__ = ["DLRM", "KINDS"]

# The names that checkpoints know models by.
KINDS = {"dlrm": DLRM}
