"""Paths from the checkpoints of trained models."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mprec import checkpoint
from mprec._native import PathProgram
from mprec.cache import CachedEmbeddingBagCollection
from mprec.data import Batch, ClickDataset, RawValues, Vocabulary
from mprec.dispatch.paths import ScoringPath, shape_digest
from mprec.errors import CheckpointError, PathCompileError
from mprec.models import CapturedPath, compile_path
from mprec.nn import EmbeddingBagCollection
from mprec.paths import bundle
from mprec.paths.forms import form_of

__all__ = [
    "Inputs",
    "Scorer",
    "can_cache",
    "inputs_of",
    "paths_from_checkpoints",
    "sampler",
    "vocabularies_of",
    "with_cache",
]


class Scorer:
    """Click probabilities [B] of a batch, by a model that returns logits: by its compiled path, or by the
    model itself where ``reason`` says why it has none (empty: it has).

    ``dense``: the precision of dense layers, as :func:`mprec.compile_path` takes it; the model itself
    computes in its own."""

    def __init__(self, model: torch.nn.Module, dense: str = "float32") -> None:
        self.model, self.dense, self.reason = model.eval(), dense, ""
        try:
            self.compiled = compile_path(model, dense)
        except PathCompileError as error:
            self.compiled, self.reason = None, str(error)

    def __call__(self, batch: Batch) -> torch.Tensor:
        if self.compiled is not None:
            return self.compiled(batch.dense, batch.bags)
        with torch.inference_mode():
            return self.model(batch.dense, batch.bags).sigmoid()

    @property
    def is_captured(self) -> bool:
        """Whether it replays CUDA graphs: it then takes batches on the CPU too, and copies them itself."""
        return isinstance(self.compiled, CapturedPath)

    def program(self) -> PathProgram | None:
        """The compiled path's native call, its weights packed as they are now."""
        return None if self.compiled is None else self.compiled.program()

    def path(self, name: str, representation: str, quality: float, description: Any) -> ScoringPath:
        """The path that scores so; ``description`` says what is measured, beside how it runs."""
        features, num_dense = self.model.embeddings.features, self.model.num_dense
        how = "captured" if self.is_captured else "compiled"
        how = "model" if self.compiled is None else f"{how} {self.compiled.precision}"
        note = f"not compiled: {self.reason}" if self.reason else ""
        shape, inputs = shape_digest([description, how]), (len(features), num_dense)
        return ScoringPath(name, representation, quality, self, shape, inputs=inputs, note=note)


def paths_from_checkpoints(files: Sequence[str | os.PathLike], *, metric: str = "auc") -> list[ScoringPath]:
    """One path per checkpoint, or every path of a multi-path one or of a bundle; the quality is the
    metadata's validation metric of that name.

    Whole paths are native calls (:func:`mprec.compile_path`) where the model can be compiled; else the path's
    ``note`` says why not. A path of a bundle has its name there, with the folder's before it where two have
    the same. Another is named after its representation, or after its file (and representation) where
    checkpoints share one. ``CheckpointError`` for a bad file; ``ValueError`` if the checkpoints do not take
    the same inputs.
    """
    if not files:
        raise ValueError("files: expected at least one checkpoint, got none")
    found: list[_Found] = []
    inputs = None
    for file in map(Path, files):
        here, made = _open(file, metric)
        if inputs is not None and here != inputs:
            raise ValueError(f"{file} takes other inputs (features or dense numbers) than {files[0]}")
        inputs = here
        found += made
    shared = Counter(each.name for each in found)
    paths = []
    for each in found:
        name = each.name
        if shared[name] > 1:
            name = f"{each.file.stem}/{name}" if each.several else each.file.stem
        scorer = Scorer(each.model, each.dense)
        paths.append(scorer.path(name, each.representation, each.quality, each.shape))
    if repeated := [name for name, count in Counter(path.name for path in paths).items() if count > 1]:
        raise ValueError(f"two checkpoints would both be called {repeated[0]!r}: rename a file")
    return paths


class _Found(NamedTuple):
    """A path in a file, before it has its name among those of other files."""

    file: Path
    name: str
    representation: str
    quality: float
    model: torch.nn.Module
    shape: str
    several: bool  # in that file
    dense: str  # precision of dense layers


def _open(file: Path, metric: str) -> tuple[tuple[list[tuple[str, int]], int], list[_Found]]:
    """(inputs, paths) of a checkpoint or a bundle."""
    if bundle.is_bundle(file):
        members, metadata = bundle.load(file)
        model, several = members[0].model, True
        rows = [(m.name, m.representation, m.metrics, m.model, m.shape, m.dense) for m in members]
    else:
        model, metadata = checkpoint.load(file)
        several = "paths" in metadata  # one model, several paths
        rows = []
        try:
            if several:
                for name, metrics in metadata["paths"].items():
                    path = model.path(name)
                    rows.append((name, name, metrics, path, shape_digest(path.config()), "float32"))
            else:
                name = str(metadata["representation"])
                shape = shape_digest(model.config())
                rows.append((name, name, metadata["metrics"], model, shape, "float32"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{file}: its metadata has no representation or no metrics") from error
    try:
        found = [
            _Found(file, name, kind, float(metrics["valid"][metric]), each, shape, several, dense)
            for name, kind, metrics, each, shape, dense in rows
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: its metadata has no representation or no validation {metric}"
        ) from error
    return ([(f.name, f.num_embeddings) for f in model.features], model.num_dense), found


class Inputs(NamedTuple):
    """What the models of a checkpoint or a bundle take, how their data was split (None: its default) and
    which of its features were crossed (:mod:`mprec.data.cross`)."""

    features: list[tuple[str, int]]  # (name, vocabulary)
    num_dense: int
    split: str | None
    crosses: Mapping[str, Any] | None


def inputs_of(file: str | os.PathLike) -> Inputs:
    """The inputs of a checkpoint or a bundle, without making models. ``CheckpointError`` for a bad file."""
    if bundle.is_bundle(file):
        manifest = bundle.describe(file)
        config, metadata = manifest["paths"][0].get("config"), manifest.get("metadata", {})
    else:
        config, metadata = checkpoint.describe(file)
    try:
        features = [(str(f["name"]), int(f["num_embeddings"])) for f in config["features"]]
        crosses = metadata.get("dataset", {}).get("crosses")
        return Inputs(features, int(config["num_dense"]), metadata.get("split"), crosses)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: its config does not name the model's inputs: {error!r}") from error


def vocabularies_of(file: str | os.PathLike) -> dict[str, Vocabulary | RawValues]:
    """What raw values become IDs by, by feature, of a checkpoint or a bundle; empty if it does not say.
    ``CheckpointError`` for a bad file."""
    return bundle.vocabularies(file) if bundle.is_bundle(file) else checkpoint.vocabularies(file)


def can_cache(path: ScoringPath) -> bool:
    """Has the path plain decoders, so that :func:`with_cache` takes it?"""
    embeddings = getattr(getattr(path.model, "model", None), "embeddings", None)
    return type(embeddings) is EmbeddingBagCollection and any(f.has_dhe for f in embeddings.features)


def with_cache(path: ScoringPath, nbytes: int, counts: Mapping[str, Any] | None = None) -> ScoringPath:
    """The same checkpoint's path with hot IDs' embeddings kept in ``nbytes`` (MP-Cache's encoder stage):
    exact, so of equal quality; it shares the path's weights.

    ``counts``: how often each ID of a feature occurs (``[vocabulary]``, by feature), to fill the cache at
    once and to divide its bytes. ``ValueError`` for a path without deep hash embeddings, or not of
    ``paths_from_checkpoints``.
    """
    if not isinstance(path.model, Scorer):
        raise ValueError(f"path {path.name!r}: not made by paths_from_checkpoints")
    model = path.model.model
    if type(model.embeddings) is not EmbeddingBagCollection:
        form = form_of(model.embeddings)["form"]
        raise ValueError(f"path {path.name!r}: a cache is for plain decoders, not for {form} ones")
    hashed = {feature.name for feature in model.embeddings.features if feature.has_dhe}
    known = None if counts is None else {name: c for name, c in counts.items() if name in hashed}
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin._modules["embeddings"] = CachedEmbeddingBagCollection(model.embeddings, nbytes, known)
    name, description = f"{path.name}+cache", [model.config(), "cache", nbytes]
    return Scorer(twin, path.model.dense).path(name, path.representation, path.quality, description)


def sampler(dataset: ClickDataset) -> Callable[[int, np.random.Generator], Batch]:
    """Inputs for the microbenchmark: batches of random rows of a dataset."""
    if not len(dataset):
        raise ValueError(f"{dataset.name}: no rows to draw batches from")

    def draw(batch_size: int, rng: np.random.Generator) -> Batch:
        return dataset.batch(rng.integers(len(dataset), size=batch_size))

    return draw
