"""``mprec demo``: the whole path once, on real data where it is installed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch
from rich.console import Console

from mprec import checkpoint, data, report
from mprec.arrivals import Steps
from mprec.cli import info
from mprec.cli._progress import training_progress
from mprec.cli._setup import reporter, say
from mprec.data import ClickDataset
from mprec.dispatch import BATCH_SIZES, Profile
from mprec.errors import DatasetNotInstalledError
from mprec.models import DLRM
from mprec.nn import DheConfig, with_representation
from mprec.paths import paths_from_checkpoints, sampler
from mprec.planner import Device, MeasuredCosts, Measurement, default_options, fit_effects, plan
from mprec.serving.loads import generate_from
from mprec.serving.loadsweep import best_capacity, warnings_of
from mprec.serving.loadtest import compare, contestants, ratio_to_best
from mprec.serving.profile_check import profile_drift, profile_warnings
from mprec.training import Trained, TrainOptions, train_representations

_SHOWN_BATCHES = (1, 128, 2048)
_LOADS = (0.3, 0.8, 1.5)  # of the best static path's capacity: in turn, in every round
_ROUNDS = 4


@dataclasses.dataclass(frozen=True)
class _Setting:
    """How long the demo's parts take."""

    rows: int | None  # of the log, from its start; None: all
    epochs: int
    dhe: DheConfig
    profile_s: float
    step_s: float  # for which each of the loads lasts, once in every round


_NORMAL = _Setting(None, 6, DheConfig(k=256, hidden=(64,)), 25.0, 0.5)
_SMALLEST = _Setting(4000, 1, DheConfig(k=32, hidden=(16,)), 3.0, 0.05)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", type=Path, default=Path("out"), help="folder for all that is written (out)"
    )
    parser.add_argument("--data", metavar="SPEC", help="as for mprec train (movielens, or else synthetic)")
    parser.add_argument("--sla-ms", type=float, default=5.0, help="latency target of every query (5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smallest", action="store_true", help="a few rows of data: to see that it works")


def run(args: argparse.Namespace) -> int:
    if not args.sla_ms > 0:
        raise ValueError(f"--sla-ms: expected a positive number, got {args.sla_ms}")
    setting = _SMALLEST if args.smallest else _NORMAL
    dataset = _load(args.data)
    if setting.rows is not None and len(dataset) > setting.rows:
        dataset = dataset.take(slice(0, setting.rows))
    args.output.mkdir(parents=True, exist_ok=True)

    # The load generator and the engine's own work want a core: kernels get the others.
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))
    say(f"1/4 training on {dataset.name} ({len(dataset)} rows, {len(dataset.features)} features)")
    options = TrainOptions(epochs=setting.epochs, seed=args.seed)
    with training_progress() as progress:
        trained = train_representations(dataset, options=options, dhe=setting.dhe, progress=progress)
    files = {name: args.output / f"{name}.pt" for name in trained}
    for name, file in files.items():
        checkpoint.save(file, trained[name].model, trained[name].metadata)

    say("2/4 profiling every path on this machine")
    test = dataset.split()[2]
    paths = paths_from_checkpoints(list(files.values()), metric="accuracy")
    profile = Profile.measure(
        paths, sampler(test), BATCH_SIZES, seconds=setting.profile_s, seed=args.seed, progress=reporter()
    )
    profile.save(args.output / "profile.json")

    say("3/4 planning for less memory than the tables take")
    planned = _plan(trained, dataset)

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
    ratio, error, best = ratio_to_best(outcomes)

    result = {
        "environment": info.collect(),
        "data": _describe(dataset, trained),
        "representations": [_row(name, trained[name], profile) for name in trained],
        "load": {
            "sla_ms": args.sla_ms,
            "qps": len(load) / seconds,
            "queries": len(load),
            "capacity_qps": capacity,
            "arrivals": f"Poisson arrivals at {', '.join(f'{each:g}' for each in _LOADS)} times the "
            f"{capacity:.0f} queries/s that {fastest} can do, for {setting.step_s:g} s each in turn",
            "best_static": best,
            "ratio": None if math.isnan(ratio) else ratio,
            "ratio_error": None if math.isnan(error) else error,
            "warnings": profile_warnings(drift) + warnings_of(outcomes),
            "rows": [outcome.row(name) for name, outcome in outcomes.items()],
        },
        "plan": planned,
    }
    (args.output / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    page = report.write(result, args.output / "report.html")
    if args.json:
        print(json.dumps(result))
        return 0
    Console(width=None if Console().is_terminal else 150).print(report.demo_table(result))
    for sentence in report.verdicts(result):
        print(sentence)
    for sentence in result["load"]["warnings"]:
        say(f"warning: {sentence}")
    print(f"Page: {page}")
    return 0


def _load(spec: str | None) -> ClickDataset:
    if spec is not None:
        return data.load(spec)
    try:
        return data.load("movielens")
    except DatasetNotInstalledError as error:
        say(f"MovieLens-100k is not here, so this demo runs on SYNTHETIC data. {error}")
        return data.load("synthetic")


def _embedding_bytes(model: DLRM) -> int:
    tensors = [*model.embeddings.parameters(), *model.embeddings.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _row(name: str, trained: Trained, profile: Profile) -> dict:
    curve = profile.curve(name)
    return {
        "representation": name,
        **trained.metadata["metrics"]["test"],
        "parameters": trained.metadata["parameters"],
        "embedding_bytes": _embedding_bytes(trained.model),
        "train_s": trained.result.seconds,
        "latency_ms": {str(batch): 1e3 * curve.at(batch) for batch in _SHOWN_BATCHES},
        "curve_ms": {str(batch): 1e3 * curve.at(batch) for batch in curve.batch_sizes},
        "history": [epoch["auc"] for epoch in trained.result.history],
    }


def _describe(dataset: ClickDataset, trained: dict[str, Trained]) -> dict:
    rows = next(iter(trained.values())).metadata["rows"]
    return {"name": dataset.name, "rows": len(dataset), "features": list(dataset.features), "split": rows}


def _plan(trained: dict[str, Trained], dataset: ClickDataset) -> dict:
    """The best placement, by the measured qualities, in a budget halfway between the least that the
    features can do with and what their tables take."""
    features = with_representation(trained["table"].model.features, "table")
    measurements = [
        Measurement(
            {feature.name: feature.representation for feature in each.model.features},
            each.metadata["metrics"]["valid"]["auc"],
        )
        for each in trained.values()
    ]
    dhe = next(f.dhe for f in trained["dhe"].model.features if f.has_dhe)
    counts = {feature.name: dataset.counts(feature.name) for feature in features}
    effects = fit_effects(features, measurements, counts)
    options = default_options(features, dhe, effects)
    least = sum(min(option.nbytes for option in each) for each in options)
    budget = (least + max(least, _embedding_bytes(trained["table"].model))) // 2
    best = plan(
        features,
        options,
        [Device("here", budget, MeasuredCosts(batch_size=128))],
        base_quality=effects.base,
    )
    return {"memory_bytes": budget, **best.to_dict()}
