"""``mprec demo``: the whole path once, on real data where it is installed: train one model, derive paths from
it, plan, and serve them under a load that varies."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from mprec import checkpoint, data, freed_memory, report
from mprec.arrivals import Steps
from mprec.cli import info
from mprec.cli._progress import training_progress
from mprec.cli._setup import reporter, say
from mprec.cli.derive import derived_table
from mprec.cli.plan import measurement_of
from mprec.data import ClickDataset
from mprec.derive import Derived, derive, kept
from mprec.dispatch import BATCH_SIZES, Profile
from mprec.errors import DatasetNotInstalledError
from mprec.metrics import known
from mprec.models import DLRM
from mprec.nn import DheConfig, LowRankEmbeddingBagCollection
from mprec.paths import bundle, paths_from_checkpoints, sampler
from mprec.planner import Device, MeasuredCosts, default_options, fit_effects, plan
from mprec.report.terminal import terminal
from mprec.serving.loads import generate_from
from mprec.serving.loadsweep import best_capacity, warnings_of
from mprec.serving.loadtest import compare, contestants, ratio_to_best
from mprec.serving.profile_check import profile_drift, profile_warnings
from mprec.training import Trained, TrainOptions, train_representations

_SHOWN_BATCHES = (1, 128, 2048)
_LOADS = (0.3, 0.8, 1.5)  # of the best static path's capacity: in turn, in every round
_ROUNDS = 4  # of all contestants
_DUEL = 8  # times as many of the dispatcher and the best static path, whose difference is small


@dataclasses.dataclass(frozen=True)
class _Setting:
    """What the demo runs on, and how long its parts take."""

    data: tuple[str, ...]  # the first of these that is installed
    rows: int | None  # of the log, from its start; None: all
    epochs: int
    recipes: tuple[str, ...] | None  # None: those that suit the model
    derive_s: float
    profile_s: float
    step_s: float  # for which each of the loads lasts, once in every round


_NORMAL = _Setting(("ml-1m", "movielens", "synthetic"), None, 6, None, 6.0, 25.0, 0.5)
_SMALLEST = _Setting(
    ("movielens", "synthetic"), 4000, 3, ("table[int8]", "table[int4]", "low_rank:4[int8]"), 0.5, 3.0, 0.05
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path("out"), help="folder for all that is written (out)"
    )
    parser.add_argument(
        "--data", metavar="SPEC", help="as for mprec train (ml-1m, or else movielens, or else synthetic)"
    )
    parser.add_argument("--sla-ms", type=float, default=5.0, help="latency target of every query (5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smallest", action="store_true", help="a few rows of movielens: to see that it works"
    )


def run(args: argparse.Namespace) -> int:
    freed_memory.keep()
    if not args.sla_ms > 0:
        raise ValueError(f"--sla-ms: expected a positive number, got {args.sla_ms}")
    setting = _SMALLEST if args.smallest else _NORMAL
    dataset = _load(args.data, setting)
    if setting.rows is not None and len(dataset) > setting.rows:
        dataset = dataset.take(slice(0, setting.rows))
    args.output.mkdir(parents=True, exist_ok=True)

    # The load generator and the engine's own work want a core: kernels get the others.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    say(f"1/4 training one model on {dataset.name} ({len(dataset)} rows, {len(dataset.features)} features)")
    options = TrainOptions(epochs=setting.epochs, seed=args.seed)
    with training_progress() as progress:
        trained = train_representations(dataset, ["table"], options, progress=progress)["table"]
    checkpoint.save(args.output / "model.pt", trained.model, trained.metadata, dataset.vocabularies)

    say("2/4 deriving paths from it: fewer bits, lower rank, decoders that its rows teach")
    parts = dataset.split()
    found = derive(
        trained.model,
        trained.metadata,
        parts,
        recipes=setting.recipes,
        seconds=setting.derive_s,
        seed=args.seed,
        say=say,
        progress=reporter(),
    )
    folder = bundle.save(args.output / "bundle", kept(found), trained.metadata, dataset.vocabularies)
    test = parts[2]
    paths = paths_from_checkpoints([folder], metric="accuracy")
    planned = _plan(found, dataset)

    say("3/4 profiling the paths that are worth keeping on this machine")
    profile = Profile.measure(
        paths, sampler(test), BATCH_SIZES, seconds=setting.profile_s, seed=args.seed, progress=reporter()
    )
    profile.save(args.output / "profile.json")

    say("4/4 serving: every path alone, then the dispatcher")
    dispatchers, sla_s = contestants(paths, profile), args.sla_ms / 1e3
    # Before the load: a machine that has become busy since profiling is told.
    drift = profile_drift(paths, profile, sampler(test), seed=args.seed + 1)
    static = {path.name: dispatchers[path.name] for path in paths}
    capacity, fastest = best_capacity(static, test, seed=args.seed)
    process = Steps([load * capacity for load in _LOADS], setting.step_s)
    # Every round is one turn of all loads.
    seconds = _ROUNDS * len(_LOADS) * setting.step_s
    load = generate_from(test, process, seconds, seed=args.seed)
    outcomes = compare(
        dispatchers, load, rounds=_ROUNDS, seconds=seconds, seed=args.seed, sla_s=sla_s, progress=reporter()
    )
    *_, best = ratio_to_best(outcomes)
    duel = {name: dispatchers[name] for name in (best, "dispatcher")}
    # They take turns twice at each load, so that what disturbs one of them disturbs the other as well.
    turns = {"rounds": 2 * _ROUNDS * len(_LOADS), "repeats": _DUEL, "seconds": seconds, "seed": args.seed + 1}
    finalists = compare(duel, load, **turns, sla_s=sla_s, progress=reporter())
    ratio, error, _ = ratio_to_best(finalists)

    served = {path.name for path in paths}
    result = {
        "environment": info.collect(),
        "data": _describe(dataset, trained),
        "training": {
            "representation": trained.metadata["representation"],
            "history": [epoch["auc"] for epoch in trained.result.history],
        },
        "derived": {each.name: {"representation": each.representation, **each.facts()} for each in found},
        "representations": [_row(each, profile) for each in found if each.name in served],
        "load": {
            "sla_ms": args.sla_ms,
            "qps": len(load) / seconds,
            "queries": len(load),
            "capacity_qps": capacity,
            "arrivals": f"Poisson arrivals at {', '.join(f'{each:g}' for each in _LOADS)} times the "
            f"{capacity:.0f} queries/s that {fastest} can do, for {setting.step_s:g} s each in turn",
            "best_static": best,
            "ratio": known(ratio),
            "ratio_error": known(error),
            "ratio_rounds": _ROUNDS * _DUEL,
            "warnings": profile_warnings(drift) + warnings_of(outcomes),
            "rows": [outcome.row(name) for name, outcome in outcomes.items()],
            "finalists": [outcome.row(name) for name, outcome in finalists.items()],
        },
        "plan": planned,
    }
    (args.output / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    page = report.write(result, args.output / "report.html")
    if args.json:
        print(json.dumps(result))
        return 0
    console = terminal()
    console.print(derived_table(found, f"derived from one model, on the test part ({len(test)} rows)"))
    console.print(report.demo_table(result))
    for sentence in report.verdicts(result):
        print(sentence)
    for sentence in result["load"]["warnings"]:
        say(f"warning: {sentence}")
    print(f"Page: {page}. Bundle, as mprec serve --checkpoints takes it: {folder}")
    return 0


def _load(spec: str | None, setting: _Setting) -> ClickDataset:
    if spec is not None:
        return data.load(spec)
    for name in setting.data:
        try:
            return data.load(name)
        except DatasetNotInstalledError as error:
            say(f"{name} is not here, so this demo runs on other, perhaps SYNTHETIC data. {error}")
    raise AssertionError("synthetic data is always there")


def _row(each: Derived, profile: Profile) -> dict:
    curve = profile.curve(each.name)
    return {
        "representation": each.name,
        **{metric: estimate.value for metric, estimate in each.quality["test"].items()},
        "parameters": _numbers(each.model),
        "embedding_bytes": each.nbytes,
        "latency_ms": {str(batch): 1e3 * curve.at(batch) for batch in _SHOWN_BATCHES},
        "curve_ms": {str(batch): 1e3 * curve.at(batch) for batch in curve.batch_sizes},
    }


def _numbers(model: DLRM) -> int:
    """How many numbers a model has, in whatever precision; hash coefficients are none of them."""
    embeddings = model.embeddings
    own = sum(f.num_parameters() for f in embeddings.features)
    if isinstance(embeddings, LowRankEmbeddingBagCollection):
        own = sum(tensor.numel() for tensor in embeddings.state_dict().values())
    state = model.state_dict()
    return own + sum(t.numel() for name, t in state.items() if not name.startswith("embeddings."))


def _describe(dataset: ClickDataset, trained: Trained) -> dict:
    rows = trained.metadata["rows"]
    return {"name": dataset.name, "rows": len(dataset), "features": list(dataset.features), "split": rows}


def _plan(found: Sequence[Derived], dataset: ClickDataset) -> dict:
    """The best form of each feature, by the qualities of the derived paths, in a budget halfway between the
    least that the features can do with and what their tables take. Low rank is a form of a whole model."""
    told = [measurement_of(each.member(), "auc") for each in found]
    shapes = {f.name: f.dhe for features, _ in filter(None, told) for f in features if f.has_dhe}
    features = found[0].model.features
    counts = {feature.name: dataset.counts(feature.name) for feature in features}
    effects = fit_effects(features, [measurement for _, measurement in filter(None, told)], counts)
    options = default_options(features, lambda f: shapes.get(f.name, DheConfig()), effects)
    least = sum(min(option.nbytes for option in each) for each in options)
    budget = (least + max(least, found[0].nbytes)) // 2
    devices = [Device("here", budget, MeasuredCosts(batch_size=128))]
    best = plan(features, options, devices, base_quality=effects.base)
    return {"memory_bytes": budget, **best.to_dict()}
