"""Trainings that are cut off and go on: all that decides what comes next, in one file.

A snapshot holds the model as it is trained (maps not folded), the optimizers' state, the position within the
epoch and the best epoch's weights. The order of samples, the learning rate and the maps' initial values
follow from options and position, so they are not in it. It is written whole or not at all, with a digest, and
says of which data and options it is: going on with others would be another training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mprec import checkpoint
from mprec.data import ClickDataset
from mprec.errors import CheckpointError
from mprec.files import write_whole

__all__ = ["Position", "identity", "load", "save"]

FORMAT = "mprec training"
VERSION = 1
_SAMPLED_ROWS = 1 << 16


@dataclass
class Position:
    """Where a training stands. ``best_state``: the best epoch's weights, maps folded; ``best_valid`` its
    metrics by name.
    """

    epoch: int = 1  # the one that is being trained
    step: int = 0  # batches of it that are done
    total: float = 0.0  # sum of their losses
    seconds: float = 0.0
    best_epoch: int = 0  # 0: there is none
    best_valid: dict[str, float] = field(default_factory=dict)
    best_state: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def identity(options: dict[str, Any], train: ClickDataset, valid: ClickDataset, model: nn.Module) -> dict:
    """What must not change between a training's parts (JSON types), in words that a message can use."""
    shapes = [[name, list(tensor.shape)] for name, tensor in model.state_dict().items()]
    return {
        "options": options,
        "training part": _digest(train),
        "validation part": _digest(valid),
        "model": hashlib.blake2b(json.dumps(shapes).encode(), digest_size=16).hexdigest(),
    }


def _digest(dataset: ClickDataset) -> str:
    """Of the number of rows, the features, and rows spread evenly over the log."""
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), _SAMPLED_ROWS)).astype(np.int64))
    batch = dataset.batch(rows)
    described = json.dumps([len(dataset), dataset.features, dataset.num_dense]).encode()
    digest = hashlib.blake2b(described, digest_size=16)
    for tensor in batch.tensors().values():
        digest.update(tensor.contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()


def save(
    file: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    position: Position,
    identity: dict[str, Any],
) -> None:
    """Write a snapshot; an old one stays whole until it is on the disk. ``OSError`` as the disk says."""
    state = {f"model/{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    state |= {f"best/{name}": tensor for name, tensor in position.best_state.items()}
    for number, optimizer in enumerate(optimizers):
        for parameter, values in optimizer.state_dict()["state"].items():
            state |= {
                f"optimizer/{number}/{parameter}/{key}": torch.as_tensor(value).detach()
                for key, value in values.items()
            }
    where = {key: value for key, value in vars(position).items() if key != "best_state"}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "state": state,
        # As they will be read: a digest is of what is in the file.
        **json.loads(json.dumps({"position": where, "identity": identity})),
    }
    content["digest"] = checkpoint.digest_of(content)
    write_whole(file, lambda stream: torch.save(content, stream))


def load(
    file: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], identity: dict[str, Any]
) -> Position:
    """Put model and optimizers where the snapshot was taken. ``CheckpointError`` for a file that is none or
    is damaged, ``ValueError`` if it is of another training.
    """
    content = checkpoint.read_digested(file, FORMAT, VERSION)
    wanted = json.loads(json.dumps(identity))
    for what, value in wanted.items():
        found = content["identity"].get(what)
        if found == value:
            continue
        if isinstance(value, dict) and isinstance(found, dict):
            key = next(key for key in {**value, **found} if value.get(key) != found.get(key))
            what, found, value = f"{what}: {key}", found.get(key), value.get(key)
        raise ValueError(f"cannot resume from {file}, a training with another {what} ({found}, now {value})")
    # Clones: the file's pages are not aligned as torch's memory is, and are to be replaced.
    state = {name: tensor.clone() for name, tensor in content["state"].items()}
    try:
        model.load_state_dict(_under(state, "model/"))
        for number, optimizer in enumerate(optimizers):
            values: dict[int, dict[str, Tensor]] = {}
            for name, tensor in _under(state, f"optimizer/{number}/").items():
                parameter, key = name.split("/")
                values.setdefault(int(parameter), {})[key] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": values})
        return Position(**content["position"], best_state=_under(state, "best/"))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file}: the state does not fit the training: {error}") from error


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
