"""What a feature's embedding is made of, as plain data that goes into checkpoints and plans."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mprec.names import MODES, code
from mprec.representations.base import Part
from mprec.representations.dhe_config import DheConfig, check_keys, check_positive
from mprec.representations.registry import REPRESENTATIONS, SELECT

__all__ = ["DheConfig", "FeatureConfig", "with_representation"]


@dataclass(frozen=True)
class FeatureConfig:
    """One categorical feature and how its IDs become vectors.

    Args:
        name: unique within a collection; no dots.
        num_embeddings: size of the vocabulary: IDs are in ``[0, num_embeddings)``.
        embedding_dim: size of the vector (of each of the two for ``"hybrid"``).
        representation: a name of :data:`mprec.representations.REPRESENTATIONS`: ``"table"``, ``"dhe"``,
            ``"hybrid"`` (both, side by side) or what else the list has.
        dhe: the deep hash embedding, where the representation has one (default ``DheConfig()``).
        mode: pooling: ``"sum"``, ``"mean"`` or ``"max"``.
        parameters: of representations that have other parameters, by name.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    representation: str = "table"
    dhe: DheConfig | None = None
    mode: str = "sum"
    parameters: Mapping[str, Any] | tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or "." in self.name:
            raise ValueError(f"name: expected a non-empty string without dots, got {self.name!r}")
        check_positive(self.num_embeddings, f"feature {self.name!r}: num_embeddings")
        check_positive(self.embedding_dim, f"feature {self.name!r}: embedding_dim")
        if self.representation not in REPRESENTATIONS:
            choices = ", ".join(map(repr, REPRESENTATIONS))
            raise ValueError(
                f"feature {self.name!r}: representation: expected one of {choices}, got "
                f"{self.representation!r}"
            )
        code(MODES, self.mode, f"feature {self.name!r}: mode")
        if any(part.hashes for part in self.parts) and self.dhe is None:
            object.__setattr__(self, "dhe", DheConfig())
        # Sorted pairs, so that configurations can be compared and be keys of dicts.
        object.__setattr__(self, "parameters", tuple(sorted(dict(self.parameters).items())))
        known = {name for part in self.parts for name in part.parameters}
        if unknown := sorted(set(dict(self.parameters)) - known):
            raise ValueError(
                f"feature {self.name!r}: parameters: {self.representation} has no {unknown[0]!r}; "
                f"it has {', '.join(sorted(known)) or 'none'}"
            )
        for part in self.parts:
            part.check(self)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the representation consists of."""
        return REPRESENTATIONS[self.representation].parts

    @property
    def has_table(self) -> bool:
        return any(part.container == "tables" for part in self.parts)

    @property
    def has_dhe(self) -> bool:
        """Whether a deep hash embedding is a part of its own."""
        return any(part.container == "dhe" for part in self.parts)

    @property
    def has_rows(self) -> bool:
        """Whether IDs have rows: then a precision is that of rows, and IDs are below ``num_embeddings``."""
        return any(part.has_rows for part in self.parts)

    @property
    def output_dim(self) -> int:
        """Columns of the output: ``embedding_dim`` for each part."""
        return self.embedding_dim * len(self.parts)

    def num_parameters(self) -> int:
        """Trained numbers of this feature."""
        return sum(part.num_parameters(self) for part in self.parts)

    def parameter(self, name: str, default: Any) -> Any:
        """One of ``parameters``, or what stands for it where it is not given."""
        return dict(self.parameters).get(name, default)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON types)."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        parameters = data.pop("parameters")
        data["dhe"] = None if self.dhe is None else self.dhe.to_dict()
        return {**data, "parameters": dict(parameters)} if parameters else data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "FeatureConfig":
        """Inverse of :meth:`to_dict`. ``ValueError`` on an unknown key or a bad value."""
        check_keys(cls, data)
        dhe = data.get("dhe")
        return cls(**{**data, "dhe": None if dhe is None else DheConfig.from_dict(dhe)})


def with_representation(
    features: Sequence[FeatureConfig],
    representation: str,
    dhe: DheConfig | None = None,
    select_largest: int = 2,
) -> list[FeatureConfig]:
    """The same features under another representation.

    Args:
        features: names, sizes and pooling are kept.
        representation: one of :data:`mprec.representations.REPRESENTATIONS` for all of them, or ``"select"``:
            ``"dhe"`` for the ``select_largest`` features of the largest vocabularies, ``"table"`` for others.
        dhe: the deep hash embedding where there is one; default: the feature's own, or ``DheConfig()``.
    """
    if representation != SELECT and representation not in REPRESENTATIONS:
        choices = ", ".join(map(repr, (*REPRESENTATIONS, SELECT)))
        raise ValueError(f"representation: expected one of {choices}, got {representation!r}")
    by_size = sorted(range(len(features)), key=lambda i: -features[i].num_embeddings)
    largest = set(by_size[:select_largest])
    changed = []
    for i, feature in enumerate(features):
        kind = representation
        if representation == SELECT:
            kind = "dhe" if i in largest else "table"
        hashes = any(part.hashes for part in REPRESENTATIONS[kind].parts)
        config = dhe or feature.dhe or DheConfig() if hashes else None
        kept = feature.parameters if kind == feature.representation else ()
        changed.append(dataclasses.replace(feature, representation=kind, dhe=config, parameters=kept))
    return changed
