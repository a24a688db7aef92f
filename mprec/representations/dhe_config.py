"""The parameters of a deep hash embedding, as plain data that goes into checkpoints and plans."""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

from mprec.hashing import check_family
from mprec.names import ACTIVATIONS, code

__all__ = ["DheConfig", "check_keys", "check_positive"]


def check_positive(value: Any, name: str) -> None:
    """``ValueError`` if it is not an int above 0."""
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
        check_positive(self.k, "k")
        for width in self.hidden:
            check_positive(width, "hidden")
        check_family(self.family, self.k)
        code(ACTIVATIONS, self.activation, "activation")
        code(ACTIVATIONS, self.last_activation, "last_activation")

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
        check_keys(cls, data)
        return cls(**data)


def check_keys(cls: type, data: dict[str, Any]) -> None:
    """``ValueError`` for a key that is no field of the dataclass."""
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - known):
        raise ValueError(f"{cls.__name__}: unknown {', '.join(unknown)}; expected {', '.join(sorted(known))}")
