"""The native row cache and codebook: all native code that this package uses beside the operators."""

from mprec._native import _C

__all__ = ["CachedDecoders", "RowCache", "cached_dhe_bag", "codebook_rows"]

RowCache = _C.RowCache
CachedDecoders = _C.CachedDecoders
cached_dhe_bag = _C.cached_dhe_bag
codebook_rows = _C.codebook_rows
