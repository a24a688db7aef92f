"""What a feature can be, with its size and work."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mprec.nn import DheConfig, FeatureConfig
from mprec.planner.quality import Effects

__all__ = ["PRECISIONS", "Option", "default_options", "flops", "nbytes"]

# Bytes of a row of d numbers. The quantised layouts are FBGEMM's fused rows: values, then scale and bias
# (two float32 for int8, two float16 for int4).
PRECISIONS = {
    "float32": lambda d: 4 * d,
    "float16": lambda d: 2 * d,
    "int8": lambda d: d + 8,
    "int4": lambda d: -(-d // 2) + 4,
}


@dataclass(frozen=True)
class Option:
    """One possible form of a feature. ``quality`` is its effect on the model's, see ``fit_effects``."""

    label: str
    config: FeatureConfig
    quality: float = 0.0
    precision: str = "float32"  # of the table's rows, where there is a table

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    @property
    def nbytes(self) -> int:
        return nbytes(self.config, self.precision)

    @property
    def flops(self) -> int:
        return flops(self.config)


def nbytes(config: FeatureConfig, precision: str = "float32") -> int:
    """Parameters and hash coefficients of a feature, in bytes."""
    total = 0
    if config.has_table:
        total += config.num_embeddings * PRECISIONS[precision](config.embedding_dim)
    if config.has_dhe:
        rows = 2 if config.dhe.family.startswith("artifact") else 4
        total += 4 * config.dhe.num_parameters(config.embedding_dim) + 4 * rows * config.dhe.k
    return total


def flops(config: FeatureConfig) -> int:
    """Floating-point operations per ID: two per weight of the decoder, one per number that is pooled."""
    total = config.output_dim
    if config.has_dhe:
        total += sum(2 * a * b for a, b in itertools.pairwise(config.dhe.widths(config.embedding_dim)))
    return total


def default_options(
    features: Sequence[FeatureConfig],
    dhe: DheConfig | Mapping[str, DheConfig],
    effects: Effects,
    labels: Sequence[str] = ("table", "dhe", "hybrid"),
) -> list[list[Option]]:
    """Per feature, its form under each of the ``labels`` that a measured quality is known for.

    A label is a representation, with the name of a shape behind a colon where ``dhe`` names several
    (``dhe:small``), and the rows' precision in brackets where it is not float32 (``table[int8]``).
    """
    out = []
    for feature in features:
        options = []
        for label in labels:
            try:
                quality = effects.effect(feature.name, label)
            except KeyError:
                continue
            kind, _, precision = label.rstrip("]").partition("[")
            representation, _, shape = kind.partition(":")
            shapes = {"": dhe} if isinstance(dhe, DheConfig) else dhe
            if representation != "table" and shape not in shapes:
                raise ValueError(f"option {label!r}: no DHE shape is called {shape!r}")
            config = dataclasses.replace(
                feature,
                representation=representation,
                dhe=None if representation == "table" else shapes[shape],
            )
            options.append(Option(label, config, quality, precision or "float32"))
        out.append(options)
    return out
