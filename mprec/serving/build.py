"""An engine from the files of trained models: what every program that serves them begins with.

inputs = model_inputs(["table.pt", "hybrid.pt"])
with engine_from_checkpoints(["table.pt", "hybrid.pt"], sla_s=0.010) as engine:
    batch = rows_to_batch(ids, dense, inputs.vocabularies, inputs.num_dense)
    answer = engine.score(batch)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mprec.data import RawValues, Vocabulary
from mprec.data.vocabulary import same_ids
from mprec.data.zipf import zipf_batches
from mprec.dispatch import Dispatcher, Profile
from mprec.paths import inputs_of, paths_from_checkpoints, vocabularies_of
from mprec.serving.engine import Engine

__all__ = ["ModelInputs", "engine_from_checkpoints", "model_inputs"]


class ModelInputs(NamedTuple):
    """What a sample consists of: an ID (or a bag of them) below ``vocabularies[t]`` for each feature, called
    ``names[t]``, and ``num_dense`` numbers. ``encoders[t]`` makes IDs of a feature's raw values; None: the
    checkpoints do not say how."""

    vocabularies: list[int]
    names: list[str]
    num_dense: int
    encoders: Sequence[Vocabulary | RawValues] | None = None


def model_inputs(files: Sequence[str | os.PathLike]) -> ModelInputs:
    """The inputs that the models of all the checkpoints (or bundles) take, without making the models.

    ``CheckpointError`` for a bad file; ``ValueError`` if there is no file or two take different inputs, or
    make other IDs of raw values.
    """
    if not files:
        raise ValueError("files: expected at least one checkpoint, got none")
    found = None
    for file in files:
        features, num_dense, *_ = inputs_of(file)
        names, known = [name for name, _ in features], vocabularies_of(file)
        encoders = [known[name] for name in names] if set(names) <= set(known) else None
        here = ModelInputs([size for _, size in features], names, num_dense, encoders)
        if found is not None and here[:3] != found[:3]:
            raise ValueError(f"{file} takes other inputs (features or dense numbers) than {files[0]}")
        if found is not None and None not in (encoders, found.encoders):
            for name, own, first in zip(names, encoders, found.encoders, strict=True):
                if not same_ids(own, first):
                    raise ValueError(f"{file} makes other IDs of the values of {name!r} than {files[0]}")
        if found is not None and found.encoders is None:
            here = here._replace(encoders=None)
        found = here
    return found


def engine_from_checkpoints(
    files: Sequence[str | os.PathLike],
    *,
    sla_s: float,
    metric: str = "accuracy",
    profile: Profile | str | os.PathLike | None = None,
    profile_seconds: float = 5.0,
    make_input: Callable[[int, np.random.Generator], Any] | None = None,
    **engine_options: Any,
) -> Engine:
    """An engine, not yet started, that answers by the paths of all the checkpoints.

    ``metric`` (``accuracy`` or ``auc``, of the validation split) says which of two paths is better. The paths
    are measured on this machine for about ``profile_seconds``, on batches of ``make_input(batch_size, rng)``
    or else of random IDs (:func:`mprec.data.zipf.zipf_batches`), unless the user's cache folder has a profile
    of them. ``profile`` names another file for it, or is one, which is then taken as it is.
    ``engine_options`` go to :class:`mprec.serving.Engine`.

    ``CheckpointError`` for a bad file; ``ValueError`` if the checkpoints do not take the same inputs or an
    option is out of its bounds; ``OSError`` if ``profile`` cannot be written.
    """
    paths = paths_from_checkpoints(files, metric=metric)
    if not isinstance(profile, Profile):
        if make_input is None:
            inputs = model_inputs(files[:1])
            make_input = zipf_batches(inputs.vocabularies, inputs.num_dense)
        profile = Profile.load_or_measure(paths, make_input, file=profile, seconds=profile_seconds)
    return Engine(Dispatcher(paths, profile), sla_s=sla_s, **engine_options)
