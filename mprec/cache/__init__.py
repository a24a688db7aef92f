"""MP-Cache: what deep hash embeddings need not compute again.

Two stages, after MP-Rec (Hsia et al., ASPLOS 2023):

* :class:`CachedDeepHashEmbeddingBag` and :class:`CachedEmbeddingBagCollection` keep the rows of hot IDs
  before the decoder. Exact: a hit is a row that the decoder made, and rows are forgotten when the weights
  change. :class:`DeviceCachedDeepHashEmbeddingBag` does so on a GPU.
* :class:`Codebook` replaces the decoder: an ID has a code of a byte or two, and a code has a vector.
  Approximate: its error is measured when it is made, and it is refused if that exceeds the bound given.

Where memory allows, :func:`materialize` turns a collection's decoders into tables, which is exact.
"""

from mprec.cache.budget import split_budget
from mprec.cache.codebook import Codebook, CodebookEmbeddingBag, CodebookError
from mprec.cache.device import DeviceCachedDeepHashEmbeddingBag
from mprec.cache.row_cache import CachedDeepHashEmbeddingBag, CachedEmbeddingBagCollection
from mprec.cache.rows import CacheStats, RowStats
from mprec.cache.tables import materialize

__all__ = [
    "CacheStats",
    "CachedDeepHashEmbeddingBag",
    "CachedEmbeddingBagCollection",
    "Codebook",
    "CodebookEmbeddingBag",
    "CodebookError",
    "DeviceCachedDeepHashEmbeddingBag",
    "RowStats",
    "materialize",
    "split_budget",
]
