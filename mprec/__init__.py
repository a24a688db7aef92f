"""mprec: embeddings for recommendation models, with the representation chosen per feature and per batch."""

from mprec import _native as _native  # first: explains itself where the native module cannot load
from mprec._native import __version__

__all__ = ["__version__"]
