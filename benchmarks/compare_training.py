"""Rows of ``compare.py``: whole training steps of a DLRM (forward, loss, backward, both optimizers) against
the same model on torch's embedding bags with sparse gradients, and on FBGEMM's training embedding.

All have the same dense layers, and Adagrad: torch's on dense weights; on tables row-wise (mprec, FBGEMM) or
of each element (torch, which has no other for sparse gradients). 26 tables of Criteo Kaggle's sizes, 16
numbers a row. Freed memory is kept for all of them (:mod:`mprec.freed_memory`).
"""

from collections.abc import Callable, Iterator

import harness
import torch
from compare import Row
from compare_whole_path import SHAPES, Plain
from embedding_bag_peers import FbgemmTraining, draw_ids, or_none
from torch import Tensor, nn
from torch.nn import functional as F

from mprec import freed_memory
from mprec.models import DLRM
from mprec.nn import FeatureConfig
from mprec.optim import RowWiseAdagrad, split_parameters

VOCABULARIES, DIM, *KAGGLE_MLPS = SHAPES["Kaggle d16"]
#: Hidden layers of the bottom and the top MLP.
MLPS = {"mprec train's MLPs": ((64, 32), (64, 32)), "Kaggle's MLPs": tuple(KAGGLE_MLPS)}
BATCHES, NUM_DENSE, RATE = (128, 2048), 13, 0.01
VS_TORCH, VS_FBGEMM, TWO_THREADS = 2.0, 1.2, 1.6


def _name(mlps: str, batch: int) -> str:
    return f"training step, 26 tables, {mlps}, batch {batch}"


def names() -> list[str]:
    return [_name(mlps, batch) for mlps in MLPS for batch in BATCHES]


class _OnFbgemm(Plain):
    """The plain model with its tables in one FBGEMM module, which updates them in the backward pass."""

    def __init__(self, model: DLRM, fbgemm: nn.Module) -> None:
        super().__init__(model)
        self.tables = fbgemm

    def forward(self, dense: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        first = self.bottom(dense)
        vectors = self.tables(indices.view(-1), offsets).view(len(dense), -1, first.shape[1])
        stacked = torch.cat([first[:, None], vectors], dim=1)
        products = torch.bmm(stacked, stacked.transpose(1, 2)).flatten(1)[:, self.pairs]
        return self.top(torch.cat([first, products], dim=1)).squeeze(1)


class _OnTorch(Plain):
    """The plain model on tables of its own, with sparse gradients."""

    def __init__(self, model: DLRM) -> None:
        super().__init__(model)
        self.tables = nn.ModuleList(
            nn.EmbeddingBag(
                f.num_embeddings, f.embedding_dim, mode="sum", sparse=True, include_last_offset=True
            )
            for f in model.features
        )

    def forward(self, dense: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        return self.logits(dense, indices, offsets)


def _new_model(mlps: str) -> DLRM:
    features = [FeatureConfig(f"f{i}", size, DIM) for i, size in enumerate(VOCABULARIES)]
    return DLRM(features, NUM_DENSE, DIM, *MLPS[mlps])


def _step(logits: Callable, optimizers: list[torch.optim.Optimizer]) -> Callable[[tuple], None]:
    def step(item: tuple) -> None:
        dense, indices, labels = item
        F.binary_cross_entropy_with_logits(logits(dense, indices), labels).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _dense_adagrad(model: DLRM | Plain) -> torch.optim.Adagrad:
    return torch.optim.Adagrad([*model.bottom.parameters(), *model.top.parameters()], RATE, fused=True)


def _ours(mlps: str, offsets: Tensor) -> Callable[[tuple], None]:
    model = _new_model(mlps)
    tables, _ = split_parameters(model)
    optimizers = [RowWiseAdagrad(tables, RATE), _dense_adagrad(model)]
    return _step(lambda x, ids: model(x, ids.view(-1), offsets), optimizers)


def _torch(mlps: str, bags: Tensor) -> Callable[[tuple], None]:
    model = _OnTorch(_new_model(mlps))
    optimizers = [torch.optim.Adagrad(model.tables.parameters(), RATE), _dense_adagrad(model)]
    return _step(lambda x, ids: model(x, ids, bags), optimizers)


def _fbgemm(mlps: str, offsets: Tensor, batch: int) -> Callable[[tuple], None] | None:
    peer = or_none(FbgemmTraining, VOCABULARIES, DIM, batch, RATE)
    if peer is None:
        return None
    model = _OnFbgemm(_new_model(mlps), peer.module)
    optimizers = [_dense_adagrad(model)]
    return _step(lambda x, ids: model(x, ids, offsets), optimizers)


def rows(seconds: float, only: str) -> Iterator[Row]:
    freed_memory.keep()
    with torch.inference_mode(False), torch.enable_grad(), harness.threads(1):
        for mlps in MLPS:
            for batch in BATCHES:
                if only in _name(mlps, batch):
                    yield from _rows(mlps, batch, seconds)


def _rows(mlps: str, batch: int, seconds: float) -> Iterator[Row]:
    offsets = torch.arange(len(VOCABULARIES) * batch + 1)
    ours = _ours(mlps, offsets)

    def with_two(item: tuple) -> None:
        with harness.threads(2):
            ours(item)

    candidates = {"ours": ours, "torch": _torch(mlps, torch.arange(batch + 1)), "two": with_two}
    if (fbgemm := _fbgemm(mlps, offsets, batch)) is not None:
        candidates["fbgemm"] = fbgemm

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        ids = draw_ids(VOCABULARIES, batch).view(-1, batch)
        return torch.randn(batch, NUM_DENSE), ids, torch.randint(0, 2, (batch,)).float()

    t = harness.interleaved(candidates, draw, seconds=seconds * 4, own_inputs=True)
    us = {name: timing.p50 * 1e6 for name, timing in t.items()}
    work, rate = _name(mlps, batch), f"{batch / us['ours'] * 1e3:.1f} thousand examples/s"
    yield Row(work, "torch, sparse gradients", us["ours"], us["torch"], VS_TORCH, rate)
    if "fbgemm" in us:
        yield Row(work, "FBGEMM training TBE", us["ours"], us["fbgemm"], VS_FBGEMM)
    yield Row(work, "itself on one thread", us["two"], us["ours"], TWO_THREADS)
