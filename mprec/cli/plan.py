"""``mprec plan``: a representation per feature within a memory budget, and which paths of a bundle fit."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from mprec import checkpoint
from mprec.cli._held import Bundle, held_paths
from mprec.cli._setup import load_for, say, size_in_bytes
from mprec.nn import DheConfig, FeatureConfig, with_representation
from mprec.paths import bundle
from mprec.paths.forms import form_of
from mprec.planner import (
    Device,
    Infeasible,
    MeasuredCosts,
    Measurement,
    Plan,
    RooflineCosts,
    default_options,
    fit_effects,
    plan,
    plan_paths,
    shapes_by_vocabulary,
)
from mprec.planner.tables import FEATURE_SETS, feature_set
from mprec.report.terminal import format_bytes, terminal


def qualities(text: str) -> list[Measurement]:
    """``table=0.785,dhe=0.789,table[int8]=0.784`` -> measurements of whole models."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return [Measurement(label.strip(), float(value)) for label, value in pairs]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected label=quality,..., got {text!r}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory",
        type=size_in_bytes,
        metavar="SIZE",
        help="budget for embeddings on this machine, e.g. 64MiB",
    )
    parser.add_argument(
        "--device",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a simulated device (JSON: name, memory_bytes, flops_per_s, bytes_per_s); may be repeated",
    )
    parser.add_argument(
        "--spread", action="store_true", help="one model over all devices (default: paths for each device)"
    )
    what = parser.add_argument_group("features and their quality")
    what.add_argument("--checkpoints", nargs="+", default=[], type=Path, metavar="FILE", help="or bundles")
    what.add_argument("--features", choices=tuple(FEATURE_SETS), help="the public Criteo logs' sizes")
    what.add_argument("--data", metavar="SPEC", help="weigh features by their IDs' frequencies in this data")
    what.add_argument(
        "--quality",
        type=qualities,
        default=[],
        metavar="LABEL=Q,...",
        help="measured qualities of whole models, e.g. table=0.785,table[int8]=0.784,dhe=0.789;"
        " dhe:sized and hybrid:sized have shapes by vocabulary (see --dhe-k)",
    )
    what.add_argument("--metric", choices=("auc", "accuracy"), default="auc", help="of checkpoints (auc)")
    what.add_argument("--dim", type=int, default=16, help="with --data alone: embedding dimension (16)")
    what.add_argument("--dhe-k", type=int, help="shape of decoders (default: the checkpoints', or 1024)")
    what.add_argument("--dhe-hidden", metavar="N,...", help="their hidden layers (the checkpoints', or 128)")
    parser.add_argument("--batch-size", type=int, default=128, help="of predicted latencies (128)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the plans as JSON")
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="FOLDER",
        help="write the paths of the bundle that fit into --memory side by side as a bundle of their own",
    )


def run(args: argparse.Namespace) -> int:
    if args.memory is None and not args.device:
        raise ValueError("--memory or --device is needed")
    bundles = {file: bundle.load(file) for file in args.checkpoints if bundle.is_bundle(file)}
    held = held_paths(args, bundles)
    try:
        result, plans, residual = _by_feature(args, bundles)
    except (Infeasible, _NoFormsError) as error:
        if held is None:
            raise
        say(f"no representation for each feature: {error}")
        result, plans, residual = {"metric": args.metric, "plans": {}}, {}, 0.0
    if held is not None:
        result["paths"] = held.to_dict()
    if args.output:
        args.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    if args.json:
        print(json.dumps(result))
        return 0
    console = terminal()
    if held is not None:
        console.print(held.summary(), held.table(), sep="\n")
    for name, paths in plans.items():
        for p in paths:
            console.print(plan_table(p, name))
        if len(paths) > 1:
            total = sum(p.nbytes for p in paths)
            console.print(f"{name}: {len(paths)} paths side by side, {format_bytes(total)} in all\n")
    if residual > 1e-6:
        say(f"the measured qualities contradict an additive model by up to {residual:.2g}")
    return 0


class _NoFormsError(ValueError):
    """No path of a bundle is of tables or decoders."""


def _by_feature(args, bundles):
    """(JSON, plans by device, residual) of a representation for each feature."""
    features, dhe, shape, measurements, counts = _inputs(args, bundles)
    effects = fit_effects(features, measurements, counts)
    options = default_options(features, {"": shape, "sized": shapes_by_vocabulary(dhe, features)}, effects)
    devices = [] if args.memory is None else [Device("here", args.memory, MeasuredCosts(args.batch_size))]
    for file in args.device:
        name, nbytes, costs = RooflineCosts.load(file, args.batch_size)
        devices.append(Device(name, nbytes, costs))
    if args.spread:
        plans = {
            "+".join(d.name for d in devices): [plan(features, options, devices, base_quality=effects.base)]
        }
    else:
        plans = {d.name: plan_paths(features, options, d, base_quality=effects.base) for d in devices}
    result = {
        "metric": args.metric,
        "simulated": any(d.costs.simulated for d in devices),
        "devices": {
            d.name: {"memory_bytes": d.memory_bytes, "simulated": d.costs.simulated} for d in devices
        },
        "measurements": [{"options": m.options, "quality": m.quality} for m in measurements],
        "quality_residual": effects.residual,
        "plans": {name: [p.to_dict() for p in paths] for name, paths in plans.items()},
    }
    return result, plans, effects.residual


def _inputs(args, bundles):
    """(features, largest DHE shape, that of each feature, measurements, counts of IDs)."""
    features: list[FeatureConfig] | None = None
    measurements = list(args.quality)
    dhe = DheConfig()
    shapes: dict[str, DheConfig] = {}
    for file in args.checkpoints:
        found = _measured(file, args.metric, bundles.get(file))
        for own, measurement in found:
            bare = with_representation(own, "table")
            if features is not None and bare != features:
                raise ValueError(f"{file} has other features than {args.checkpoints[0]}")
            features = bare
            shapes |= {f.name: f.dhe for f in own if f.has_dhe}
            measurements.append(measurement)
    dhe = next(iter(shapes.values()), dhe)
    dataset = load_for(args.checkpoints, args.data) if args.data else None
    if args.features:
        if features is not None:
            raise ValueError("--features and --checkpoints both name the features: give one of them")
        features = feature_set(args.features)
    elif features is None:
        if dataset is None:
            raise ValueError("--features, --checkpoints or --data is needed to know the features")
        features = [FeatureConfig(name, size, args.dim) for name, size in dataset.features]
    counts = None
    if dataset is not None:
        known = dict(dataset.features)
        counts = {f.name: dataset.counts(f.name) for f in features if known.get(f.name) == f.num_embeddings}
        if not counts:
            raise ValueError("--data: none of its features is one of the plan's")
    if not measurements:
        raise ValueError("--quality or --checkpoints is needed: a plan rests on measured qualities")
    if args.dhe_k is not None:
        dhe = DheConfig(k=args.dhe_k, hidden=dhe.hidden)
    if args.dhe_hidden is not None:
        dhe = DheConfig(k=dhe.k, hidden=tuple(int(n) for n in args.dhe_hidden.split(",") if n))
    if args.dhe_k is None and args.dhe_hidden is None:
        return features, dhe, lambda f: shapes.get(f.name, dhe), measurements, counts
    return features, dhe, dhe, measurements, counts


def _measured(
    file: Path, metric: str, loaded: Bundle | None
) -> list[tuple[Sequence[FeatureConfig], Measurement]]:
    """What a checkpoint or bundle tells: (features, measurement) of each path that is one form a feature."""
    if loaded is not None:
        members, _ = loaded
        found = [measurement_of(member, metric) for member in members]
        if not any(found):
            raise _NoFormsError(
                f"{file}: none of its paths is of tables or decoders, a form for each feature"
            )
        return [each for each in found if each is not None]
    model, metadata = checkpoint.load(file)
    if "paths" in metadata:
        paths = [(model.path(n).features, m["valid"][metric]) for n, m in metadata["paths"].items()]
    else:
        paths = [(model.features, metadata["metrics"]["valid"][metric])]
    return [(fs, Measurement({f.name: f.representation for f in fs}, float(q))) for fs, q in paths]


def measurement_of(member: bundle.Member, metric: str) -> tuple[Sequence[FeatureConfig], Measurement] | None:
    """(features, measurement) of a path of a bundle, ``table[int8]`` being a form of a feature; None for one
    of low rank, or with rows of two vectors: these are forms of whole models."""
    embeddings = member.model.embeddings
    if any(f.embedding_dim != member.model.embedding_dim for f in embeddings.features):
        return None
    form = form_of(embeddings)
    if form["form"] == "low_rank":
        return None
    precisions = form.get("tables", {})
    labels = {}
    for f in embeddings.features:
        precision = precisions.get(f.name, "float32")
        labels[f.name] = f.representation + (f"[{precision}]" if precision != "float32" else "")
    return embeddings.features, Measurement(labels, member.quality(metric))


def plan_table(plan: Plan, device: str) -> Table:
    """One plan for a terminal."""
    word = "SIMULATED device " if plan.simulated else ""
    table = Table(
        title=f"{word}{device}, path {plan.name}: predicted quality {plan.quality:.4f}, "
        f"{format_bytes(plan.nbytes)}, {plan.flops:,} FLOPs a sample, "
        f"{1e3 * plan.seconds:.3f} ms for the embeddings of {plan.batch_size} samples",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    several = len({p.device for p in plan.placements}) > 1
    table.add_column("feature", overflow="fold")
    for heading in ("vocabulary", "choice", "size", "FLOPs", "effect", "µs"):
        table.add_column(heading, justify="right", overflow="fold")
    if several:
        table.add_column("device")
    for p in plan.placements:
        table.add_row(
            p.feature,
            f"{p.vocabulary:,}",
            p.option.label,
            format_bytes(p.option.nbytes),
            f"{p.option.flops:,}",
            f"{p.option.quality:+.5f}",
            f"{1e6 * p.seconds:.1f}",
            *([p.device] if several else []),
        )
    return table
