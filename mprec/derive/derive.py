"""Making and measuring the paths of one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mprec.data import ClickDataset
from mprec.derive.quality import METRICS, Estimate, Influence, influence
from mprec.derive.recipes import Source, choose, make, representation_of, split
from mprec.dispatch.microbenchmark import microbenchmark
from mprec.dispatch.paths import ScoringPath
from mprec.models import DLRM, MultiPathDLRM
from mprec.nn import folded
from mprec.paths import Scorer, sampler
from mprec.paths.bundle import Member
from mprec.paths.forms import embedding_bytes, with_embeddings
from mprec.planner import Candidate, front
from mprec.training import predict

__all__ = ["BATCH_SIZES", "Derived", "derive", "kept"]

BATCH_SIZES = (1, 128, 2048)
PARTS = ("valid", "test")


@dataclass(frozen=True)
class Derived:
    """One path, measured.

    ``quality[part][metric]`` and its ``difference`` to the model it was derived from, each with its standard
    error, parts ``valid`` and ``test``; ``nbytes`` of embeddings; ``seconds`` by batch size, medians on this
    machine; ``dominated_by``: the name of a path that matches it in everything, or None.
    """

    name: str
    representation: str
    model: DLRM
    dense: str  # precision of dense layers
    quality: Mapping[str, Mapping[str, Estimate]]
    difference: Mapping[str, Mapping[str, Estimate]]
    nbytes: int
    seconds: Mapping[int, float]
    dominated_by: str | None

    def facts(self) -> dict[str, Any]:
        """What was measured, as plain data (JSON types)."""

        def plain(estimates):
            return {part: {m: e.to_dict() for m, e in found.items()} for part, found in estimates.items()}

        return {
            "quality": plain(self.quality),
            "difference": plain(self.difference),
            "embedding_bytes": self.nbytes,
            "latency_ms": {str(batch): 1e3 * time for batch, time in self.seconds.items()},
            "dominated_by": self.dominated_by,
        }

    def member(self) -> Member:
        """As it goes into a bundle."""
        metrics = {part: {m: e.value for m, e in found.items()} for part, found in self.quality.items()}
        return Member(self.name, self.representation, self.model, metrics, self.facts(), self.dense)


def kept(found: Sequence[Derived]) -> list[Member]:
    """Those that no other one matches in everything, for a bundle."""
    return [each.member() for each in found if each.dominated_by is None]


def derive(
    model: DLRM,
    metadata: Mapping[str, Any],
    parts: Sequence[ClickDataset],
    *,
    recipes: Sequence[str] | None = None,
    metric: str = "auc",
    seconds: float = 10.0,
    seed: int = 0,
    say: Callable[[str], object] = lambda message: None,
    progress: Callable[[str, float], object] | None = None,
) -> list[Derived]:
    """The model and what its recipes make of it, measured; of a multi-path model every path, and what is made
    of the best one.

    Args:
        model: as loaded from a checkpoint, with its ``metadata``, which names its representation.
        parts: (train, valid, test). Forms are fitted on the first, whose labels are not looked at; qualities
            are of the others, and those of ``valid`` decide which path another one matches.
        recipes: see :mod:`mprec.derive.recipes`; default: those that suit the model. Of the default ones, one
            that cannot be made is left out, and ``say`` is told why.
        metric: ``auc``, ``log_loss`` or ``accuracy``, by which paths are compared.
        seconds: for measuring latencies.

    Raises:
        ValueError: a recipe that is none or cannot be made, an unknown metric, parts without both labels.
        TypeError: a model whose embeddings are in a form already.
    """
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    train, valid, test = parts
    held_out = dict(zip(PARTS, (valid, test), strict=True))
    models = _originals(folded(model).eval(), metadata)
    dense = dict.fromkeys(models, "float32")
    measured = {name: _measure(each, held_out) for name, each in models.items()}
    best = max(models, key=lambda name: METRICS[metric] * measured[name]["valid"][metric].value)
    source = Source(models[best], train)
    representations = {name: name for name in models}
    for recipe in choose(recipes, source, list(models)):
        if recipe in models:  # a model of that kind is there
            continue
        base, precision = split(recipe)
        report = progress and (lambda share, name=recipe: progress(f"making {name}", share))
        try:
            made = models.get(base)
            if made is None:
                made = with_embeddings(source.model, make(source, base, seed=seed, progress=report))
            found = _measure(made, held_out, precision)
        except ValueError as error:
            if recipes is not None:
                raise ValueError(f"recipe {recipe!r}: {error}") from error
            say(f"no {recipe}: {error}")
            continue
        models[recipe], dense[recipe], measured[recipe] = made, precision, found
        representations[recipe] = representations.get(base) or representation_of(base)
    latency = _latency(models, representations, dense, test, seconds, seed, progress)
    sizes = {name: embedding_bytes(each.embeddings) for name, each in models.items()}
    sign = METRICS[metric]
    candidates = [
        Candidate(name, sign * measured[name]["valid"][metric].value, sizes[name], latency[name])
        for name in models
    ]
    verdict = front(candidates)
    return [
        Derived(
            name,
            representations[name],
            each,
            dense[name],
            {part: {m: i.estimate for m, i in found.items()} for part, found in measured[name].items()},
            {
                part: {m: i.minus(measured[best][part][m]) for m, i in found.items()}
                for part, found in measured[name].items()
            },
            sizes[name],
            latency[name],
            verdict[name],
        )
        for name, each in models.items()
    ]


def _originals(model: DLRM, metadata: Mapping[str, Any]) -> dict[str, DLRM]:
    """The paths that were trained, by name."""
    if isinstance(model, MultiPathDLRM):
        return {name: model.path(name).eval() for name in metadata.get("paths", ("hybrid",))}
    return {str(metadata.get("representation", "model")): model}


def _measure(
    model: DLRM, parts: Mapping[str, ClickDataset], dense: str = "float32"
) -> dict[str, Mapping[str, Influence]]:
    """``ValueError`` if the model has no compiled path with dense layers of that precision."""
    if dense == "float32":
        return {part: influence(each.labels, predict(model, each)) for part, each in parts.items()}
    scorer = Scorer(model, dense)
    if scorer.compiled is None:
        raise ValueError(f"dense layers in {dense} are for compiled paths: {scorer.reason}")
    scores = {part: torch.cat([scorer(b) for b in each.batches(4096)]) for part, each in parts.items()}
    return {part: influence(each.labels, scores[part].numpy()) for part, each in parts.items()}


def _latency(models, representations, dense, dataset, seconds, seed, progress) -> dict[str, dict[int, float]]:
    """Median seconds of each path by batch size, in interleaved rounds on random rows of the dataset."""
    paths = [
        ScoringPath(name, representations[name], 0.0, Scorer(model, dense[name]))
        for name, model in models.items()
    ]
    report = progress and (lambda share: progress("measuring latencies", share))
    samples = microbenchmark(
        paths, sampler(dataset), BATCH_SIZES, seconds=seconds, seed=seed, progress=report
    )
    return {name: {batch: float(np.median(samples[name, batch])) for batch in BATCH_SIZES} for name in models}
