"""Models on disk: one file, written all or not at all, loadable without running code from it.

The file is ``torch.save`` of plain containers and tensors, so ``torch.load(path, weights_only=True)``
reads it: ``format`` and ``version``, the model's ``kind`` and ``config``, its ``state`` and ``metadata``
(JSON-able: what it was trained on and how good it is), the ``vocabularies`` by which raw values become IDs,
and the ``digest`` of all these.

The digest is checked against what has been read, so that no way of reading a damaged file, and no flaw of a
disk or network between the two processes, gives other weights. ``torch.save`` writes a zip archive, whose own
checksums torch does not check; files of version 1 have no others, so theirs are checked by :mod:`zipfile`.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mprec.data.vocabulary import RawValues, Vocabulary, dump, restore
from mprec.errors import CheckpointError
from mprec.files import write_whole
from mprec.models import KINDS
from mprec.nn import folded

__all__ = [
    "FORMAT",
    "VERSION",
    "describe",
    "digest_of",
    "load",
    "read_digested",
    "save",
    "vocabularies",
    "vocabularies_in",
    "vocabularies_out",
]

FORMAT = "mprec checkpoint"
VERSION = 3  # 1: without a digest; 2: without vocabularies
_PREFIX = "vocabulary/"  # of tensors of the state; no parameter's name has a slash


def save(
    path: Path | str,
    model: nn.Module,
    metadata: dict[str, Any],
    vocabularies: Mapping[str, Vocabulary | RawValues] | None = None,
) -> None:
    """Write the model, its mapped tables folded, and what its features' raw values become IDs by. An old file
    at ``path`` stays whole until the new one is on the disk.

    ``TypeError`` if the metadata is not JSON-able or the model is none of mprec's; ``OSError`` as the
    disk says.
    """
    kind = next((name for name, cls in KINDS.items() if type(model) is cls), None)
    if kind is None:
        raise TypeError(
            f"model: expected one of {', '.join(c.__name__ for c in KINDS.values())}, got {type(model)}"
        )
    content = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "config": json.loads(json.dumps(model.config())),
        "state": {name: tensor.detach().cpu() for name, tensor in folded(model).state_dict().items()},
        "metadata": json.loads(json.dumps(metadata)),
    }
    content["vocabularies"], tensors = vocabularies_out(vocabularies or {})
    content["state"] |= tensors
    content["digest"] = digest_of(content)
    write_whole(path, lambda stream: torch.save(content, stream))


def load(path: Path | str) -> tuple[nn.Module, dict[str, Any]]:
    """(model in eval mode on the CPU, metadata). ``CheckpointError`` says what is wrong with the file.

    The weights are read from the file's pages into the model's own memory: no second copy of them is made.
    """
    path = Path(path)
    content = _read(path)
    try:
        model = KINDS[content["kind"]].from_config(content["config"])
        state = content["state"]
        model.load_state_dict({name: t for name, t in state.items() if not name.startswith(_PREFIX)})
        metadata = dict(content["metadata"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path}: the weights do not fit the model described: {error}") from error
    return model.eval(), metadata


def describe(path: Path | str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the model's config, metadata), without making the model. The whole file is checked all the same.

    ``CheckpointError`` says what is wrong with the file.
    """
    content = _read(Path(path))
    try:
        return dict(content["config"]), dict(content["metadata"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: has no config or no metadata: {error}") from error


def vocabularies(path: Path | str) -> dict[str, Vocabulary | RawValues]:
    """What raw values become IDs by, by feature; empty if the checkpoint does not say.

    ``CheckpointError`` says what is wrong with the file.
    """
    return vocabularies_in(Path(path), _read(Path(path)))


def vocabularies_out(
    encoders: Mapping[str, Vocabulary | RawValues],
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(JSON types, tensors for a ``state``) that :func:`vocabularies_in` finds again in a file's content."""
    described, arrays = dump(encoders)
    return described, {_PREFIX + name: torch.from_numpy(np.array(a)) for name, a in arrays.items()}


def vocabularies_in(path: Path, content: Mapping[str, Any]) -> dict[str, Vocabulary | RawValues]:
    """The vocabularies in a file's content. ``CheckpointError`` if they are none."""
    arrays = {
        name.removeprefix(_PREFIX): tensor.numpy()
        for name, tensor in content["state"].items()
        if name.startswith(_PREFIX)
    }
    try:
        return restore(content.get("vocabularies", {}), arrays)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: the vocabularies do not fit: {error!r}") from error


def _read(path: Path) -> dict[str, Any]:
    """The file's content, found whole; its tensors are views of the file's pages."""
    content = _load(path, FORMAT)
    match content.get("version"):
        case 1:
            _check_archive(path)
        case 2 | 3:
            _check_digest(path, content)
        case other:
            raise CheckpointError(
                f"{path} has checkpoint version {other!r}; this mprec reads versions 1 to {VERSION}"
            )
    return content


def read_digested(path: Path, form: str, version: int) -> dict[str, Any]:
    """The content of a file of tensors in another format of mprec's, whose ``digest`` fits: ``format``,
    ``version`` and ``state``, the tensors, which are views of the file's pages. ``CheckpointError`` says what
    is wrong with the file.
    """
    content = _load(path, form)
    if content.get("version") != version:
        raise CheckpointError(
            f"{path} has version {content.get('version')!r} of {form}; this mprec reads version {version}"
        )
    _check_digest(path, content)
    return content


def _load(path: Path, form: str) -> dict[str, Any]:
    noun = form.removeprefix("mprec ")
    try:
        open(path, "rb").close()
    except OSError as error:
        raise CheckpointError(f"cannot read {noun} {path}: {error.strerror or error}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles of other kinds: the error says it
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # damage shows as anything from OSError to AssertionError
            first_line = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{path} is damaged or no {noun} of mprec's: {first_line}") from error
    if not isinstance(content, dict) or content.get("format") != form:
        raise CheckpointError(f"{path} is no {noun} of mprec's (it was saved by something else)")
    return content


def _check_archive(path: Path) -> None:
    """The zip archive's own checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # damage shows as anything, as above
        raise CheckpointError(f"{path} is damaged or no checkpoint of mprec's: {error}") from error
    if bad is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {bad} does not fit")


def _check_digest(path: Path, content: dict[str, Any]) -> None:
    try:
        digest = digest_of(content)
    except Exception as error:  # what was read is not of the kinds that were saved
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    if digest != content.get("digest"):
        raise CheckpointError(f"{path} is damaged: the digest does not fit the content")


def digest_of(content: dict[str, Any]) -> str:
    """BLAKE2b of the content but its digest: a line of JSON, then the bytes of the tensors in its order."""
    state = sorted(content["state"].items())
    described = {key: value for key, value in content.items() if key not in ("state", "digest")}
    described["state"] = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in state]
    digest = hashlib.blake2b(json.dumps(described, sort_keys=True).encode() + b"\n", digest_size=32)
    for _, tensor in state:
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
