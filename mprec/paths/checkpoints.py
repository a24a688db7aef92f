"""Paths from the checkpoints of trained models."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch

from mprec import checkpoint
from mprec.cache import CachedEmbeddingBagCollection
from mprec.data import Batch, ClickDataset
from mprec.dispatch.paths import Path, shape_digest
from mprec.errors import CheckpointError, PathCompileError
from mprec.models import compile_path

__all__ = ["Scorer", "paths_from_checkpoints", "sampler", "with_cache"]


class Scorer:
    """Click probabilities [B] of a batch, by a model that returns logits: by its compiled path, or by the
    model itself where ``reason`` says why it has none (empty: it has)."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.reason = model.eval(), ""
        try:
            self.compiled = compile_path(model)
        except PathCompileError as error:
            self.compiled, self.reason = None, str(error)

    def __call__(self, batch: Batch) -> torch.Tensor:
        if self.compiled is not None:
            return self.compiled(batch.dense, batch.indices, batch.offsets)
        with torch.inference_mode():
            return self.model(batch.dense, batch.indices, batch.offsets).sigmoid()

    def path(self, name: str, representation: str, quality: float, description: Any) -> Path:
        """The path that scores so; ``description`` says what is measured, beside how it runs."""
        features, num_dense = self.model.embeddings.features, self.model.num_dense
        how = "model" if self.compiled is None else f"compiled {self.compiled.precision}"
        note = f"not compiled: {self.reason}" if self.reason else ""
        shape, inputs = shape_digest([description, how]), (len(features), num_dense)
        return Path(name, representation, quality, self, shape, inputs=inputs, note=note)


def paths_from_checkpoints(files: Sequence[str | os.PathLike], *, metric: str = "auc") -> list[Path]:
    """One path per checkpoint, or every path of a multi-path one; the quality is the metadata's validation
    metric of that name.

    Whole paths are native calls (:func:`mprec.compile_path`) where the model can be compiled; else the path's
    ``note`` says why not. A path is named after its representation, or after its file (and representation)
    where checkpoints share one. ``CheckpointError`` for a bad file; ``ValueError`` if the checkpoints do not
    take the same inputs.
    """
    if not files:
        raise ValueError("files must name at least one checkpoint")
    found: list[tuple[FilePath, str, float, torch.nn.Module, bool]] = []
    inputs = None
    for file in map(FilePath, files):
        model, metadata = checkpoint.load(file)
        here = ([(f.name, f.num_embeddings) for f in model.features], model.num_dense)
        if inputs is not None and here != inputs:
            raise ValueError(f"{file} takes other inputs (features or dense numbers) than {files[0]}")
        inputs = here
        try:
            if "paths" in metadata:  # one model, several paths
                for name, metrics in metadata["paths"].items():
                    found.append((file, name, float(metrics["valid"][metric]), model.path(name), True))
            else:
                quality = float(metadata["metrics"]["valid"][metric])
                found.append((file, str(metadata["representation"]), quality, model, False))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{file}: its metadata has no representation or no validation {metric}"
            ) from error
    shared = Counter(representation for _, representation, _, _, _ in found)
    paths = []
    for file, representation, quality, model, several in found:
        name = representation
        if shared[representation] > 1:
            name = f"{file.stem}/{representation}" if several else file.stem
        paths.append(Scorer(model).path(name, representation, quality, model.config()))
    if repeated := [name for name, count in Counter(path.name for path in paths).items() if count > 1]:
        raise ValueError(f"two checkpoints would both be called {repeated[0]!r}: rename a file")
    return paths


def with_cache(path: Path, nbytes: int, counts: Mapping[str, Any] | None = None) -> Path:
    """The same checkpoint's path with hot IDs' embeddings kept in ``nbytes`` (MP-Cache's encoder stage):
    exact, so of equal quality; it shares the path's weights.

    ``counts``: how often each ID of a feature occurs (``[vocabulary]``, by feature), to fill the cache at
    once and to divide its bytes. ``ValueError`` for a path without deep hash embeddings, or not of
    ``paths_from_checkpoints``.
    """
    if not isinstance(path.model, Scorer):
        raise ValueError(f"path {path.name!r}: not made by paths_from_checkpoints")
    model = path.model.model
    hashed = {feature.name for feature in model.embeddings.features if feature.has_dhe}
    known = None if counts is None else {name: c for name, c in counts.items() if name in hashed}
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    twin._modules["embeddings"] = CachedEmbeddingBagCollection(model.embeddings, nbytes, known)
    name, description = f"{path.name}+cache", [model.config(), "cache", nbytes]
    return Scorer(twin).path(name, path.representation, path.quality, description)


def sampler(dataset: ClickDataset) -> Callable[[int, np.random.Generator], Batch]:
    """Inputs for the microbenchmark: batches of random rows of a dataset."""
    if not len(dataset):
        raise ValueError(f"{dataset.name}: no rows to draw batches from")

    def draw(batch_size: int, rng: np.random.Generator) -> Batch:
        return dataset.batch(rng.integers(len(dataset), size=batch_size))

    return draw
