"""The shape of a model that scores clicks: what one sample computes and reads, weights aside.

A DLRM: dense numbers go through the bottom MLP, IDs through embeddings, all pairs of vectors through a dot
product, and the products and the bottom vector through the top MLP.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mprec.representations import (
    DHE,
    REPRESENTATIONS,
    SELECT,
    TABLE,
    DheConfig,
    FeatureConfig,
    with_representation,
)

__all__ = ["PAPER_DHE", "PAPER_QUALITY", "ModelShape", "kaggle", "load_shape", "shape_of", "terabyte"]

_ITEM_BYTES = {"float32": 4, "tfloat32": 4, "float16": 2, "bfloat16": 2}

#: The decoder of the paper's kind: 1024 hashes, two hidden layers of 512.
PAPER_DHE = DheConfig(k=1024, hidden=(512, 512))

#: Share of correct predictions by data set and representation: from the paper, arXiv 2302.10872, as they were
#: noted down; nothing here measured them.
PAPER_QUALITY = {
    "kaggle": {"table": 0.7879, "dhe": 0.7894, "hybrid": 0.7898},
    "terabyte": {"table": 0.8081, "dhe": 0.8099, "hybrid": 0.8103},
}

_VOCABULARIES = {
    "kaggle": "3-4-10-15-18-24-27-105-305-583-633-1460-2173-3194-5652-5683-12517-14992-93145-142572-286181-"
    "2202608-5461306-7046547-8351593-10131227",
    "terabyte": "3-4-10-14-36-61-101-122-970-1442-2208-7112-7378-11156-12420-17217-20134-36084-313829-415421-"
    "1333352-7267859-9758201-9946608-9980333-9994222",
}


@dataclass(frozen=True)
class ModelShape:
    """A DLRM as far as its cost depends on it.

    Attributes:
        name: of the data set or model.
        features: categorical features, each with its vocabulary, dimension and representation.
        num_dense: dense numbers per sample; 0: no bottom MLP.
        bottom, top: widths of the hidden layers of the two MLPs.
        pooling: mean number of IDs per bag.
        precision: of weights and products: ``float32``, ``tfloat32``, ``float16`` or ``bfloat16``.

    ``ValueError`` if features differ in dimension (the interaction multiplies them), or for an unknown
    precision or a figure that is not positive.
    """

    name: str
    features: tuple[FeatureConfig, ...]
    num_dense: int = 13
    bottom: tuple[int, ...] = (512, 256, 64)
    top: tuple[int, ...] = (512, 256)
    pooling: float = 1.0
    precision: str = "float32"

    def __post_init__(self) -> None:
        for field in ("features", "bottom", "top"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not self.features:
            raise ValueError("features: expected at least one, got none")
        if others := [f for f in self.features if not {TABLE, DHE}.issuperset(f.parts)]:
            raise ValueError(
                f"features: tables and deep hash embeddings are simulated, got {others[0].representation}"
            )
        if len(dims := sorted({feature.embedding_dim for feature in self.features})) > 1:
            raise ValueError(f"features: expected one embedding_dim, got {dims}")
        for field in ("bottom", "top"):
            if wrong := [width for width in getattr(self, field) if not isinstance(width, int) or width < 1]:
                raise ValueError(f"{field}: expected positive integers, got {wrong[0]!r}")
        if not isinstance(self.num_dense, int) or self.num_dense < 0:
            raise ValueError(f"num_dense: expected an integer of at least 0, got {self.num_dense!r}")
        if not 0 < self.pooling < float("inf"):
            raise ValueError(f"pooling: expected a finite number above 0, got {self.pooling!r}")
        if self.precision not in _ITEM_BYTES:
            raise ValueError(f"precision: expected one of {', '.join(_ITEM_BYTES)}, got {self.precision!r}")

    @property
    def dim(self) -> int:
        return self.features[0].embedding_dim

    @property
    def item_bytes(self) -> int:
        return _ITEM_BYTES[self.precision]

    @property
    def vectors(self) -> int:
        """Vectors per sample that interact: the bottom one, and one or two per feature."""
        return 1 + sum(len(feature.parts) for feature in self.features)

    @property
    def bottom_widths(self) -> tuple[int, ...]:
        return (self.num_dense, *self.bottom, self.dim) if self.num_dense else ()

    @property
    def top_widths(self) -> tuple[int, ...]:
        return (self.dim + self.vectors * (self.vectors - 1) // 2, *self.top, 1)

    def table_bytes(self) -> list[int]:
        """Bytes of each table; features without one are left out."""
        return [f.num_embeddings * self.row_bytes for f in self.features if f.has_table]

    @property
    def row_bytes(self) -> int:
        return self.dim * self.item_bytes

    def decoder_bytes(self) -> int:
        """Bytes of all decoders."""
        return self.item_bytes * sum(f.dhe.num_parameters(self.dim) for f in self.features if f.has_dhe)

    def mlp_bytes(self) -> int:
        """Bytes of the two MLPs."""
        pairs = itertools.chain(itertools.pairwise(self.bottom_widths), itertools.pairwise(self.top_widths))
        return self.item_bytes * sum((a + 1) * b for a, b in pairs)

    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(self.table_bytes()) + self.decoder_bytes() + self.mlp_bytes()

    def input_bytes(self) -> float:
        """Bytes of one sample as the host sends it: dense float32, int64 IDs and offsets."""
        return 4 * self.num_dense + 8 * len(self.features) * (1 + self.pooling)

    def with_representation(
        self, representation: str, dhe: DheConfig = PAPER_DHE, select_largest: int = 5
    ) -> ModelShape:
        """The same model with features as ``table``, ``dhe``, ``hybrid`` or ``select`` (``dhe`` for the
        ``select_largest`` largest vocabularies, tables for the rest).
        """
        features = with_representation(self.features, representation, dhe, select_largest)
        return replace(self, features=tuple(features))

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON types)."""
        plain = {**self.__dict__, "bottom": list(self.bottom), "top": list(self.top)}
        return {**plain, "features": [feature.to_dict() for feature in self.features]}


def kaggle(representation: str = "table", dim: int = 16) -> ModelShape:
    """The Criteo Kaggle shape: 26 features, 33.8 million rows, dimension 16, 2.16 GB of float32 tables."""
    return _criteo("kaggle", representation, dim)


def terabyte(representation: str = "table", dim: int = 64) -> ModelShape:
    """The Criteo Terabyte shape: 26 features, 49 million rows, dimension 64, 12.6 GB of float32 tables."""
    return _criteo("terabyte", representation, dim)


def _criteo(name: str, representation: str, dim: int) -> ModelShape:
    sizes = map(int, _VOCABULARIES[name].split("-"))
    features = tuple(FeatureConfig(f"c{i}", size, dim) for i, size in enumerate(sizes, 1))
    return ModelShape(name, features).with_representation(representation)


def shape_of(name: str, vocabularies: Sequence[int], dim: int, **options: Any) -> ModelShape:
    """A model of tables with the given vocabularies; ``options`` are :class:`ModelShape`'s."""
    features = [FeatureConfig(f"c{i}", size, dim) for i, size in enumerate(vocabularies, 1)]
    return ModelShape(name, tuple(features), **options)


def load_shape(name: str | os.PathLike) -> tuple[ModelShape, dict[str, float]]:
    """(shape, share of correct predictions by representation) of ``kaggle``, ``terabyte`` or a JSON file.

    The file has ``name``, ``vocabularies``, ``dim``, ``quality`` (by representation, each in [0, 1]), and
    optionally ``num_dense``, ``bottom``, ``top``, ``pooling`` and ``precision``. ``ValueError`` names what is
    wrong with it.
    """
    text = os.fspath(name)
    if text in PAPER_QUALITY:
        return {"kaggle": kaggle, "terabyte": terabyte}[text](), dict(PAPER_QUALITY[text])
    if not text.endswith(".json"):
        raise ValueError(f"shape: expected a .json file or one of {', '.join(PAPER_QUALITY)}, got {text!r}")
    try:
        content = json.loads(Path(text).read_text(encoding="utf-8"))
        quality = dict(content.pop("quality"))
        shape = shape_of(**content)
    except OSError as error:
        raise ValueError(f"cannot read shape {text}: {error.strerror or error}") from error
    except KeyError as error:
        raise ValueError(f"{text}: {error.args[0]}: missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{text}: not a model's shape: {error}") from error
    for representation, share in quality.items():
        if representation not in (*REPRESENTATIONS, SELECT):
            choices = ", ".join((*REPRESENTATIONS, SELECT))
            raise ValueError(f"{text}: quality: expected one of {choices}, got {representation!r}")
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ValueError(f"{text}: quality.{representation}: expected a share in [0, 1], got {share!r}")
    if not quality:
        raise ValueError(f"{text}: quality: expected at least one representation, got none")
    return shape, quality
