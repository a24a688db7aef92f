"""Measured latencies of a set of paths on one machine, kept as a JSON file.

A profile is trusted only where it was measured: its fingerprint names CPU, ISA, threads, GPU, versions and
the shape of every path, and a file that differs in any of them, or is damaged, is refused with the list of
what differs (``load``) or measured again (``load_or_measure``).
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mprec.data import Batch
from mprec.data.batching import concatenate, take
from mprec.dispatch.curve import Curve, falls
from mprec.dispatch.fingerprint import fingerprint
from mprec.dispatch.microbenchmark import Evict, Samples, microbenchmark
from mprec.dispatch.paths import ScoringPath, shape_digest, unique_share
from mprec.dispatch.refine import PASSES, check_sizes, errors, median_curves, refine
from mprec.dispatch.share import ShareEffect
from mprec.files import write_whole

__all__ = ["BATCH_SIZES", "CONDITIONS", "Profile", "ProfileError", "ProfileMismatchError", "default_file"]

FORMAT = "mprec profile"
VERSION = 3
BATCH_SIZES = tuple(2**i for i in range(12))  # 1 ... 2048
QUANTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
STATISTICS = (*QUANTILES, "mean")
# warm: calls back to back. repeated: the same, a quarter of the batch's rows four times each, so that few
# IDs are unique. cold: the CPU's caches emptied before every call.
CONDITIONS = ("warm", "repeated", "cold")
_REPEATS = 4


class ProfileError(ValueError):
    """A file is no profile of mprec's, or is damaged."""


class ProfileMismatchError(ProfileError):
    """A profile was measured elsewhere or for other paths.

    ``differences`` maps each fact that differs to (what the file says, what is here).
    """

    def __init__(self, message: str, differences: Mapping[str, tuple[Any, Any]]) -> None:
        super().__init__(message)
        self.differences = dict(differences)


@dataclass(frozen=True)
class Profile:
    """``cells[path][condition]`` has equally long lists: ``batch_sizes``, ``calls`` (how many were timed),
    ``unique_share`` (mean over calls), and ``p50``, ``p95``, ``p99`` and ``mean`` in seconds. The mean leaves
    out the slowest twentieth of the calls, which other work on the machine has delayed. Where inputs are of
    two kinds, it says what many calls take together, and a median only which kind prevails.

    Condition *warm* also has how latency follows the share of unique IDs, ``share_highest``, ``share_slope``
    and ``share_least`` (:mod:`mprec.dispatch.share`), and ``same_share``: the statistics as they would be if
    all inputs had the highest share. Profiles written by hand may lack these.

    ``prediction_error`` is measured, not assumed: predicted over observed median at batch sizes between
    the grid points, as ``median`` and ``p95`` of the relative error. ``simulated`` profiles describe
    devices that are not at hand; whatever is predicted from one must say so.
    """

    paths: Mapping[str, Mapping[str, Any]]  # name -> representation, quality, shape
    cells: Mapping[str, Mapping[str, Mapping[str, list]]]
    fingerprint: Mapping[str, Any]
    prediction_error: Mapping[str, Any] | None = None
    created: str = ""
    simulated: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)

    def curve(
        self, path: str, statistic: str = "p50", condition: str = "warm", same_share: bool = False
    ) -> Curve:
        """Latency of one path over batch size; with ``same_share``, of inputs that all have the highest share
        of unique IDs. ``KeyError`` names what was not measured."""
        try:
            cell = self.cells[path][condition]
            values = cell.get("same_share", cell) if same_share else cell
            return Curve.fit(cell["batch_sizes"], values[statistic], falls(values["p50"]))
        except KeyError as error:
            raise KeyError(
                f"profile has no {statistic} of path {path!r} in condition {condition!r} (missing {error})"
            ) from None

    def share_effects(self, path: str, condition: str = "warm") -> tuple[list[int], list[ShareEffect]]:
        """(batch sizes, how latency follows the share of unique IDs at each)."""
        cell = self.cells[path][condition]
        known = len(cell["batch_sizes"])
        columns = [
            cell.get("share_highest", cell["unique_share"]),
            cell.get("share_slope", [0.0] * known),
            cell.get("share_least", [1.0] * known),
        ]
        return cell["batch_sizes"], [ShareEffect(*row) for row in zip(*columns, strict=True)]

    # -- measuring

    @classmethod
    def measure(
        cls,
        paths: Sequence[ScoringPath],
        make_input: Callable[[int, np.random.Generator], Any],
        batch_sizes: Sequence[int] = BATCH_SIZES,
        *,
        seconds: float = 20.0,
        conditions: Sequence[str] = CONDITIONS,
        seed: int = 0,
        progress: Callable[[str, float], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        **options: Any,
    ) -> Profile:
        """Micro-benchmark the paths for about ``seconds``, and keep statistics: longer only if a few calls
        of each path at each size take longer.

        First a quick look finds batch sizes to add where latency is not straight between those given
        (:func:`mprec.dispatch.refine.refine`). Then come the conditions, *warm* with the most time, and batch
        sizes off the grid, which tell the prediction's error. ``options`` go to ``microbenchmark``.
        ``repeated`` is left out where inputs are not batches of rows (see ``repeated_rows``).
        """
        _check_names(paths)
        if unknown := [c for c in conditions if c not in CONDITIONS]:
            raise ValueError(f"conditions: {unknown[0]!r} is none of {', '.join(CONDITIONS)}")
        batch_sizes = sorted(set(batch_sizes))
        if not batch_sizes:
            raise ValueError("batch_sizes: expected at least one, got none")
        rng = np.random.default_rng(seed)
        probe = make_input(batch_sizes[-1], rng)
        wanted = [c for c in CONDITIONS if c in conditions and (c != "repeated" or isinstance(probe, Batch))]
        share = seconds / (len(wanted) + 4)  # warm gets three, the quick look and the check one each

        def run(label, sizes, source=make_input, duration=share, **more) -> Samples:
            report = (lambda done: progress(label, done)) if progress else None
            return microbenchmark(
                paths,
                source,
                sizes,
                seconds=duration,
                seed=seed,
                progress=report,
                clock=clock,
                **{**options, **more},
            )

        look, start = share / (1 + PASSES), clock()
        sizes = refine(
            batch_sizes,
            lambda some: run("choosing batch sizes", some, duration=look),
            lambda: clock() - start < share,
        )
        cells: dict[str, dict[str, dict[str, Any]]] = {path.name: {} for path in paths}
        error, measured = None, {}
        for condition in wanted:
            here = sizes
            shares: Samples = defaultdict(list)
            more = {"after_call": lambda name, size, item, to=shares: to[name, size].append(_share(item))}
            if condition == "cold":  # emptying the caches takes longer than most calls
                here = _thinned(batch_sizes)
                samples = run(condition, here, before_call=Evict(), max_calls=30, **more)
            elif condition == "repeated":
                samples = run(condition, here, repeated_rows(make_input), **more)
            else:
                samples = run(condition, here, duration=3 * share, **more)
                if between := check_sizes(batch_sizes, sizes):
                    error = _error(samples, run("between grid points", between))
            measured[condition] = samples, shares
            for path in paths:
                cells[path.name][condition] = _cell(path.name, samples, shares)
        if "warm" in measured:
            for path in paths:
                cells[path.name]["warm"] |= _share_cell(path.name, measured)
        return cls(
            paths={p.name: _describe(p) for p in paths},
            cells=cells,
            fingerprint={**fingerprint(), "paths": {p.name: p.shape for p in paths}},
            prediction_error=error,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            notes={"seconds": seconds, "seed": seed},
        )

    # -- keeping

    def to_dict(self) -> dict[str, Any]:
        content = {"format": FORMAT, "version": VERSION, **self.__dict__}
        return json.loads(json.dumps(content, default=dict))

    def save(self, file: str | os.PathLike) -> Path:
        """Write the file whole or not at all, its folder too if need be."""
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = self.to_dict()
        content["checksum"] = _checksum(content)
        return write_whole(file, lambda stream: stream.write(json.dumps(content, indent=1).encode()))

    @classmethod
    def load(cls, file: str | os.PathLike, paths: Sequence[ScoringPath] | None = None) -> Profile:
        """Read a profile; with ``paths``, refuse it unless it was measured here, for these.

        ``ProfileError`` if the file cannot be read or is damaged; ``ProfileMismatchError`` says exactly
        what differs. A simulated profile, which people write by hand, needs no checksum, and is never
        taken for a measured one.
        """
        file = Path(file)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ProfileError(f"cannot read profile {file}: {error.strerror or error}") from error
        except ValueError as error:
            raise ProfileError(f"{file}: damaged, not JSON: {error}") from error
        profile = cls._from_dict(content, str(file))
        if paths is not None:
            profile.check(paths, str(file))
        return profile

    @classmethod
    def _from_dict(cls, content: Any, where: str) -> Profile:
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ProfileError(f"{where}: not a profile of mprec's (no format {FORMAT!r})")
        if content.get("version") != VERSION:
            raise ProfileError(
                f"{where}: profile version {content.get('version')!r}; this mprec reads version {VERSION}"
            )
        checksum = content.pop("checksum", None)
        if checksum != _checksum(content) and (checksum is not None or not content.get("simulated")):
            raise ProfileError(f"{where}: damaged: the checksum does not fit the content")
        known = set(cls.__dataclass_fields__)
        try:
            profile = cls(**{key: value for key, value in content.items() if key in known})
            for name, conditions in profile.cells.items():
                for condition in conditions:
                    for statistic in STATISTICS:
                        profile.curve(name, statistic, condition)
                        profile.curve(name, statistic, condition, same_share=True)
                    profile.share_effects(name, condition)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ProfileError(f"{where}: not a whole profile: {error}") from error
        return profile

    def check(self, paths: Sequence[ScoringPath], where: str = "profile") -> None:
        """``ProfileMismatchError`` unless this was measured on this machine, as it is now, for ``paths``."""
        measured = dict(self.fingerprint)
        shapes = measured.pop("paths", {})
        here = fingerprint()
        differences = {
            key: (measured.get(key), here.get(key))
            for key in sorted(measured.keys() | here.keys())
            if measured.get(key) != here.get(key)
        }
        for path in paths:
            if path.name not in self.cells:
                differences[f"path {path.name}"] = ("not measured", path.shape)
            elif shapes.get(path.name) != path.shape:
                differences[f"path {path.name}"] = (shapes.get(path.name), path.shape)
        if self.simulated:
            differences["simulated"] = (True, False)
        if differences:
            listed = "; ".join(f"{key}: {was!r}, here {now!r}" for key, (was, now) in differences.items())
            raise ProfileMismatchError(
                f"{where}: measured elsewhere or for other paths: {listed}", differences
            )

    @classmethod
    def load_or_measure(
        cls,
        paths: Sequence[ScoringPath],
        make_input: Callable[[int, np.random.Generator], Any],
        batch_sizes: Sequence[int] = BATCH_SIZES,
        *,
        file: str | os.PathLike | None = None,
        report: Callable[[str], object] = lambda message: None,
        **options: Any,
    ) -> Profile:
        """The profile in ``file`` (default: the user's cache folder) if it can be trusted, else a new one,
        saved there. ``report`` is told why a file that exists was not used, and if the cache folder cannot be
        written to; ``OSError`` if that is so of a ``file`` that was given.
        """
        given, file = file is not None, Path(file) if file is not None else default_file(paths)
        if file.exists():
            try:
                profile = cls.load(file, paths)
                have = {size for path in paths for size in profile.cells[path.name]["warm"]["batch_sizes"]}
                if lacking := sorted(set(batch_sizes) - have):
                    raise ProfileError(f"{file}: lacks batch sizes {lacking}")
                return profile
            except (ProfileError, KeyError) as error:
                report(f"{error}; measuring again")
        profile = cls.measure(paths, make_input, batch_sizes, **options)
        try:
            profile.save(file)
        except OSError as error:
            if given:
                raise
            report(f"the profile could not be kept: {error}")
        return profile


def default_file(paths: Sequence[ScoringPath]) -> Path:
    """Where this machine's profile of these paths belongs: a file of its own per fingerprint."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = {**fingerprint(), "paths": {path.name: path.shape for path in paths}}
    return cache / "mprec" / f"profile-{shape_digest(key)}.json"


def repeated_rows(make_input: Callable[[int, np.random.Generator], Any]):
    """Inputs of the same size in which every row of a smaller batch stands four times."""

    def draw(batch_size: int, rng: np.random.Generator) -> Any:
        small = make_input(-(-batch_size // _REPEATS), rng)
        return take(concatenate([small] * _REPEATS), slice(0, batch_size))

    return draw


def _describe(path: ScoringPath) -> dict[str, Any]:
    return {"representation": path.representation, "quality": path.quality, "shape": path.shape}


def _check_names(paths: Sequence[ScoringPath]) -> None:
    names = [path.name for path in paths]
    if not names:
        raise ValueError("paths: expected at least one, got none")
    if len(set(names)) != len(names):
        raise ValueError(f"paths: expected distinct names, got {names}")


def _thinned(batch_sizes: Sequence[int]) -> list[int]:
    """Every second batch size, the last among them."""
    return sorted(batch_sizes[::-2])


def _error(samples: Samples, held_out: Samples) -> dict[str, Any]:
    found = errors(median_curves(samples), held_out)
    return {
        "batch_sizes": sorted({size for _, size in found}),
        "median": float(np.median(list(found.values()))),
        "p95": float(np.quantile(list(found.values()), 0.95)),
    }


def _share(item: Any) -> float:
    return unique_share(item) if isinstance(item, Batch) else 1.0


def _sizes(name: str, samples: Samples) -> list[int]:
    return sorted(size for path, size in samples if path == name)


def _cell(name: str, samples: Samples, shares: Samples) -> dict[str, Any]:
    sizes = _sizes(name, samples)
    return {
        "batch_sizes": sizes,
        "calls": [len(samples[name, size]) for size in sizes],
        "unique_share": [float(np.mean(shares[name, size])) for size in sizes],
        **_statistics([samples[name, size] for size in sizes]),
    }


def _statistics(seconds: Sequence[Sequence[float]]) -> dict[str, list[float]]:
    """Of the calls at each batch size."""
    quantiles = {key: [float(np.quantile(v, q)) for v in seconds] for key, q in QUANTILES.items()}
    return {**quantiles, "mean": [_mean(values) for values in seconds]}


def _share_cell(name: str, measured: Mapping[str, tuple[Samples, Samples]]) -> dict[str, Any]:
    """What condition *warm* has of the share of unique IDs."""

    def calls(condition: str, size: int):
        return [values[name, size] for values in measured[condition]] if condition in measured else ((), ())

    effects, same = [], []
    for size in _sizes(name, measured["warm"][0]):
        seconds, shares = calls("warm", size)
        effects.append(ShareEffect.fit((seconds, shares), calls("repeated", size)))
        same.append(np.asarray(seconds) / effects[-1].factor(np.asarray(shares)))
    return {
        "share_highest": [effect.highest for effect in effects],
        "share_slope": [effect.slope for effect in effects],
        "share_least": [effect.least for effect in effects],
        "same_share": _statistics(same),
    }


def _mean(values: Sequence[float]) -> float:
    """Without the slowest twentieth, at least one of twenty."""
    return float(np.mean(np.sort(values)[: max(1, len(values) * 19 // 20)]))


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
