"""Tile sizes measured on this GPU and kept on disk, in place of the defaults that static search gave.

One JSON file per GPU model and software versions, in the user's cache directory. It is written whole and
then renamed; one that cannot be read is reported and ignored.
"""

import json
import os
import re
import statistics
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton

from mprec._native import __version__

from . import tuning
from .tuning import Config

Steps = list[tuple[Config, int]]
_loaded: dict[Path, dict[str, Steps]] = {}


def path_of(device: torch.device) -> Path:
    """The file for this device; MPREC_CACHE_DIR or XDG_CACHE_HOME move it."""
    root = os.environ.get("MPREC_CACHE_DIR")
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mprec"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    versions = f"{__version__}-torch{torch.__version__}-triton{triton.__version__}"
    return Path(root) / f"triton-{re.sub(r'[^A-Za-z0-9]+', '-', name)}-{versions}.json"


def key_of(count: int, k: int, widths: Sequence[int], dtype: torch.dtype, family: str) -> str:
    """What a measurement holds for: a decoder's shape, its type, and the count to the next power of two."""
    bucket = 1
    while bucket < count:  # by comparisons, which a count that is being traced can answer
        bucket *= 2
    return f"{bucket} {'-'.join(map(str, [k, *widths]))} {str(dtype)[6:]} {family}"


def remembered(device: torch.device, key: str) -> Steps | None:
    """What `tune` found for this key on this device, if it ever ran."""
    if tuning.pretending():
        return None
    return _load(path_of(device)).get(key)


def _load(path: Path) -> dict[str, Steps]:
    if path not in _loaded:
        try:
            entries = json.loads(path.read_text()) if path.exists() else {}
            _loaded[path] = {
                key: [(Config(*map(int, config)), int(layers)) for config, layers in steps]
                for key, steps in entries.items()
            }
        except (OSError, ValueError, TypeError, AttributeError) as error:
            warnings.warn(f"mprec: tuned tile sizes in {path} are not readable: {error}", stacklevel=2)
            _loaded[path] = {}
    return _loaded[path]


def tune(
    device: torch.device,
    count: int,
    k: int,
    widths: list[int],
    dtype: torch.dtype,
    family: str,
    run: Callable[[Steps], object],
    seconds: Callable[[Callable[[], object]], list[float]],
) -> tuple[Steps, float]:
    """Time `run(steps)` for the ways to decode this shape; keep the fastest on disk and return it.

    First how the layers are cut into launches, each with its first candidate; then each launch's tile sizes
    in turn. `seconds(call)` measures. A candidate that does not compile or launch is passed over.
    """
    target, timed = tuning.target_of(device), {}

    def measure(steps: Steps) -> float:
        key = tuple(steps)
        if key not in timed:
            try:
                run(steps)
                timed[key] = statistics.median(seconds(lambda: run(steps)))
            except (RuntimeError, triton.runtime.errors.OutOfResources, triton.compiler.CompilationError):
                timed[key] = float("inf")
        return timed[key]

    def choices(steps_before: int, layers: int) -> list[Config]:
        inputs = k if steps_before == 0 else widths[steps_before - 1]
        these = widths[steps_before : steps_before + layers]
        return tuning.alternatives(target, count, inputs, these, dtype, steps_before == 0)

    best: Steps = []
    for split in tuning.split_layers(len(widths)):
        options = [choices(sum(split[:i]), layers) for i, layers in enumerate(split)]
        if all(options):
            steps = [(configs[0], layers) for configs, layers in zip(options, split, strict=True)]
            best = min([best, steps] if best else [steps], key=measure)
    for i in range(len(best)):
        layers = best[i][1]
        for config in choices(sum(n for _, n in best[:i]), layers):
            best = min([best, [*best[:i], (config, layers), *best[i + 1 :]]], key=measure)
    _keep(path_of(device), key_of(count, k, widths, dtype, family), best)
    return best, measure(best)


def _keep(path: Path, key: str, steps: Steps) -> None:
    entries = _load(path)
    entries[key] = steps
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(entries, indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:  # this process has them all the same
        warnings.warn(f"mprec: tuned tile sizes cannot be kept in {path}: {error}", stacklevel=3)
