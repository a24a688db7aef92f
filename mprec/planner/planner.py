"""Plans: what goes where, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mprec.nn import FeatureConfig
from mprec.planner.options import Option
from mprec.planner.solver import Infeasible, solve

__all__ = ["Device", "Placement", "Plan", "plan", "plan_paths"]


class Costs(Protocol):
    simulated: bool
    batch_size: int

    def feature_seconds(self, option: Option) -> float: ...


@dataclass(frozen=True)
class Device:
    """Memory for embeddings in bytes, and what features cost there."""

    name: str
    memory_bytes: int
    costs: Costs

    def __post_init__(self) -> None:
        if self.memory_bytes < 0:
            raise ValueError(
                f"memory_bytes: expected at least 0 for device {self.name!r}, got {self.memory_bytes}"
            )


@dataclass(frozen=True)
class Placement:
    """One feature's part of a plan; ``seconds`` per batch."""

    feature: str
    vocabulary: int
    option: Option
    device: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """A placement for every feature. ``quality`` is predicted by the additive model, ``seconds`` is the
    busiest device's time for the embeddings of a batch of ``batch_size`` samples.
    """

    name: str
    placements: tuple[Placement, ...]
    quality: float
    seconds: float
    batch_size: int
    simulated: bool

    @property
    def nbytes(self) -> int:
        return sum(p.option.nbytes for p in self.placements)

    @property
    def flops(self) -> int:
        """Per sample with one ID per feature."""
        return sum(p.option.flops for p in self.placements)

    @property
    def samples_per_s(self) -> float:
        return self.batch_size / self.seconds if self.seconds else math.inf

    def features(self) -> list[FeatureConfig]:
        """The configurations that build this plan's embeddings."""
        return [p.option.config for p in self.placements]

    def table_precisions(self) -> dict[str, str]:
        """For :class:`mprec.nn.QuantizedEmbeddingBagCollection`: the rows' precision of each table."""
        return {p.feature: p.option.precision for p in self.placements if p.option.config.has_rows}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, with every feature's configuration."""
        return {
            "name": self.name,
            "quality": self.quality,
            "seconds": self.seconds,
            "batch_size": self.batch_size,
            "bytes": self.nbytes,
            "flops": self.flops,
            "simulated": self.simulated,
            "rows": [
                {
                    "feature": p.feature,
                    "vocabulary": p.vocabulary,
                    "choice": p.option.label,
                    "precision": p.option.precision,
                    "device": p.device,
                    "bytes": p.option.nbytes,
                    "flops": p.option.flops,
                    "effect": p.option.quality,
                    "seconds": p.seconds,
                    "config": p.option.config.to_dict(),
                }
                for p in self.placements
            ],
        }


def plan(
    features: Sequence[FeatureConfig],
    options: Sequence[Sequence[Option]],
    devices: Sequence[Device],
    *,
    base_quality: float = 0.0,
    name: str = "plan",
    objective: str = "quality",
    max_seconds: float = math.inf,
) -> Plan:
    """The best placement of all features over the devices: highest quality within their memories, then the
    least time of the busiest device (``objective="seconds"``: the other way round).

    ``options[f]`` are what feature f may become; ``base_quality`` is added to their effects.
    ``Infeasible`` if nothing fits.
    """
    if len(options) != len(features):
        raise ValueError(
            f"options must list every feature's: got {len(options)} for {len(features)} features"
        )
    if not devices:
        raise ValueError("devices: expected at least one, got none")
    if none := [f.name for f, o in zip(features, options, strict=True) if not o]:
        raise ValueError(f"feature {none[0]!r} has no options")
    seconds = [[[d.costs.feature_seconds(o) for d in devices] for o in feature] for feature in options]
    try:
        chosen = solve(
            [[o.quality for o in feature] for feature in options],
            [[o.nbytes for o in feature] for feature in options],
            seconds,
            [d.memory_bytes for d in devices],
            objective=objective,
            max_seconds=max_seconds,
        )
    except Infeasible as error:
        least = sum(min(o.nbytes for o in feature) for feature in options)
        have = sum(d.memory_bytes for d in devices)
        why = str(error)
        if error.feature is not None:
            why = f"no option of feature {features[error.feature].name!r} fits any device"
        raise Infeasible(
            f"{why}: the smallest options need {least} bytes, the devices have {have}", error.feature
        ) from None
    placements = tuple(
        Placement(feature.name, feature.num_embeddings, options[f][o], devices[d].name, seconds[f][o][d])
        for f, (feature, (o, d)) in enumerate(zip(features, chosen, strict=True))
    )
    busy = [sum(p.seconds for p in placements if p.device == d.name) for d in devices]
    return Plan(
        name,
        placements,
        base_quality + sum(p.option.quality for p in placements),
        max(busy),
        devices[0].costs.batch_size,
        any(d.costs.simulated for d in devices),
    )


def plan_paths(
    features: Sequence[FeatureConfig],
    options: Sequence[Sequence[Option]],
    device: Device,
    *,
    base_quality: float = 0.0,
) -> list[Plan]:
    """The paths that one device should hold side by side, each a whole model of its own.

    ``accurate`` is the plan of highest quality that fits. If memory is left, ``fast`` is the plan of least
    time that fits beside it, and ``balanced`` beside both the one of highest quality that takes at most
    half of ``accurate``'s time: the dispatcher has something to choose from. A path that is not
    faster than a better one is left out. A memory-starved device ends with one path.
    """
    accurate = plan(features, options, [device], base_quality=base_quality, name="accurate")
    paths = [accurate]

    def beside(name: str, **more) -> Plan | None:
        left = Device(device.name, device.memory_bytes - sum(p.nbytes for p in paths), device.costs)
        try:
            return plan(features, options, [left], base_quality=base_quality, name=name, **more)
        except Infeasible:
            return None

    fast = beside("fast", objective="seconds")
    if fast is None or fast.seconds >= accurate.seconds:
        return paths
    paths.append(fast)
    balanced = beside("balanced", max_seconds=accurate.seconds / 2)
    if balanced is not None and fast.quality < balanced.quality < accurate.quality:
        paths.insert(1, balanced)
    return paths
