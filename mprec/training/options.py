"""What can be chosen about training, and what it tells."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from mprec.metrics import Metrics

__all__ = ["DECAYS", "MONITORS", "TABLE_OPTIMIZERS", "Progress", "TrainOptions", "TrainResult"]

TABLE_OPTIMIZERS = {"adam": 2e-3, "sparse_adam": 2e-3, "rowwise_adagrad": 1e-2}  # and their learning rates
MONITORS = {"auc": -1.0, "log_loss": 1.0}  # sign that makes smaller better
#: Share of the learning rate that is left when a share ``x`` of the steps after warming up is done.
DECAYS = {
    "none": lambda x: 1.0,
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1.0 + math.cos(math.pi * x)),
}


@dataclass(frozen=True)
class TrainOptions:
    """``patience``: epochs without a better ``monitor`` (``auc`` or ``log_loss`` of the validation part)
    before training stops; the best epoch's weights are kept. An epoch whose log-loss is worse than that of
    telling every sample the share of clicks is kept only while there is none without that fault.

    ``learning_rate`` is Adam's for MLPs and DHE decoders. Tables take ``adam`` or, touching only the rows of
    a batch, ``sparse_adam`` (:class:`mprec.optim.Adam`) or ``rowwise_adagrad``, whose state is a dim-th of
    Adam's; ``auto`` takes ``adam`` for up to a million numbers, where it is fast enough, else
    ``sparse_adam``. Their ``table_learning_rate`` is 0.002, or 0.01 for Adagrad, unless given. All rates grow
    linearly over the first ``warmup_steps`` batches and then fall to zero at the end of ``epochs`` by
    ``decay``: ``linear``, ``cosine`` or ``none``. ``clip_norm`` bounds the norm of the gradient of everything
    but tables, whose optimizers bound a row's step by themselves.

    ``mapped_tables`` trains each table through a map of its feature that is folded into the rows afterwards
    (:class:`mprec.nn.MappedEmbeddingBagCollection`); None: where the model's tables allow it. ``threads`` are
    torch's during training: the layers of a small model are too short to share, and on a busy machine waiting
    for a second thread costs many times the work.
    """

    epochs: int = 20
    batch_size: int = 1024
    learning_rate: float = 2e-3
    table_optimizer: str = "auto"
    table_learning_rate: float | None = None
    warmup_steps: int = 0
    decay: str = "none"
    clip_norm: float | None = None
    mapped_tables: bool | None = None
    weight_decay: float = 0.0
    patience: int = 2
    monitor: str = "auc"
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "table_learning_rate", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps: expected at least 0, got {self.warmup_steps}")
        for name, known in (
            ("table_optimizer", ("auto", *TABLE_OPTIMIZERS)),
            ("monitor", MONITORS),
            ("decay", DECAYS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")

    def rate_factor(self, step: int, steps: int) -> float:
        """What learning rates are multiplied by at ``step``, from 0, of ``steps`` in all epochs."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return DECAYS[self.decay]((step - self.warmup_steps) / max(steps - self.warmup_steps, 1))


@dataclass(frozen=True)
class Progress:
    """Where training stands; ``valid`` is there once, at the end of each epoch. ``loss`` is a running
    mean, ``seconds`` those of the whole training. ``batch_size``: samples of a step.
    """

    epoch: int  # from 1
    epochs: int
    step: int  # from 1, within the epoch
    steps: int
    loss: float
    seconds: float
    valid: Metrics | None = None
    batch_size: int = 0


@dataclass(frozen=True)
class TrainResult:
    """``history`` has one record per epoch; ``valid`` is the quality of the weights that were kept."""

    best_epoch: int
    valid: Metrics
    seconds: float
    history: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
