"""The names users write and the numbers kernels take, in one place."""

from collections.abc import Mapping

from mprec._native import hash_families

__all__ = ["ACTIVATIONS", "FAMILIES", "MODES", "code"]

#: Pooling of a bag; torch's numbers.
MODES: Mapping[str, int] = {"sum": 0, "mean": 1, "max": 2}
#: Hash families; see :mod:`mprec.hashing`.
FAMILIES: Mapping[str, int] = {family["name"]: i for i, family in enumerate(hash_families())}
#: What follows a decoder layer.
ACTIVATIONS: Mapping[str, int] = {"none": 0, "relu": 1, "sigmoid": 2, "mish": 3}


def code(names: Mapping[str, int], name: str, argument: str) -> int:
    """The number of ``name``, or a ``ValueError`` that lists the choices."""
    try:
        return names[name]
    except (KeyError, TypeError):
        choices = ", ".join(map(repr, names))
        raise ValueError(f"{argument}: expected one of {choices}, got {name!r}") from None
