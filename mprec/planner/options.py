"""What a feature can be, with its size and work."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mprec.nn import DheConfig, FeatureConfig
from mprec.planner.quality import Effects
from mprec.representations import REPRESENTATIONS
from mprec.row_formats import row_format

__all__ = ["Option", "Shape", "default_options", "flops", "nbytes", "shapes_by_vocabulary"]

#: A decoder's shape, or one for each feature.
Shape = DheConfig | Callable[[FeatureConfig], DheConfig]


@dataclass(frozen=True)
class Option:
    """One possible form of a feature. ``quality`` is its effect on the model's, see ``fit_effects``."""

    label: str
    config: FeatureConfig
    quality: float = 0.0
    precision: str = "float32"  # of the table's rows, where there is a table

    def __post_init__(self) -> None:
        row_format(self.precision)
        self.nbytes  # noqa: B018 - raises for a precision that does not fit the rows

    @property
    def nbytes(self) -> int:
        return nbytes(self.config, self.precision)

    @property
    def flops(self) -> int:
        return flops(self.config)


def nbytes(config: FeatureConfig, precision: str = "float32") -> int:
    """Parameters and hash coefficients of a feature, in bytes."""
    return sum(part.nbytes(config, precision) for part in config.parts)


def flops(config: FeatureConfig) -> int:
    """Floating-point operations per ID: two per weight of the decoder, one per number that is pooled."""
    return sum(part.flops(config) for part in config.parts)


def shapes_by_vocabulary(
    largest: DheConfig, features: Sequence[FeatureConfig]
) -> Callable[[FeatureConfig], DheConfig]:
    """Shapes by vocabulary: ``largest`` for the largest of ``features``; for others the number of hashes and
    hidden widths fall as log2 of the vocabulary does, in steps of 16. The information that tells a feature's
    IDs apart grows no faster.
    """
    most = max(f.num_embeddings for f in features)

    def shape(feature: FeatureConfig) -> DheConfig:
        share = math.log2(1 + min(feature.num_embeddings, most)) / math.log2(1 + most)
        width = lambda full: min(full, 16 * math.ceil(full * share / 16))  # noqa: E731
        return dataclasses.replace(largest, k=width(largest.k), hidden=tuple(map(width, largest.hidden)))

    return shape


def default_options(
    features: Sequence[FeatureConfig],
    dhe: Shape | Mapping[str, Shape],
    effects: Effects,
    labels: Sequence[str] | None = None,
) -> list[list[Option]]:
    """Per feature, its form under each of the ``labels`` (default: all) that a measured quality is known for.

    A label is a representation, with the name of a shape behind a colon where ``dhe`` names several
    (``dhe:small``), and the rows' precision in brackets where it is not float32 (``table[int8]``,
    ``hybrid:small[int8]``). ``ValueError`` for one that is not so made.
    """
    out = []
    for feature in features:
        options = []
        for label in effects.labels(feature.name) if labels is None else labels:
            try:
                quality = effects.effect(feature.name, label)
            except KeyError:
                continue
            representation, shape, precision = _parts(label)
            config = None
            if any(part.hashes for part in REPRESENTATIONS[representation].parts):
                shapes = dhe if isinstance(dhe, Mapping) else {"": dhe}
                if shape not in shapes:
                    raise ValueError(f"option {label!r}: no DHE shape is called {shape!r}")
                config = shapes[shape] if isinstance(shapes[shape], DheConfig) else shapes[shape](feature)
            made = dataclasses.replace(feature, representation=representation, dhe=config)
            options.append(Option(label, made, quality, precision))
        out.append(options)
    return out


def _parts(label: str) -> tuple[str, str, str]:
    """(representation, name of the shape, precision) of a label."""
    found = re.fullmatch(r"(\w+)(?::([^\[\]]+))?(?:\[(\w+)\])?", label)
    if not found or found[1] not in REPRESENTATIONS:
        raise ValueError(
            f"option {label!r}: expected {', '.join(REPRESENTATIONS)}, then :SHAPE or [PRECISION]"
        )
    representation, shape, precision = found.groups()
    parts = REPRESENTATIONS[representation].parts
    if shape and not any(part.hashes for part in parts):
        raise ValueError(f"option {label!r}: a {representation} has no DHE shape")
    if precision and not any(part.has_rows for part in parts):
        raise ValueError(f"option {label!r}: a precision is that of a table's rows")
    return representation, shape or "", precision or "float32"
