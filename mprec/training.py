"""Training of click models: early stopping on held-out quality, seeded, with nothing drawn on a screen.

    result = train(model, *dataset.split()[:2], TrainOptions(epochs=10), progress=print)

MLPs and DHE decoders are trained by Adam; tables too, if they are large on the rows of each batch only.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from mprec.data import ClickDataset
from mprec.errors import TrainingError
from mprec.metrics import Metrics
from mprec.models import DLRM, PATHS, MultiPathDLRM
from mprec.nn import (
    DheConfig,
    EmbeddingBagCollection,
    FeatureConfig,
    MappedEmbeddingBagCollection,
    folded,
    with_representation,
)
from mprec.optim import Adam, RowWiseAdagrad, split_parameters

__all__ = [
    "MULTI_PATH",
    "REPRESENTATIONS",
    "Progress",
    "TrainOptions",
    "TrainResult",
    "Trained",
    "build_model",
    "evaluate",
    "evaluate_paths",
    "predict",
    "train",
    "train_representations",
]

REPRESENTATIONS = ("table", "dhe", "select", "hybrid")
PARTS = ("train", "valid", "test")
MULTI_PATH = "multi-path"  # all four in one model
TABLE_OPTIMIZERS = {"adam": 2e-3, "sparse_adam": 2e-3, "rowwise_adagrad": 1e-2}  # and their learning rates
DENSE_NUMBERS = 1 << 20
MONITORS = {"auc": -1.0, "log_loss": 1.0}  # sign that makes smaller better


@dataclass(frozen=True)
class TrainOptions:
    """``patience``: epochs without a better ``monitor`` (``auc`` or ``log_loss`` of the validation part)
    before training stops; the best epoch's weights are kept. ``learning_rate`` is Adam's for MLPs and DHE
    decoders. Tables take ``adam`` or, touching only the rows of a batch, ``sparse_adam``
    (:class:`mprec.optim.Adam`) or ``rowwise_adagrad``, whose state is a dim-th of Adam's; ``auto`` takes
    ``adam`` for up to a million numbers, where it is fast enough, else ``sparse_adam``. Their
    ``table_learning_rate`` is 0.002, or 0.01 for Adagrad, unless given. ``mapped_tables`` trains each table
    through a map of its feature that is folded into the rows afterwards
    (:class:`mprec.nn.MappedEmbeddingBagCollection`); None: where the model's tables allow it. ``threads`` are
    torch's during training: the layers of a small model are too short to share, and on a busy machine waiting
    for a second thread costs many times the work.
    """

    epochs: int = 20
    batch_size: int = 1024
    learning_rate: float = 2e-3
    table_optimizer: str = "auto"
    table_learning_rate: float | None = None
    mapped_tables: bool | None = None
    weight_decay: float = 0.0
    patience: int = 2
    monitor: str = "auc"
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "table_learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.table_optimizer not in ("auto", *TABLE_OPTIMIZERS):
            choices = ", ".join(("auto", *TABLE_OPTIMIZERS))
            raise ValueError(f"table_optimizer must be one of {choices}, got {self.table_optimizer!r}")
        if self.monitor not in MONITORS:
            raise ValueError(f"monitor must be one of {', '.join(MONITORS)}, got {self.monitor!r}")


@dataclass(frozen=True)
class Progress:
    """Where training stands; ``valid`` is there once, at the end of each epoch. ``loss`` is a running
    mean.
    """

    epoch: int  # from 1
    epochs: int
    step: int  # from 1, within the epoch
    steps: int
    loss: float
    seconds: float
    valid: Metrics | None = None


@dataclass(frozen=True)
class TrainResult:
    """``history`` has one record per epoch; ``valid`` is the quality of the weights that were kept."""

    best_epoch: int
    valid: Metrics
    seconds: float
    history: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(
    model: nn.Module,
    train: ClickDataset,
    valid: ClickDataset,
    options: TrainOptions = TrainOptions(),
    progress: Callable[[Progress], None] | None = None,
    quality: Callable[[nn.Module, ClickDataset], Metrics] | None = None,
    *,
    fresh: bool = False,
) -> TrainResult:
    """Fit ``model`` in place to ``train``; leaves it in eval mode with the weights of its best epoch on
    ``valid``.

    ``quality`` measures the model after each epoch (default: :func:`evaluate`). ``fresh`` says that the model
    is untrained, so that maps of tables may start at random, which is better then; they start at the identity
    otherwise, and a trained model goes on from where it is.

    The same seed, data, threads and machine give the same weights. ``TrainingError`` if the loss is not a
    number.
    """
    if not len(train) or not len(valid):
        raise ValueError(f"train and valid must not be empty, got {len(train)} and {len(valid)} rows")
    if options.monitor == "auc" and valid.labels.min() == valid.labels.max():
        raise ValueError("valid has labels of one kind only, so no AUC: monitor log_loss")
    with _threads(options.threads), _mapped(model, options, fresh):
        result, best = _fit(model, train, valid, options, progress, quality or evaluate)
    model.load_state_dict(best)
    model.eval()
    return result


@contextlib.contextmanager
def _mapped(model: nn.Module, options: TrainOptions, fresh: bool) -> Iterator[None]:
    """Inside, the model's tables have maps, if wanted (None: if they can); after it they are as they were."""
    wanted = options.mapped_tables
    plain = getattr(model, "embeddings", None)
    collection = isinstance(plain, EmbeddingBagCollection)
    if wanted is None:
        wanted = collection and not any(f.has_table and f.mode == "max" for f in plain.features)
    if not wanted:
        yield
        return
    if not collection:
        raise ValueError(
            f"mapped_tables: the model's embeddings must be an EmbeddingBagCollection, got {type(plain)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model.embeddings = MappedEmbeddingBagCollection(plain, fresh)
    try:
        yield
    finally:
        model.embeddings = plain


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fit(
    model: nn.Module,
    train: ClickDataset,
    valid: ClickDataset,
    options: TrainOptions,
    progress: Callable[[Progress], None] | None,
    quality: Callable[[nn.Module, ClickDataset], Metrics],
) -> tuple[TrainResult, dict[str, torch.Tensor]]:
    """What came of it, and the best epoch's weights, maps folded."""
    optimizers = _optimizers(model, options)
    sign = MONITORS[options.monitor]
    steps = math.ceil(len(train) / options.batch_size)
    start = time.perf_counter()
    best, best_state, best_epoch = math.inf, None, 0
    best_valid: Metrics | None = None
    history: list[dict[str, float]] = []
    for epoch in range(1, options.epochs + 1):
        model.train()
        total = 0.0
        batches = train.batches(options.batch_size, seed=_seed(options.seed, epoch))
        for step, batch in enumerate(batches, start=1):
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss = model.loss(batch)
            value = loss.item()
            _check(value, f"the loss at epoch {epoch}, step {step} of {steps}", options)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            total += value
            if progress and step < steps:
                progress(
                    Progress(epoch, options.epochs, step, steps, total / step, time.perf_counter() - start)
                )
        plain = folded(model)  # as it will be saved
        measured = quality(plain, valid)
        _check(measured.log_loss, f"the validation loss after epoch {epoch}", options)
        seconds = time.perf_counter() - start
        history.append({"epoch": epoch, "loss": total / steps, "seconds": seconds, **measured.to_dict()})
        if progress:
            progress(Progress(epoch, options.epochs, steps, steps, total / steps, seconds, measured))
        score = sign * getattr(measured, options.monitor)
        if best_state is None or score < best:
            best, best_epoch, best_valid = score, epoch, measured
            best_state = copy.deepcopy(plain.state_dict())
        elif epoch - best_epoch >= options.patience:
            break
    return TrainResult(best_epoch, best_valid, time.perf_counter() - start, history), best_state


def _check(loss: float, what: str, options: TrainOptions) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"{what} is {loss}: a weight or an input is not a finite number, or the learning rates "
            f"({options.learning_rate:g}, tables {options.table_learning_rate or 'default'}) are too large"
        )


def predict(model: nn.Module, dataset: ClickDataset, *, batch_size: int = 4096) -> np.ndarray:
    """Click probabilities float32 [rows], in eval mode and without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            parts = [model(b.dense, b.indices, b.offsets).sigmoid() for b in dataset.batches(batch_size)]
    finally:
        model.train(training)
    return torch.cat(parts).numpy() if parts else np.zeros(0, dtype=np.float32)


def evaluate(model: nn.Module, dataset: ClickDataset, *, batch_size: int = 4096) -> Metrics:
    """Quality of the model on a dataset."""
    return Metrics.of(dataset.labels, predict(model, dataset, batch_size=batch_size))


def _seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def _optimizers(model: nn.Module, options: TrainOptions) -> list[torch.optim.Optimizer]:
    tables, others = split_parameters(model)
    size = sum(table.numel() for table in tables)
    chosen = options.table_optimizer
    if chosen == "auto":
        chosen = "adam" if size <= DENSE_NUMBERS else "sparse_adam"
    decay = {"weight_decay": options.weight_decay}
    optimizers = [torch.optim.Adam(others, lr=options.learning_rate, **decay, fused=True)]
    if tables:
        rate = options.table_learning_rate or TABLE_OPTIMIZERS[chosen]
        if chosen == "adam":
            optimizers.append(torch.optim.Adam(tables, lr=rate, fused=True))
        else:
            by_rows = {"sparse_adam": Adam, "rowwise_adagrad": RowWiseAdagrad}[chosen]
            optimizers.append(by_rows(tables, lr=rate))
    return optimizers


def evaluate_paths(model: MultiPathDLRM, dataset: ClickDataset) -> dict[str, Metrics]:
    """Quality of a multi-path model along each of its paths."""
    return {name: evaluate(model.path(name), dataset) for name in PATHS}


def _mean_over_paths(model: MultiPathDLRM, dataset: ClickDataset) -> Metrics:
    found = [astuple(metrics) for metrics in evaluate_paths(model, dataset).values()]
    return Metrics(*np.mean(found, axis=0).tolist())


def build_model(
    dataset: ClickDataset,
    representation: str,
    *,
    dim: int = 16,
    dhe: DheConfig | None = None,
    select_largest: int = 2,
    bottom: Sequence[int] = (64, 32),
    top: Sequence[int] = (64, 32),
    seed: int = 0,
) -> DLRM:
    """A DLRM for the dataset's features, all in one representation, or (``select``) the
    ``select_largest`` largest features as DHE and the others as tables; for ``multi-path``, a
    :class:`mprec.models.MultiPathDLRM`. The same seed gives the same weights; the global random state is
    left alone.
    """
    if representation not in (*REPRESENTATIONS, MULTI_PATH):
        choices = ", ".join((*REPRESENTATIONS, MULTI_PATH))
        raise ValueError(f"representation must be one of {choices}, got {representation!r}")
    dhe = DheConfig() if dhe is None else dhe
    features = [FeatureConfig(name, size, dim, dhe=dhe) for name, size in dataset.features]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if representation == MULTI_PATH:
            return MultiPathDLRM(features, dataset.num_dense, dim, bottom, top, select_largest)
        features = with_representation(features, representation, select_largest=select_largest)
        return DLRM(features, dataset.num_dense, dim, bottom, top)


@dataclass(frozen=True)
class Trained:
    """A trained model with what its checkpoint should remember."""

    model: DLRM
    result: TrainResult
    metadata: dict[str, Any]


def train_representations(
    dataset: ClickDataset,
    representations: Iterable[str] = REPRESENTATIONS,
    options: TrainOptions = TrainOptions(),
    *,
    split: str | None = None,
    progress: Callable[[str, Progress], None] | None = None,
    **model_arguments: Any,
) -> dict[str, Trained]:
    """Train one model per representation on the same split; ``model_arguments`` go to :func:`build_model`.

    Each one's ``metadata`` has the dataset's description, the split, the quality on the validation and
    test parts, the options, and the model's size; a ``multi-path`` model's also the quality along each
    path, under ``paths``.
    """
    parts = dict(zip(PARTS, dataset.split(by=split), strict=True))
    shared = {
        "dataset": dataset.describe(),
        "split": split or dataset.default_split,
        "rows": {name: len(part) for name, part in parts.items()},
        "seed": options.seed,
        "options": asdict(options),
    }
    held_out = ("valid", "test")
    trained = {}
    for name in representations:
        model = build_model(dataset, name, seed=options.seed, **model_arguments)
        report = partial(progress, name) if progress else None
        quality = _mean_over_paths if name == MULTI_PATH else evaluate
        result = train(model, parts["train"], parts["valid"], options, report, quality, fresh=True)
        with _threads(options.threads):
            measured = {part: evaluate(model, parts[part]) for part in held_out}
        metadata = {
            "representation": name,
            "metrics": {part: found.to_dict() for part, found in measured.items()},
            "epoch": result.best_epoch,
            "seconds": result.seconds,
            "parameters": sum(p.numel() for p in model.parameters()),
            "embedding_parameters": sum(p.numel() for p in model.embeddings.parameters()),
            **shared,
        }
        if name == MULTI_PATH:
            found = {part: evaluate_paths(model, parts[part]) for part in held_out}
            metadata["paths"] = {
                path: {part: found[part][path].to_dict() for part in held_out} for path in PATHS
            }
        trained[name] = Trained(model, result, metadata)
    return trained
