"""Bundles: one folder that holds several measured paths of one model.

``manifest.json`` names the paths, with the form of each one's embeddings, its qualities, bytes and latencies;
``weights-DIGEST.pt`` holds the tensors of all of them, those that paths share once. The manifest is replaced
in one step and names its weights by their digest, so a bundle that is written anew while it is served is the
old one or the new one. Nothing in it is run: it is JSON, and what ``torch.load(..., weights_only=True)``
reads.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mprec import checkpoint
from mprec.data import RawValues, Vocabulary
from mprec.dispatch.paths import shape_digest
from mprec.errors import CheckpointError
from mprec.files import write_whole
from mprec.models import DLRM
from mprec.models.compiled import PRECISIONS
from mprec.nn import folded
from mprec.paths.forms import build, form_of

__all__ = ["FORMAT", "MANIFEST", "Member", "describe", "is_bundle", "load", "save", "vocabularies"]

FORMAT = "mprec bundle"
VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Member:
    """One path of a bundle.

    ``metrics``: by part of the data (``valid``, ``test``), the value of each metric, as in the metadata of a
    checkpoint. ``facts``: what else is known of the path (JSON-able): bytes, latencies, standard errors.
    ``dense``: the precision of dense layers when it is served, as :func:`mprec.compile_path` takes it.
    """

    name: str
    representation: str
    model: DLRM
    metrics: Mapping[str, Mapping[str, float]]
    facts: Mapping[str, Any]
    dense: str = "float32"

    def quality(self, metric: str) -> float:
        """On the validation part. ``CheckpointError`` if that was not measured."""
        try:
            return float(self.metrics["valid"][metric])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"path {self.name!r} of the bundle has no validation {metric}") from error

    @property
    def shape(self) -> str:
        """What a profile of this path is known by."""
        return shape_digest([self.model.config(), form_of(self.model.embeddings)])


def is_bundle(path: str | os.PathLike) -> bool:
    """Is it a folder? A checkpoint is a file."""
    return Path(path).is_dir()


def save(
    folder: str | os.PathLike,
    members: Sequence[Member],
    metadata: Mapping[str, Any],
    vocabularies: Mapping[str, Vocabulary | RawValues] | None = None,
) -> Path:
    """Write a bundle into ``folder``, which is made if need be; returns the folder.

    ``metadata`` (JSON-able) says of the model what a checkpoint's says: dataset, split; ``vocabularies`` are
    what its features' raw values become IDs by. ``ValueError`` if two
    members share a name or there is none, ``TypeError`` if a model is no DLRM, ``OSError`` as the
    disk says; then a bundle that was there is as it was.
    """
    names = [member.name for member in members]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"members: expected at least one, each with a name of its own, got {names}")
    entries, state = [], {}
    for position, member in enumerate(members):
        if type(member.model) is not DLRM:
            raise TypeError(f"model: expected a DLRM in path {member.name!r}, got {type(member.model)}")
        model = folded(member.model)
        entries.append(
            {
                "name": member.name,
                "representation": member.representation,
                "config": model.config(),
                "embeddings": form_of(model.embeddings),
                "dense": member.dense,
                "metrics": member.metrics,
                **member.facts,
            }
        )
        # detach() keeps the storage, and torch saves each storage once.
        state |= {f"{position}/{key}": tensor.detach().cpu() for key, tensor in model.state_dict().items()}
    described, tensors = checkpoint.vocabularies_out(vocabularies or {})
    content = {"format": FORMAT, "version": VERSION, "state": state | tensors}
    content["digest"] = digest = checkpoint.digest_of(content)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "weights": digest,
        "metadata": dict(metadata),
        "vocabularies": described,
        "paths": entries,
    }
    text = json.dumps(manifest, indent=1).encode()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / _weights_name(digest)
    write_whole(weights, lambda stream: torch.save(content, stream))
    write_whole(folder / MANIFEST, lambda stream: stream.write(text))
    for old in folder.glob("weights-*.pt"):
        if old != weights:
            with contextlib.suppress(OSError):
                old.unlink()
    return folder


def _weights_name(digest: str) -> str:
    return f"weights-{digest[:16]}.pt"


def describe(folder: str | os.PathLike) -> dict[str, Any]:
    """The manifest. ``CheckpointError`` if the folder holds none that this mprec can read."""
    file = Path(folder) / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{folder} is no bundle: cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged, not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file} is no manifest of a bundle (no format {FORMAT!r})")
    if manifest.get("version") != VERSION:
        raise CheckpointError(
            f"{file} has bundle version {manifest.get('version')!r}; this mprec reads version {VERSION}"
        )
    if not manifest.get("paths"):
        raise CheckpointError(f"{file} names no paths")
    return manifest


def vocabularies(folder: str | os.PathLike) -> dict[str, Vocabulary | RawValues]:
    """What raw values become IDs by, by feature; empty if the bundle does not say. ``CheckpointError`` says
    what is wrong with the files.
    """
    folder = Path(folder)
    manifest = describe(folder)
    if not manifest.get("vocabularies"):
        return {}
    content = {**_weights(folder, manifest), "vocabularies": manifest["vocabularies"]}
    return checkpoint.vocabularies_in(folder, content)


def _weights(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The content of the file that the manifest was written with."""
    file = folder / _weights_name(str(manifest.get("weights")))
    content = checkpoint.read_digested(file, FORMAT, VERSION)
    if content["digest"] != manifest["weights"]:
        raise CheckpointError(f"{file} is not what {folder / MANIFEST} was written with")
    return content


def load(folder: str | os.PathLike) -> tuple[list[Member], dict[str, Any]]:
    """(the paths of a bundle, metadata). The weights are the file's pages, read when they are used and shared
    between paths and processes. ``CheckpointError`` says what is wrong with the files.
    """
    folder = Path(folder)
    manifest = describe(folder)
    content = _weights(folder, manifest)
    members = []
    try:
        for position, entry in enumerate(manifest["paths"]):
            prefix = f"{position}/"
            state = {k.removeprefix(prefix): v for k, v in content["state"].items() if k.startswith(prefix)}
            model = build(entry["config"], entry["embeddings"], state)
            known = ("name", "representation", "config", "embeddings", "metrics", "dense")
            facts = {key: value for key, value in entry.items() if key not in known}
            dense = entry.get("dense", "float32")
            if dense not in PRECISIONS:
                raise ValueError(f"path {entry['name']!r}: dense layers in {dense!r}")
            representation, metrics = entry["representation"], entry["metrics"]
            members.append(Member(entry["name"], representation, model, metrics, facts, dense))
        return members, dict(manifest["metadata"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: the weights do not fit the paths described: {error!r}") from error
