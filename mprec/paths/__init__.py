"""Ways to answer a query, made from trained models; :mod:`mprec.dispatch` chooses among them.

paths = paths_from_checkpoints(["table.pt", "dhe.pt", "hybrid.pt"])
profile = Profile.load_or_measure(paths, make_input=sampler(test_set))
"""

from mprec.paths.checkpoints import (
    Inputs,
    Scorer,
    can_cache,
    inputs_of,
    paths_from_checkpoints,
    sampler,
    vocabularies_of,
    with_cache,
)

__all__ = [
    "Inputs",
    "Scorer",
    "can_cache",
    "inputs_of",
    "paths_from_checkpoints",
    "sampler",
    "vocabularies_of",
    "with_cache",
]
