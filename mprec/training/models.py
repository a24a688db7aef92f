"""Models for a dataset's features, and their training from its split to what a checkpoint remembers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from mprec.data import ClickDataset
from mprec.models import DLRM, PATHS, MultiPathDLRM
from mprec.nn import DheConfig, FeatureConfig, with_representation
from mprec.representations import REPRESENTATIONS, SELECT
from mprec.training.loop import Keep, threads, train
from mprec.training.options import Progress, TrainOptions, TrainResult
from mprec.training.quality import evaluate, evaluate_paths, mean_over_paths

__all__ = [
    "MIXED",
    "MODELS",
    "MULTI_PATH",
    "Trained",
    "build_model",
    "chosen_features",
    "train_representations",
]

#: What a model's features can all be: a representation, or a choice of one for each.
MODELS = (*REPRESENTATIONS, SELECT)
PARTS = ("train", "valid", "test")
HELD_OUT = PARTS[1:]
MULTI_PATH = "multi-path"  # all four in one model
MIXED = "mixed"  # each feature its own, as it is told


def build_model(
    dataset: ClickDataset,
    representation: str,
    *,
    dim: int = 16,
    dhe: DheConfig | None = None,
    select_largest: int = 2,
    chosen: Mapping[str, Any] | None = None,
    bottom: Sequence[int] = (64, 32),
    top: Sequence[int] = (64, 32),
    seed: int = 0,
) -> DLRM:
    """A DLRM for the dataset's features, all in one representation, or (``select``) the
    ``select_largest`` largest features as DHE and the others as tables; for ``multi-path``, a
    :class:`mprec.models.MultiPathDLRM`; for ``mixed``, as ``chosen`` says (:func:`chosen_features`). The same
    seed gives the same weights; the global random state is left alone.
    """
    if representation not in (*MODELS, MULTI_PATH, MIXED):
        choices = ", ".join((*MODELS, MULTI_PATH, MIXED))
        raise ValueError(f"representation: expected one of {choices}, got {representation!r}")
    if (representation == MIXED) != (chosen is not None):
        raise ValueError(f"chosen goes with representation {MIXED!r}, got {representation!r} and {chosen}")
    dhe = DheConfig() if dhe is None else dhe
    features = [FeatureConfig(name, size, dim, dhe=dhe) for name, size in dataset.features]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if representation == MULTI_PATH:
            _check_rows(with_representation(features, "hybrid"))
            return MultiPathDLRM(features, dataset.num_dense, dim, bottom, top, select_largest)
        if chosen is not None:
            features = chosen_features(dataset, chosen, dim, dhe)
        else:
            features = with_representation(features, representation, select_largest=select_largest)
        _check_rows(features)
        model = DLRM(features, dataset.num_dense, dim, bottom, top)
    for f in features:
        for part in f.parts:
            part.prepare(model.embeddings._members(part)[f.name], dataset.column(f.name).ids)
    return model


def _check_rows(features: Sequence[FeatureConfig]) -> None:
    """``ValueError`` for rows for all the values that there could be."""
    for f in features:
        if f.has_rows and f.num_embeddings > 1 << 31:
            raise ValueError(
                f"feature {f.name!r}: its raw values are its IDs, too many for rows ({f.representation}): "
                "choose dhe, or a vocabulary"
            )


def chosen_features(
    dataset: ClickDataset, chosen: Mapping[str, Any], dim: int, dhe: DheConfig | None = None
) -> list[FeatureConfig]:
    """The dataset's features as ``chosen`` says: by a feature's name, or ``*`` for those not named, the name
    of a representation or a dict of fields of :class:`FeatureConfig` (as its ``to_dict`` gives; the
    vocabulary and the dimension, where given, must be the data's and ``dim``).

    ``ValueError`` names the feature that is missing, unknown or other than in the data.
    """
    known = dict(dataset.features)
    if unknown := [name for name in chosen if name not in known and name != "*"]:
        raise ValueError(
            f"feature {unknown[0]!r}: {dataset.name} has none of that name, it has {list(known)}"
        )
    features = []
    for name, size in known.items():
        told = chosen.get(name, chosen.get("*"))
        if told is None:
            raise ValueError(f"feature {name!r}: no representation is given, neither for it nor for '*'")
        told = {"representation": told} if isinstance(told, str) else dict(told)
        fields = {"name": name, "num_embeddings": size, "embedding_dim": dim}
        for field, value in fields.items():
            if told.get(field, value) != value:
                raise ValueError(f"feature {name!r}: {field}: expected {value}, got {told[field]!r}")
        parts = getattr(REPRESENTATIONS.get(told.get("representation", "table")), "parts", ())
        if told.get("dhe") is None and dhe is not None and any(part.hashes for part in parts):
            told["dhe"] = dhe.to_dict()
        try:
            features.append(FeatureConfig.from_dict({**told, **fields}))
        except (TypeError, KeyError) as error:
            raise ValueError(f"feature {name!r}: {error}") from error
    return features


@dataclass(frozen=True)
class Trained:
    """A trained model with what its checkpoint should remember."""

    model: DLRM
    result: TrainResult
    metadata: dict[str, Any]


def train_representations(
    dataset: ClickDataset,
    representations: Iterable[str] = MODELS,
    options: TrainOptions | None = None,
    *,
    split: str | None = None,
    progress: Callable[[str, Progress], None] | None = None,
    keep: Keep | None = None,
    best: Callable[[Trained], object] | None = None,
    **model_arguments: Any,
) -> dict[str, Trained]:
    """Train one model per representation on the same split; ``model_arguments`` go to :func:`build_model`.

    Each one's ``metadata`` has the dataset's description, the split, the quality on the validation and
    test parts, the options, and the model's size; a ``multi-path`` model's also the quality along each
    path, under ``paths``. ``best`` is told of each epoch that is better than those before, with the quality
    on the validation part alone. ``keep`` is for one representation only.
    """
    options = TrainOptions() if options is None else options
    keep = Keep() if keep is None else keep
    representations = list(representations)
    if keep.snapshot is not None and len(representations) != 1:
        raise ValueError(f"keep: a snapshot is of one training, got {representations}")
    parts = dict(zip(PARTS, dataset.split(by=split), strict=True))
    shared = {
        "dataset": dataset.describe(),
        "split": split or dataset.default_split,
        "rows": {name: len(part) for name, part in parts.items()},
        "seed": options.seed,
        "options": asdict(options),
    }
    trained = {}
    for name in representations:
        model = build_model(parts["train"], name, seed=options.seed, **model_arguments)
        report = partial(progress, name) if progress else None

        def told(plain: DLRM, result: TrainResult, name: str = name) -> None:
            best(Trained(plain, result, _metadata(name, plain, result, parts, ("valid",)) | shared))

        result = train(
            model,
            parts["train"],
            parts["valid"],
            options,
            report,
            mean_over_paths if name == MULTI_PATH else evaluate,
            fresh=True,
            keep=keep if best is None else replace(keep, best=told),
        )
        with threads(options.threads):
            metadata = _metadata(name, model, result, parts, HELD_OUT) | shared
        trained[name] = Trained(model, result, metadata)
    return trained


def _metadata(
    name: str, model: DLRM, result: TrainResult, parts: Mapping[str, ClickDataset], measured: Sequence[str]
) -> dict[str, Any]:
    """What is known of a trained model, its quality on the parts named."""
    metadata = {
        "representation": name,
        "metrics": {part: evaluate(model, parts[part]).to_dict() for part in measured},
        "epoch": result.best_epoch,
        "seconds": result.seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "embedding_parameters": sum(p.numel() for p in model.embeddings.parameters()),
    }
    if name == MULTI_PATH:
        found = {part: evaluate_paths(model, parts[part]) for part in measured}
        metadata["paths"] = {path: {part: found[part][path].to_dict() for part in measured} for path in PATHS}
    return metadata
