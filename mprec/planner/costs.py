"""Seconds that one feature's embedding takes on a device.

Times of a model's features add up: the kernels serve many features in one call, so the per-call cost is
shared, and the rest is per feature.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mprec.dispatch import ScoringPath, microbenchmark
from mprec.nn import EmbeddingBagCollection, FeatureConfig, QuantizedEmbeddingBagCollection
from mprec.planner.options import Option

__all__ = ["MeasuredCosts", "RooflineCosts"]

_FEATURES = 8  # alike, in one measured call
_MAX_TABLE_BYTES = 64 << 20  # of each; larger tables are as far out of cache already


class MeasuredCosts:
    """Times measured on this machine with mprec's own kernels, for batches of ``batch_size`` samples with
    one ID per feature. Measured on demand and kept: tables by size (interpolated between powers of 16
    rows) and precision, decoders by shape; a hybrid is a table and a DHE.
    """

    simulated = False

    def __init__(self, batch_size: int = 128, seconds: float = 0.1) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.batch_size, self.seconds = batch_size, seconds
        self._known: dict[tuple[FeatureConfig, str], float] = {}

    def feature_seconds(self, option: Option) -> float:
        """Median seconds per batch for one feature, as one of several in a call."""
        total = 0.0
        for part in option.config.parts:
            config = dataclasses.replace(
                option.config,
                name="f",
                representation=part.name,
                dhe=option.config.dhe if part.hashes else None,
                parameters=option.config.parameters if part.parameters else (),
                mode="sum",
            )
            if part.has_rows:
                total += self._by_rows(config, option.precision)
            else:
                total += self._measure(dataclasses.replace(config, num_embeddings=1 << 30))
        return total

    def _by_rows(self, config: FeatureConfig, precision: str) -> float:
        rows = min(config.num_embeddings, _MAX_TABLE_BYTES // (4 * config.embedding_dim))
        step = math.log(rows, 16)
        low, high = 16 ** math.floor(step), 16 ** math.ceil(step)
        times = [
            self._measure(dataclasses.replace(config, num_embeddings=size), precision) for size in (low, high)
        ]
        share = 0.0 if low == high else (math.log(rows, 16) - math.floor(step))
        return times[0] ** (1 - share) * times[1] ** share

    def _measure(self, config: FeatureConfig, precision: str = "float32") -> float:
        if (config, precision) not in self._known:
            alike = [dataclasses.replace(config, name=f"f{i}") for i in range(_FEATURES)]
            with torch.no_grad():
                model = EmbeddingBagCollection(alike)
            if precision != "float32":
                model = QuantizedEmbeddingBagCollection(model, tables=precision)

            def run(item):
                with torch.inference_mode():
                    return model(*item)

            path = ScoringPath("feature", config.representation, 0.0, run)
            samples = microbenchmark(
                [path], lambda size, rng: _ids(config, size, rng), [self.batch_size], seconds=self.seconds
            )
            median = float(np.median(samples["feature", self.batch_size]))
            self._known[config, precision] = median / _FEATURES
        return self._known[config, precision]


def _ids(config: FeatureConfig, batch_size: int, rng: np.random.Generator):
    ids = rng.integers(config.num_embeddings, size=_FEATURES * batch_size)
    return torch.from_numpy(ids), torch.arange(len(ids) + 1)


@dataclass(frozen=True)
class RooflineCosts:
    """A simulated device, described by its peaks: a feature takes the longer of computing and of moving its
    rows and weights, plus its share of the fixed cost. Not a measurement.
    """

    flops_per_s: float
    bytes_per_s: float
    feature_overhead_s: float = 0.0
    batch_size: int = 128
    simulated: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        for name in ("flops_per_s", "bytes_per_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.feature_overhead_s < 0 or self.batch_size < 1:
            raise ValueError(
                "feature_overhead_s, batch_size: expected at least 0 and 1, "
                f"got {self.feature_overhead_s}, {self.batch_size}"
            )

    def feature_seconds(self, option: Option) -> float:
        config = option.config
        ids = sum(part.id_bytes(config, option.precision) for part in config.parts)
        weights = sum(part.shared_bytes(config) for part in config.parts)
        compute = self.batch_size * option.flops / self.flops_per_s
        return self.feature_overhead_s + max(compute, (self.batch_size * ids + weights) / self.bytes_per_s)

    @classmethod
    def load(cls, file: str | os.PathLike, batch_size: int = 128) -> tuple[str, int, RooflineCosts]:
        """(name, memory in bytes, costs) from a JSON file with ``name``, ``memory_bytes``, ``flops_per_s``,
        ``bytes_per_s`` and optionally ``feature_overhead_s``.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            name, memory = str(content.pop("name")), int(content.pop("memory_bytes"))
            return name, memory, cls(**content, batch_size=batch_size)
        except OSError as error:
            raise ValueError(f"cannot read device {file}: {error.strerror or error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{file}: not a device description: {error}") from error
