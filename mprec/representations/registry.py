"""The list of representations: one line each."""

from collections.abc import Mapping

from mprec.representations import dhe, hot, hybrid, low_rank, table
from mprec.representations.base import INSTANCES, Part, Representation

__all__ = ["PARTS", "REPRESENTATIONS", "SELECT"]

_LIST = (
    table.REPRESENTATION,
    dhe.REPRESENTATION,
    hybrid.REPRESENTATION,
    low_rank.REPRESENTATION,
    *hot.REPRESENTATIONS,
)

#: By the name that users write.
REPRESENTATIONS: Mapping[str, Representation] = {found.name: found for found in _LIST}

#: Every part once, in the order of the list.
PARTS: tuple[Part, ...] = tuple(dict.fromkeys(part for found in _LIST for part in found.parts))
INSTANCES.update({part.container: part for part in PARTS})

#: No representation but a choice of one for each feature of a model: see ``with_representation``.
SELECT = "select"
