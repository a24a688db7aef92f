"""Modules: embedding bags as tables, deep hash embeddings and hybrids, and a collection of them."""

from mprec.nn.collection import EmbeddingBagCollection
from mprec.nn.config import DheConfig, FeatureConfig, KernelOptions, with_representation
from mprec.nn.deep_hash import DeepHashEmbeddingBag
from mprec.nn.dense import MLP, DotInteraction
from mprec.nn.embedding_bag import EmbeddingBag
from mprec.nn.hybrid import HybridEmbeddingBag
from mprec.nn.memory import use_huge_pages
from mprec.nn.quantized import QuantizedEmbeddingBagCollection, QuantizedTable
from mprec.nn.swapping import swap
from mprec.nn.unseen import MeanForUnseen

__all__ = [
    "MLP",
    "DeepHashEmbeddingBag",
    "DheConfig",
    "DotInteraction",
    "EmbeddingBag",
    "EmbeddingBagCollection",
    "FeatureConfig",
    "HybridEmbeddingBag",
    "KernelOptions",
    "MeanForUnseen",
    "QuantizedEmbeddingBagCollection",
    "QuantizedTable",
    "swap",
    "use_huge_pages",
    "with_representation",
]
