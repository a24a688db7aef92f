"""Kernel choice inside a model: threads, computing equal IDs once, looking into the cache, by batch size, as
measured here.

The candidates give the same numbers, so the choice is a dispatcher's with one quality for all: the fastest.
:func:`tune_kernels` measures with batches of the caller's; :func:`auto_kernels` draws its own.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mprec.data.zipf import zipf_batches
from mprec.dispatch.dispatcher import Dispatcher
from mprec.dispatch.paths import Path, shape_digest
from mprec.dispatch.profile import BATCH_SIZES, Profile
from mprec.nn import DeepHashEmbeddingBag, EmbeddingBagCollection, KernelOptions

__all__ = ["TunedKernels", "auto_kernels", "kernel_candidates", "tune_kernels"]

_AUTO_SECONDS = 1.0
_auto_lock = threading.Lock()


def kernel_candidates(
    has_dhe: bool, threads: int | None = None, has_cache: bool = False
) -> dict[str, KernelOptions]:
    """What can be chosen, by name, with at most ``threads`` threads (torch's number)."""
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    counts = sorted({1, threads} | {n for n in (2, 4, 8, 16, 32, 64) if n < threads})
    past = False if has_cache else None
    ways = {"": KernelOptions()}
    if has_dhe:
        ways = {
            "all IDs": KernelOptions(None, False, past),
            "equal IDs once": KernelOptions(None, True, past),
        }
    if has_cache:
        ways["cache"] = KernelOptions(cache=True)
    return {
        ", ".join(filter(None, (f"{count} thread{'s'[: count > 1]}", name))): way._replace(threads=count)
        for count, (name, way) in itertools.product(counts, ways.items())
    }


class TunedKernels:
    """From the number of samples to the fastest candidate's options: a table, so that a call costs a
    look-up. ``profile`` holds what was measured; ``choices`` what follows from it.
    """

    def __init__(
        self, candidates: dict[str, KernelOptions], paths: Sequence[Path], profile: Profile, largest: int
    ) -> None:
        self.profile = profile
        dispatcher = Dispatcher(paths, profile, statistic="mean")
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
    options = {"conditions": ("warm",), "seconds": seconds / len(found), **options}
    tuned = {}
    for name, collection in found.items():
        candidates, paths = _paths(collection, threads)
        profile = Profile.measure(paths, make_input, batch_sizes, **options)
        tuned[name] = TunedKernels(candidates, paths, profile, max(batch_sizes))
    for name, collection in found.items():
        collection.kernel = tuned[name]
    return tuned


def auto_kernels(module: EmbeddingBagCollection | DeepHashEmbeddingBag) -> TunedKernels:
    """What ``kernel="auto"`` of a module becomes at its first call without gradients: its candidates measured
    on Zipf(1.05) IDs, one for each bag, which takes some seconds, or such a profile that the user's cache
    folder has of this machine and these shapes.
    """
    with _auto_lock:  # threads that come together measure once
        if isinstance(module.kernel, TunedKernels):
            return module.kernel
        candidates, paths = _paths(module)
        make_input = zipf_batches(_vocabularies(module))
        profile = Profile.load_or_measure(
            paths, make_input, BATCH_SIZES, seconds=_AUTO_SECONDS, conditions=("warm",)
        )
        return TunedKernels(candidates, paths, profile, BATCH_SIZES[-1])


def _paths(module, threads: int | None = None) -> tuple[dict[str, KernelOptions], list[Path]]:
    """The module's candidates, and a path for each: a twin that shares its weights and runs with these."""
    has_cache = False
    if isinstance(module, EmbeddingBagCollection):
        has_dhe, has_cache = any(f.has_dhe for f in module.features), module.has_cache
        parts = [feature.to_dict() for feature in module.features]
        precisions = [getattr(module, f"{kind}_precision", None) for kind in ("table", "decoder")]
    else:
        has_dhe, parts, precisions = True, [module.config.to_dict(), module.embedding_dim, module.mode], []
    shape = shape_digest([parts, precisions])
    candidates = kernel_candidates(has_dhe, threads, has_cache)
    return candidates, [Path(n, "kernel", 0.0, _with(module, o), shape) for n, o in candidates.items()]


def _with(module, options: KernelOptions | None) -> Callable[[Any], torch.Tensor]:
    """A path that embeds a batch with these options; the module itself stays as it is."""
    twin = copy.copy(module)
    twin.kernel = None if options is None else lambda samples: options
    last = None if getattr(module, "include_last_offset", True) else -1

    @torch.inference_mode()
    def run(batch: Any) -> torch.Tensor:
        return twin(batch.indices, batch.offsets[:last])

    return run


def _vocabularies(module) -> list[int]:
    if isinstance(module, EmbeddingBagCollection):
        return [feature.num_embeddings for feature in module.features]
    return [module.num_embeddings or 1 << 20]
