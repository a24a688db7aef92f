"""Models on disk: one file, written all or not at all, loadable without running code from it.

The file is ``torch.save`` of plain containers and tensors, so ``torch.load(path, weights_only=True)``
reads it: ``format`` and ``version``, the model's ``kind`` and ``config``, its ``state`` and ``metadata``
(JSON-able: what it was trained on and how good it is).
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mprec.errors import CheckpointError
from mprec.files import write_whole
from mprec.models import KINDS

__all__ = ["FORMAT", "VERSION", "load", "save"]

FORMAT = "mprec checkpoint"
VERSION = 1


def save(path: Path | str, model: nn.Module, metadata: dict[str, Any]) -> None:
    """Write the model. An old file at ``path`` stays whole until the new one is on the disk.

    ``TypeError`` if the metadata is not JSON-able or the model is none of mprec's; ``OSError`` as the
    disk says.
    """
    kind = next((name for name, cls in KINDS.items() if type(model) is cls), None)
    if kind is None:
        raise TypeError(
            f"model must be one of {', '.join(c.__name__ for c in KINDS.values())}, not {type(model)}"
        )
    content = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "config": json.loads(json.dumps(model.config())),
        "state": {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
        "metadata": json.loads(json.dumps(metadata)),
    }
    write_whole(path, lambda stream: torch.save(content, stream))


def load(path: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """(model in eval mode on the CPU, metadata). ``CheckpointError`` says what is wrong with the file."""
    path = Path(path)
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed by the with below; errors of opening are another kind
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    with file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles of other kinds: the error says it
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damage shows as anything from OSError to AssertionError
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{path} is damaged or no checkpoint of mprec's: {first_line}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of mprec's (it was saved by something else)")
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {content.get('version')!r}; this mprec reads version {VERSION}"
        )
    try:
        model = KINDS[content["kind"]].from_config(content["config"])
        model.load_state_dict(content["state"])
        metadata = dict(content["metadata"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path}: the weights do not fit the model described: {error}") from error
    return model.eval(), metadata
