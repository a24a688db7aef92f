"""Run-time options chosen by measurement: threads, computing equal IDs once, looking into the cache.

The candidates give the same numbers, so the choice is a dispatcher's with one quality for all: the fastest at
each batch size. :func:`tune_options` measures with batches of the caller's; :func:`auto_options` draws its
own. A module can be tuned if it has ``tuning_traits()``. :mod:`mprec.dispatch` is loaded by the first
measurement, not by ``import mprec.nn``.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mprec.options import RunOptions

if TYPE_CHECKING:
    from mprec.dispatch import Profile, ScoringPath

__all__ = ["TunedOptions", "auto_options", "option_candidates", "options_for", "tune_options"]

_AUTO_SECONDS = 1.0
_auto_lock = threading.Lock()


def options_for(module: torch.nn.Module, samples: int) -> RunOptions:
    """What ``module.options``, which is not None, says of a batch of so many samples."""
    options = module.options
    if options == "auto":
        options = module.options = auto_options(module)
    return options(samples)


def option_candidates(
    has_dhe: bool, threads: int | None = None, has_cache: bool = False
) -> dict[str, RunOptions]:
    """What can be chosen, by name, with at most ``threads`` threads (torch's number)."""
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    counts = sorted({1, threads} | {n for n in (2, 4, 8, 16, 32, 64) if n < threads})
    past = False if has_cache else None
    ways = {"": RunOptions()}
    if has_dhe:
        ways = {
            "all IDs": RunOptions(None, False, past),
            "equal IDs once": RunOptions(None, True, past),
        }
    if has_cache:
        ways["cache"] = RunOptions(cache=True)
    return {
        ", ".join(filter(None, (f"{count} thread{'s'[: count > 1]}", name))): way._replace(threads=count)
        for count, (name, way) in itertools.product(counts, ways.items())
    }


class TunedOptions:
    """From the number of samples to the fastest candidate's options: a table, so that a call costs a
    look-up. ``profile`` holds what was measured; ``choices`` what follows from it.
    """

    def __init__(
        self,
        candidates: dict[str, RunOptions],
        paths: Sequence[ScoringPath],
        profile: Profile,
        largest: int,
    ) -> None:
        from mprec.dispatch import Dispatcher

        self.profile = profile
        dispatcher = Dispatcher(paths, profile, statistic="mean")
        self.choices = [dispatcher.choose(size, 0.0).name for size in range(1, largest + 1)]
        self._options = [candidates[name] for name in (self.choices[0], *self.choices)]
        self._last = largest

    def __call__(self, samples: int) -> RunOptions:
        return self._options[min(samples, self._last)]


def tune_options(
    model: torch.nn.Module,
    make_input: Callable[[int, np.random.Generator], Any],
    batch_sizes: Sequence[int] | None = None,
    *,
    seconds: float = 5.0,
    threads: int | None = None,
    **options: Any,
) -> dict[str, TunedOptions]:
    """Measure the candidates of every :class:`EmbeddingBagCollection` in ``model`` and let each use, from now
    on, what is fastest at the size of the batch at hand.

    ``make_input(batch_size, rng)`` draws batches as the model is going to see them (how often IDs repeat
    matters). ``batch_sizes``: default ``mprec.dispatch.BATCH_SIZES``. ``seconds`` are shared among the
    collections; ``options`` go to ``Profile.measure``. Returns what was chosen, by module name.
    ``ValueError`` if the model has no collection.
    """
    from mprec import dispatch

    batch_sizes = dispatch.BATCH_SIZES if batch_sizes is None else batch_sizes
    found = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "tuning_traits") and module.tuning_traits().takes_batches
    }
    if not found:
        raise ValueError("model: has no EmbeddingBagCollection whose options could be chosen")
    options = {"conditions": ("warm",), "seconds": seconds / len(found), **options}
    tuned = {}
    for name, collection in found.items():
        candidates, paths = _paths(collection, threads)
        profile = dispatch.Profile.measure(paths, make_input, batch_sizes, **options)
        tuned[name] = TunedOptions(candidates, paths, profile, max(batch_sizes))
    for name, collection in found.items():
        collection.options = tuned[name]
    return tuned


def auto_options(module: torch.nn.Module) -> TunedOptions:
    """What ``options="auto"`` of a module becomes at its first call without gradients: its candidates
    measured on Zipf(1.05) IDs, one for each bag, which takes some seconds, or such a profile that the user's
    cache folder has of this machine and these shapes.
    """
    from mprec import dispatch
    from mprec.data.zipf import zipf_batches

    with _auto_lock:  # threads that come together measure once
        if isinstance(module.options, TunedOptions):
            return module.options
        candidates, paths = _paths(module)
        make_input = zipf_batches(module.tuning_traits().vocabularies)
        profile = dispatch.Profile.load_or_measure(
            paths, make_input, dispatch.BATCH_SIZES, seconds=_AUTO_SECONDS, conditions=("warm",)
        )
        return TunedOptions(candidates, paths, profile, dispatch.BATCH_SIZES[-1])


def _paths(module, threads: int | None = None) -> tuple[dict[str, RunOptions], list[ScoringPath]]:
    """The module's candidates, and a path for each: a twin that shares its weights and runs with these."""
    from mprec.dispatch import ScoringPath, shape_digest

    traits = module.tuning_traits()
    shape = shape_digest(traits.shape)
    candidates = option_candidates(traits.has_dhe, threads, traits.has_cache)
    return candidates, [ScoringPath(n, "kernel", 0.0, _with(module, o), shape) for n, o in candidates.items()]


def _with(module, options: RunOptions | None) -> Callable[[Any], torch.Tensor]:
    """A path that embeds a batch with these options; the module itself stays as it is."""
    twin = copy.copy(module)
    twin.options = None if options is None else lambda samples: options
    whole = getattr(module, "include_last_offset", True)  # collections have no such option

    @torch.inference_mode()
    def run(batch: Any) -> torch.Tensor:
        return twin(batch.indices, batch.offsets if whole else batch.offsets[:-1])

    return run
