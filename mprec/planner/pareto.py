"""Which of several paths are worth having."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["SAME_TIME", "Candidate", "front", "matches"]

SAME_TIME = 0.05  # two latencies closer than this share of the shorter are taken for equal


@dataclass(frozen=True)
class Candidate:
    """A path. ``quality``: more is better; ``nbytes`` of embeddings; ``seconds`` by batch size."""

    name: str
    quality: float
    nbytes: int
    seconds: Mapping[int, float]


def front(candidates: Sequence[Candidate]) -> dict[str, str | None]:
    """For each candidate None, or the name of one that is kept and is as good in everything and better in
    something. Latencies are measurements: one has to be ``SAME_TIME`` longer to count as longer.
    """
    # The best come first, so that what dominates is decided upon before what it dominates; of two that are
    # equal in everything the one that was named first is kept.
    order = sorted(candidates, key=lambda c: (-c.quality, c.nbytes, sum(c.seconds.values())))
    kept: list[Candidate] = []
    verdict: dict[str, str | None] = {}
    for candidate in order:
        by = next((other for other in kept if matches(other, candidate)), None)
        verdict[candidate.name] = None if by is None else by.name
        if by is None:
            kept.append(candidate)
    return {candidate.name: verdict[candidate.name] for candidate in candidates}


def matches(one: Candidate, other: Candidate) -> bool:
    """Whether ``one`` is as good as ``other`` in everything."""
    if one.quality < other.quality or one.nbytes > other.nbytes:
        return False
    return all(one.seconds[batch] <= (1 + SAME_TIME) * time for batch, time in other.seconds.items())
