"""The training loop."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mprec.data import ClickDataset
from mprec.errors import TrainingError, TrainingInterruptedError
from mprec.files import check_room
from mprec.metrics import Metrics
from mprec.nn import EmbeddingBagCollection, MappedEmbeddingBagCollection, folded
from mprec.optim import Adam, RowWiseAdagrad, split_parameters
from mprec.training import snapshot
from mprec.training.options import MONITORS, TABLE_OPTIMIZERS, Progress, TrainOptions, TrainResult
from mprec.training.quality import evaluate
from mprec.training.snapshot import Position

__all__ = ["Keep", "threads", "train"]

DENSE_NUMBERS = 1 << 20

Quality = Callable[[nn.Module, ClickDataset], Metrics]


@dataclass(frozen=True)
class Keep:
    """What outlives a training that is cut off.

    Args:
        snapshot: a file that it can go on from, written after each epoch and when ``stop`` says so.
        resume: go on from ``snapshot`` if it is there.
        best: told of each epoch that is better than those before: the model as it is to be saved, maps
            folded, and the result so far.
        stop: asked before each batch; true ends training by ``TrainingInterruptedError``.
    """

    snapshot: Path | None = None
    resume: bool = False
    best: Callable[[nn.Module, TrainResult], object] | None = None
    stop: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        if self.resume and self.snapshot is None:
            raise ValueError("resume: there is no snapshot to resume from")


def train(
    model: nn.Module,
    train: ClickDataset,
    valid: ClickDataset,
    options: TrainOptions | None = None,
    progress: Callable[[Progress], None] | None = None,
    quality: Quality | None = None,
    *,
    fresh: bool = False,
    keep: Keep = Keep(),
) -> TrainResult:
    """Fit ``model`` in place to ``train``; leaves it in eval mode with the weights of its best epoch on
    ``valid``.

    ``quality`` measures the model after each epoch (default: :func:`evaluate`). ``fresh`` says that the model
    is untrained, so that maps of tables may start at random, which is better then; they start at the identity
    otherwise, and a trained model goes on from where it is.

    The same seed, data, threads and machine give the same weights, also where training was interrupted and
    resumed (``keep``). ``TrainingError`` if the loss is not a number, ``TrainingInterruptedError`` if it is
    told to stop, ``OSError`` before it starts if the disk has no room for the snapshot.
    """
    options = TrainOptions() if options is None else options
    if not len(train) or not len(valid):
        raise ValueError(f"train, valid: expected rows, got {len(train)} and {len(valid)}")
    if options.monitor == "auc" and valid.labels.min() == valid.labels.max():
        raise ValueError("valid has labels of one kind only, so no AUC: monitor log_loss")
    with threads(options.threads), _mapped(model, options, fresh):
        result, best = _Training(model, train, valid, options, progress, quality or evaluate, keep).run()
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
        raise ValueError(f"mapped_tables: expected a model of an EmbeddingBagCollection, got {type(plain)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model.embeddings = MappedEmbeddingBagCollection(plain, fresh)
    try:
        yield
    finally:
        model.embeddings = plain


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, torch's threads are so many."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Training:
    """One training, from its position to its end."""

    def __init__(
        self,
        model: nn.Module,
        train: ClickDataset,
        valid: ClickDataset,
        options: TrainOptions,
        progress: Callable[[Progress], None] | None,
        quality: Quality,
        keep: Keep,
    ) -> None:
        self.model, self.train, self.valid, self.options = model, train, valid, options
        self.progress, self.quality, self.keep = progress, quality, keep
        self.steps = math.ceil(len(train) / options.batch_size)
        tables, others = split_parameters(model)
        self.others = others
        self.optimizers = _optimizers(tables, others, options)
        self.rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        self.position = Position()
        if keep.snapshot is not None:
            self.identity = snapshot.identity(asdict(options), train, valid, model)
            # Weights, two moments and the best weights, while an older snapshot is there.
            check_room(keep.snapshot, 4 * sum(p.nbytes for p in model.parameters()))
            if keep.resume and keep.snapshot.exists():
                self.position = snapshot.load(keep.snapshot, model, self.optimizers, self.identity)
        self.start = time.perf_counter() - self.position.seconds

    def run(self) -> tuple[TrainResult, dict[str, torch.Tensor]]:
        """What came of it, and the best epoch's weights, maps folded."""
        position, options = self.position, self.options
        while position.epoch <= options.epochs and not self._is_exhausted():
            self._epoch()
            self._validate()
            position.epoch, position.step, position.total = position.epoch + 1, 0, 0.0
            self._save()
        return self._result(), position.best_state

    def _is_exhausted(self) -> bool:
        done, best = self.position.epoch - 1, self.position.best_epoch
        return bool(best) and done - best >= self.options.patience

    def _epoch(self) -> None:
        """What is left of the epoch."""
        position, options = self.position, self.options
        self.model.train()
        batches = self.train.batches(
            options.batch_size, seed=_seed(options.seed, position.epoch), first=position.step
        )
        for batch in batches:
            if self.keep.stop():
                self._interrupted()
            position.total += self._step(batch)
            position.step += 1
            if self.progress and position.step < self.steps:
                self._tell()

    def _step(self, batch) -> float:
        """One batch; its loss."""
        position, options = self.position, self.options
        done = (position.epoch - 1) * self.steps + position.step
        factor = options.rate_factor(done, options.epochs * self.steps)
        rates = iter(self.rates)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = next(rates) * factor
        loss = self.model.loss(batch)
        value = loss.item()
        _check(
            value, f"the loss at epoch {position.epoch}, step {position.step + 1} of {self.steps}", options
        )
        loss.backward()
        if options.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.others, options.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        return value

    def _validate(self) -> None:
        position, options = self.position, self.options
        plain = folded(self.model)  # as it will be saved
        measured = self.quality(plain, self.valid)
        _check(measured.log_loss, f"the validation loss after epoch {position.epoch}", options)
        loss, seconds = position.total / self.steps, self._seconds()
        position.history.append(
            {"epoch": position.epoch, "loss": loss, "seconds": seconds, **measured.to_dict()}
        )
        if self.progress:
            self._tell(measured)
        if not position.best_epoch or self._rank(measured) < self._rank(Metrics(**position.best_valid)):
            position.best_epoch, position.best_valid = position.epoch, measured.to_dict()
            position.best_state = copy.deepcopy(plain.state_dict())
            if self.keep.best is not None:
                self.keep.best(plain, self._result())

    def _rank(self, measured: Metrics) -> tuple[bool, float]:
        """Smaller is better."""
        monitor = self.options.monitor
        return measured.normalised_entropy > 1, MONITORS[monitor] * getattr(measured, monitor)

    def _tell(self, measured: Metrics | None = None) -> None:
        position, options = self.position, self.options
        loss = position.total / max(position.step, 1)
        self.progress(
            Progress(
                position.epoch,
                options.epochs,
                position.step,
                self.steps,
                loss,
                self._seconds(),
                measured,
                options.batch_size,
            )
        )

    def _seconds(self) -> float:
        return time.perf_counter() - self.start

    def _result(self) -> TrainResult:
        position = self.position
        valid = Metrics(**position.best_valid)
        return TrainResult(position.best_epoch, valid, self._seconds(), list(position.history))

    def _save(self) -> None:
        if self.keep.snapshot is not None:
            self.position.seconds = self._seconds()
            snapshot.save(self.keep.snapshot, self.model, self.optimizers, self.position, self.identity)

    def _interrupted(self) -> None:
        self._save()
        position = self.position
        where = f"epoch {position.epoch}, before step {position.step + 1} of {self.steps}"
        raise TrainingInterruptedError(f"training was interrupted at {where}")


def _check(loss: float, what: str, options: TrainOptions) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"{what} is {loss}: a weight or an input is not a finite number, or the learning rates "
            f"({options.learning_rate:g}, tables {options.table_learning_rate or 'default'}) are too large"
        )


def _seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])


def _optimizers(
    tables: Sequence[nn.Parameter], others: Sequence[nn.Parameter], options: TrainOptions
) -> list[torch.optim.Optimizer]:
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
