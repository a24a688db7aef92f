"""What a feature's embedding is made of, as plain data that goes into checkpoints and plans."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mprec.names import ACTIVATIONS, FAMILIES, MODES, code

__all__ = ["REPRESENTATIONS", "DheConfig", "FeatureConfig", "with_representation"]

REPRESENTATIONS = ("table", "dhe", "hybrid")


def _positive(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


@dataclass(frozen=True)
class DheConfig:
    """A deep hash embedding: ``k`` hashes, hidden layers, and the embedding as the last layer.

    Args:
        k: number of hash functions, the decoder's input width.
        hidden: widths of the decoder's hidden layers; may be empty.
        family: hash family, see :mod:`mprec.hashing`.
        activation: after hidden layers: ``"none"``, ``"relu"``, ``"sigmoid"`` or ``"mish"``.
        last_activation: after the last layer. A bounded one generalises better on the data sets measured.
        seed: of the hash coefficients.
    """

    k: int = 1024
    hidden: tuple[int, ...] = (128,)
    family: str = "universal"
    activation: str = "relu"
    last_activation: str = "sigmoid"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        _positive(self.k, "k")
        for width in self.hidden:
            _positive(width, "hidden")
        code(FAMILIES, self.family, "family")
        code(ACTIVATIONS, self.activation, "activation")
        code(ACTIVATIONS, self.last_activation, "last_activation")
        if self.family == "artifact_gaussian" and self.k % 2:
            raise ValueError(f"k: artifact_gaussian turns pairs of hashes into pairs, got an odd {self.k}")

    def widths(self, embedding_dim: int) -> tuple[int, ...]:
        """Widths from the hashes to the embedding: ``(k, *hidden, embedding_dim)``."""
        return (self.k, *self.hidden, embedding_dim)

    def num_parameters(self, embedding_dim: int) -> int:
        """Weights and biases of the decoder (the hash coefficients are not trained)."""
        widths = self.widths(embedding_dim)
        return sum((a + 1) * b for a, b in itertools.pairwise(widths))

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON types)."""
        return {**dataclasses.asdict(self), "hidden": list(self.hidden)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "DheConfig":
        """Inverse of :meth:`to_dict`. ``ValueError`` on an unknown key or a bad value."""
        _check_keys(cls, data)
        return cls(**data)


@dataclass(frozen=True)
class FeatureConfig:
    """One categorical feature and how its IDs become vectors.

    Args:
        name: unique within a collection; no dots.
        num_embeddings: size of the vocabulary: IDs are in ``[0, num_embeddings)``.
        embedding_dim: size of the vector (of each of the two for ``"hybrid"``).
        representation: ``"table"``, ``"dhe"`` or ``"hybrid"`` (both, side by side).
        dhe: the deep hash embedding; required for ``"dhe"`` and ``"hybrid"``, ignored for ``"table"``.
        mode: pooling: ``"sum"``, ``"mean"`` or ``"max"``.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    representation: str = "table"
    dhe: DheConfig | None = None
    mode: str = "sum"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or "." in self.name:
            raise ValueError(f"name: expected a non-empty string without dots, got {self.name!r}")
        _positive(self.num_embeddings, f"feature {self.name!r}: num_embeddings")
        _positive(self.embedding_dim, f"feature {self.name!r}: embedding_dim")
        if self.representation not in REPRESENTATIONS:
            choices = ", ".join(map(repr, REPRESENTATIONS))
            raise ValueError(
                f"feature {self.name!r}: representation: expected one of {choices}, got "
                f"{self.representation!r}"
            )
        code(MODES, self.mode, f"feature {self.name!r}: mode")
        if self.representation != "table" and self.dhe is None:
            object.__setattr__(self, "dhe", DheConfig())

    @property
    def has_table(self) -> bool:
        return self.representation != "dhe"

    @property
    def has_dhe(self) -> bool:
        return self.representation != "table"

    @property
    def output_dim(self) -> int:
        """Columns of the output: ``embedding_dim``, twice that for ``"hybrid"``."""
        return self.embedding_dim * (self.has_table + self.has_dhe)

    def num_parameters(self) -> int:
        """Trained numbers of this feature."""
        table = self.num_embeddings * self.embedding_dim if self.has_table else 0
        return table + (self.dhe.num_parameters(self.embedding_dim) if self.has_dhe else 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON types)."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**data, "dhe": None if self.dhe is None else self.dhe.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "FeatureConfig":
        """Inverse of :meth:`to_dict`. ``ValueError`` on an unknown key or a bad value."""
        _check_keys(cls, data)
        dhe = data.get("dhe")
        return cls(**{**data, "dhe": None if dhe is None else DheConfig.from_dict(dhe)})


def _check_keys(cls: type, data: dict[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - known):
        raise ValueError(f"{cls.__name__}: unknown {', '.join(unknown)}; expected {', '.join(sorted(known))}")


def with_representation(
    features: Sequence[FeatureConfig],
    representation: str,
    dhe: DheConfig | None = None,
    select_largest: int = 2,
) -> list[FeatureConfig]:
    """The same features under another representation.

    Args:
        features: names, sizes and pooling are kept.
        representation: ``"table"``, ``"dhe"``, ``"hybrid"`` for all of them, or ``"select"``: ``"dhe"`` for
            the ``select_largest`` features of the largest vocabularies, ``"table"`` for the rest.
        dhe: the deep hash embedding where there is one; default: the feature's own, or ``DheConfig()``.
    """
    if representation != "select" and representation not in REPRESENTATIONS:
        choices = ", ".join(map(repr, (*REPRESENTATIONS, "select")))
        raise ValueError(f"representation: expected one of {choices}, got {representation!r}")
    by_size = sorted(range(len(features)), key=lambda i: -features[i].num_embeddings)
    largest = set(by_size[:select_largest])
    changed = []
    for i, feature in enumerate(features):
        kind = representation
        if representation == "select":
            kind = "dhe" if i in largest else "table"
        config = None if kind == "table" else dhe or feature.dhe or DheConfig()
        changed.append(dataclasses.replace(feature, representation=kind, dhe=config))
    return changed
