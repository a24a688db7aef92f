"""The embedding bags of others, on 26 tables of the public click logs' sizes."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

#: Vocabularies of Criteo Kaggle (dimension 16) and Terabyte (64), sorted.
KAGGLE = [
    *(3, 4, 10, 15, 18, 24, 27, 105, 305, 583, 633, 1460, 2173, 3194, 5652, 5683, 12517, 14992, 93145),
    *(142572, 286181, 2202608, 5461306, 7046547, 8351593, 10131227),
]
TERABYTE = [
    *(3, 4, 10, 14, 36, 61, 101, 122, 970, 1442, 2208, 7112, 7378, 11156, 12420, 17217, 20134, 36084),
    *(313829, 415421, 1333352, 7267859, 9758201, 9946608, 9980333, 9994222),
]


def capped(sizes: Sequence[int], most: int) -> list[int]:
    return [min(size, most) for size in sizes]


def draw_ids(sizes: Sequence[int], n: int, zipf: float = 0.0) -> Tensor:
    """``n`` IDs of each vocabulary, int64 ``[T * n]``: uniform, or Zipf of exponent ``zipf`` (not 1).

    Zipf ranks come from the inverse of the continuous distribution, and are spread over the vocabulary: hot
    rows are no neighbours.
    """
    size = torch.tensor(sizes, dtype=torch.float64)[:, None]
    u = torch.rand(len(sizes), n, dtype=torch.float64)
    if not zipf:
        return (u * size).long().flatten()
    end = (size + 1) ** (1 - zipf) - 1
    rank = ((u * end + 1) ** (1 / (1 - zipf))).long() - 1
    size = size.long()
    return (rank.clamp_(max=size - 1) * 2_654_435_761 % size).flatten()


class Batch:
    """IDs for every table: one tensor feature-major, in both integer types, and one per table."""

    def __init__(self, sizes: Sequence[int], batch: int, pooling: int, zipf: float = 0.0) -> None:
        self.ids = draw_ids(sizes, batch * pooling, zipf)
        self.narrow = self.ids.int()
        self.parts = self.ids.split(batch * pooling)


class Torch:
    """26 calls of ``torch.embedding_bag``, without the module around it."""

    def __init__(self, sizes: Sequence[int], dim: int, batch: int, pooling: int) -> None:
        self.weights = [torch.empty(size, dim).uniform_(-0.01, 0.01) for size in sizes]
        self.at(batch, pooling)

    def at(self, batch: int, pooling: int) -> "Torch":
        self.offsets = torch.arange(0, batch * pooling, pooling)
        return self

    def __call__(self, batch: Batch) -> list[Tensor]:
        bag, offsets = torch.embedding_bag, self.offsets
        return [
            bag(w, ids, offsets, False, 0, False, None)[0]
            for w, ids in zip(self.weights, batch.parts, strict=True)
        ]


class TorchModules:
    """26 ``torch.nn.EmbeddingBag`` over the tables of a :class:`Torch`."""

    def __init__(self, tables: Torch) -> None:
        self.tables = tables
        self.modules = [
            torch.nn.EmbeddingBag(*w.shape, mode="sum", sparse=True, _weight=w) for w in tables.weights
        ]

    def __call__(self, batch: Batch) -> list[Tensor]:
        offsets = self.tables.offsets
        return [module(ids, offsets) for module, ids in zip(self.modules, batch.parts, strict=True)]


class Fbgemm:
    """FBGEMM's table-batched inference embedding in float32, without bounds checks: the fastest it has.

    ``ImportError`` if ``fbgemm-gpu-cpu`` is not installed.
    """

    def __init__(self, sizes: Sequence[int], dim: int, batch: int, pooling: int) -> None:
        logging.disable(logging.CRITICAL)
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
            IntNBitTableBatchedEmbeddingBagsCodegen,
        )

        host = EmbeddingLocation.HOST
        self.module = IntNBitTableBatchedEmbeddingBagsCodegen(
            [(f"table{t}", size, dim, SparseType.FP32, host) for t, size in enumerate(sizes)],
            device="cpu",
            output_dtype=SparseType.FP32,
            bounds_check_mode=BoundsCheckMode.NONE,
        )
        self.module.fill_random_weights()
        logging.disable(logging.NOTSET)
        self.tables = len(sizes)
        self.at(batch, pooling)

    def at(self, batch: int, pooling: int) -> "Fbgemm":
        self.offsets = torch.arange(0, self.tables * batch * pooling + 1, pooling, dtype=torch.int32)
        return self

    def __call__(self, batch: Batch) -> Tensor:
        return self.module(batch.narrow, self.offsets)


class FbgemmTraining:
    """FBGEMM's table-batched training embedding with its exact row-wise Adagrad: a call is a whole step.

    ``ImportError`` if ``fbgemm-gpu-cpu`` is not installed.
    """

    def __init__(self, sizes: Sequence[int], dim: int, batch: int, lr: float) -> None:
        logging.disable(logging.CRITICAL)
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        self.module = SplitTableBatchedEmbeddingBagsCodegen(
            [(size, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for size in sizes],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=lr,
            device="cpu",
            bounds_check_mode=BoundsCheckMode.NONE,
        )
        self.module.init_embedding_weights_uniform(-0.01, 0.01)
        logging.disable(logging.NOTSET)
        self.offsets = torch.arange(len(sizes) * batch + 1)
        self.grad = torch.ones(batch, len(sizes) * dim)

    def __call__(self, batch: Batch) -> None:
        self.module(batch.ids, self.offsets).backward(self.grad)


def or_none(peer, *arguments):
    """The peer, or ``None`` where its package is not installed or does not fit this torch."""
    try:
        return peer(*arguments)
    except (ImportError, OSError) as error:
        print(f"not compared, {peer.__name__}: {str(error)[:120]}", flush=True)
        return None
