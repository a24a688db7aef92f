"""Kernel choice inside a model: threads, and computing equal IDs once, by batch size, as measured here.

The candidates give the same numbers, so the choice is a dispatcher's with one quality for all: the fastest.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mprec.dispatch.dispatcher import Dispatcher
from mprec.dispatch.paths import Path, shape_digest
from mprec.dispatch.profile import BATCH_SIZES, Profile
from mprec.nn import EmbeddingBagCollection, KernelOptions

__all__ = ["TunedKernels", "kernel_candidates", "tune_kernels"]


def kernel_candidates(has_dhe: bool, threads: int | None = None) -> dict[str, KernelOptions]:
    """What can be chosen, by name, with at most ``threads`` threads (torch's number)."""
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    counts = sorted({1, threads} | {n for n in (2, 4, 8, 16, 32, 64) if n < threads})
    ways = {"": None} if not has_dhe else {"all IDs": False, "equal IDs once": True}
    return {
        ", ".join(filter(None, (f"{count} thread{'s'[: count > 1]}", way))): KernelOptions(count, dedupe)
        for count, (way, dedupe) in itertools.product(counts, ways.items())
    }


class TunedKernels:
    """From the number of samples to the fastest candidate's options: a table, so that a call costs a
    look-up. ``profile`` holds what was measured; ``choices`` what follows from it.
    """

    def __init__(
        self, candidates: dict[str, KernelOptions], dispatcher: Dispatcher, profile: Profile, largest: int
    ) -> None:
        self.profile = profile
        self.choices = [dispatcher.choose(size, 0.0).name for size in range(1, largest + 1)]
        self._options = [candidates[name] for name in (self.choices[0], *self.choices)]
        self._last = largest

    def __call__(self, samples: int) -> KernelOptions:
        return self._options[min(samples, self._last)]


def tune_kernels(
    model: torch.nn.Module,
    make_input: Callable[[int, np.random.Generator], Any],
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    seconds: float = 5.0,
    threads: int | None = None,
    **options: Any,
) -> dict[str, TunedKernels]:
    """Measure the candidates of every :class:`EmbeddingBagCollection` in ``model`` and let each use, from now
    on, what is fastest at the size of the batch at hand.

    ``make_input(batch_size, rng)`` draws batches as the model is going to see them (how often IDs repeat
    matters). ``seconds`` are shared among the collections; ``options`` go to ``Profile.measure``. Returns
    what was chosen, by module name. ``ValueError`` if the model has no collection.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, EmbeddingBagCollection)}
    if not found:
        raise ValueError("model: has no EmbeddingBagCollection whose kernels could be chosen")
    tuned = {}
    for name, collection in found.items():
        candidates = kernel_candidates(any(f.has_dhe for f in collection.features), threads)
        shape = shape_digest([feature.to_dict() for feature in collection.features])
        paths = [Path(n, "kernel", 0.0, _with(collection, o), shape) for n, o in candidates.items()]
        before, collection.kernel = collection.kernel, None
        try:
            profile = Profile.measure(
                paths,
                make_input,
                batch_sizes,
                seconds=seconds / len(found),
                **{"conditions": ("warm",), **options},
            )
        except BaseException:
            collection.kernel = before
            raise
        dispatcher = Dispatcher(paths, profile, quantile="p50")
        collection.kernel = tuned[name] = TunedKernels(candidates, dispatcher, profile, max(batch_sizes))
    return tuned


def _with(collection: EmbeddingBagCollection, options: KernelOptions) -> Callable[[Any], torch.Tensor]:
    """A path that embeds a batch with these options."""

    @torch.inference_mode()
    def run(batch: Any) -> torch.Tensor:
        collection.kernel = lambda samples: options
        return collection(batch.indices, batch.offsets)

    return run
