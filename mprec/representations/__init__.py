"""Representations: how IDs of a feature become vectors.

Each is a class in a file of its own and a line in :mod:`mprec.representations.registry`. Collections, the
planner, training, checkpoints and the command line know them from there.
"""

from mprec.representations.base import Part, Representation
from mprec.representations.config import DheConfig, FeatureConfig, with_representation
from mprec.representations.dhe import DHE
from mprec.representations.registry import PARTS, REPRESENTATIONS, SELECT
from mprec.representations.table import TABLE

__all__ = [
    "DHE",
    "PARTS",
    "REPRESENTATIONS",
    "SELECT",
    "TABLE",
    "DheConfig",
    "FeatureConfig",
    "Part",
    "Representation",
    "with_representation",
]
