"""Modules: embedding bags as tables, deep hash embeddings and hybrids, and a collection of them."""

from mprec.nn.collection import EmbeddingBagCollection
from mprec.nn.dense import MLP, DotInteraction
from mprec.nn.embedding import DeepHashEmbedding, Embedding, LowRankEmbedding, LowRankEmbeddingBag
from mprec.nn.growing import GrowingVocabulary
from mprec.nn.hybrid import HybridEmbeddingBag
from mprec.nn.low_rank import LowRankEmbeddingBagCollection, LowRankTable
from mprec.nn.mapped import MappedEmbeddingBagCollection, folded
from mprec.nn.memory import use_huge_pages
from mprec.nn.quantized import QuantizedEmbeddingBagCollection, QuantizedTable
from mprec.nn.swapping import SwapReport, swap
from mprec.nn.together import embed_together
from mprec.nn.unseen import MeanForUnseen
from mprec.options import RunOptions
from mprec.representations import DheConfig, FeatureConfig, with_representation
from mprec.representations.deep_hash import DeepHashEmbeddingBag
from mprec.representations.embedding_bag import EmbeddingBag
from mprec.tuning import auto_options, option_candidates, tune_options

__all__ = [
    "MLP",
    "DeepHashEmbedding",
    "DeepHashEmbeddingBag",
    "DheConfig",
    "DotInteraction",
    "Embedding",
    "EmbeddingBag",
    "EmbeddingBagCollection",
    "FeatureConfig",
    "GrowingVocabulary",
    "HybridEmbeddingBag",
    "LowRankEmbedding",
    "LowRankEmbeddingBag",
    "LowRankEmbeddingBagCollection",
    "LowRankTable",
    "MappedEmbeddingBagCollection",
    "MeanForUnseen",
    "QuantizedEmbeddingBagCollection",
    "QuantizedTable",
    "RunOptions",
    "SwapReport",
    "auto_options",
    "embed_together",
    "folded",
    "option_candidates",
    "swap",
    "tune_options",
    "use_huge_pages",
    "with_representation",
]
