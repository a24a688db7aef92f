"""Devices that are not at hand, described by figures of their makers.

A description is a JSON file with the fields of :class:`Device` and, under ``sources``, where each figure
comes from: a citation, or the word *measured*, *derived* or *assumption*. Whatever is computed from a
description is simulated and has to say so.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

__all__ = ["KINDS", "Device", "device_names", "load_device"]

KINDS = ("cpu", "gpu", "tpu", "ipu")
_FOLDER = Path(__file__).parent / "descriptions"
_POSITIVE = ("memory_bytes", "memory_bandwidth", "cache_bytes", "cache_bandwidth")
_SHARES = ("compute_efficiency", "gather_efficiency")
_NOT_NEGATIVE = ("lookup_s", "launch_overhead_s", "call_overhead_s", "link_bandwidth", "link_latency_s")
_WORDS = ("name", "title", "kind")


@dataclass(frozen=True)
class Device:
    """One device as a roofline sees it. Rates are per second, sizes in bytes, times in seconds.

    Attributes:
        name: ``kind:model``, as ``mprec simulate --devices`` takes it.
        title: the same for people.
        kind: one of :data:`KINDS`.
        cores: cores or multiprocessors that one batch shares.
        peak_flops: floating-point operations per second, by precision.
        compute_efficiency: share of the peak that matrix products reach, in ``(0, 1]``.
        memory_bytes: what holds tables and weights.
        memory_bandwidth: streaming.
        gather_efficiency: share of the bandwidth that rows read at random reach, in ``(0, 1]``.
        lookup_s: what a row read at random costs beyond its bytes.
        cache_bytes: last-level cache, or memory on the chip.
        cache_bandwidth: of the same.
        launch_overhead_s: for each operator or kernel of a batch.
        call_overhead_s: for each batch.
        link_bandwidth: to the host, one way; 0 where inputs are read in place.
        link_latency_s: of one copy.
        sources: where each figure comes from, by field.

    ``ValueError`` names the field that is wrong, its value and the bound.
    """

    name: str
    title: str
    kind: str
    cores: int
    peak_flops: Mapping[str, float]
    compute_efficiency: float
    memory_bytes: float
    memory_bandwidth: float
    gather_efficiency: float
    lookup_s: float
    cache_bytes: float
    cache_bandwidth: float
    launch_overhead_s: float
    call_overhead_s: float
    link_bandwidth: float
    link_latency_s: float
    sources: Mapping[str, str]

    def __post_init__(self) -> None:
        for field in _WORDS:
            if not isinstance(value := getattr(self, field), str) or not value:
                raise ValueError(f"{field}: expected a non-empty text, got {value!r}")
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if isinstance(self.cores, bool) or not isinstance(self.cores, int) or self.cores < 1:
            raise ValueError(f"cores: expected a positive integer, got {self.cores!r}")
        if not isinstance(self.peak_flops, Mapping) or "float32" not in self.peak_flops:
            raise ValueError(
                f"peak_flops: expected a rate by precision, float32 among them, got {self.peak_flops!r}"
            )
        for precision, rate in self.peak_flops.items():
            _number(f"peak_flops.{precision}", rate, "above 0", lambda x: x > 0)
        for field in _POSITIVE:
            _number(field, getattr(self, field), "above 0", lambda x: x > 0)
        for field in _SHARES:
            _number(field, getattr(self, field), "in (0, 1]", lambda x: 0 < x <= 1)
        for field in _NOT_NEGATIVE:
            _number(field, getattr(self, field), "of at least 0", lambda x: x >= 0)
        if not self.link_bandwidth and self.link_latency_s:
            raise ValueError(
                f"link_latency_s: expected 0 where link_bandwidth is 0, got {self.link_latency_s!r}"
            )
        if not isinstance(self.sources, Mapping):
            raise ValueError(f"sources: expected a text by field, got {self.sources!r}")
        for field in ("cores", "peak_flops", *_POSITIVE, *_SHARES, *_NOT_NEGATIVE):
            if not isinstance(source := self.sources.get(field), str) or not source:
                raise ValueError(f"sources.{field}: expected where the figure comes from, got {source!r}")

    @property
    def simulated(self) -> bool:
        """True: a description is not a measurement."""
        return True

    def peak(self, precision: str) -> float:
        """Operations per second; ``ValueError`` if the device has no figure for ``precision``."""
        try:
            return self.peak_flops[precision]
        except KeyError:
            raise ValueError(
                f"precision: expected one of {', '.join(self.peak_flops)} on {self.name}, got {precision!r}"
            ) from None

    def bandwidth(self, nbytes: float) -> float:
        """Bytes per second at which a working set of so many bytes is streamed again and again."""
        return self.cache_bandwidth if nbytes <= self.cache_bytes else self.memory_bandwidth

    def with_(self, **changes: Any) -> Device:
        """The same device but for some figures, for studies of sensitivity; checked as ever."""
        return replace(self, **changes)


def device_names() -> list[str]:
    """Names of the devices whose descriptions are shipped."""
    return sorted(file.stem.replace("-", ":", 1) for file in _FOLDER.glob("*.json"))


def load_device(name: str | os.PathLike) -> Device:
    """A shipped device by its name (``gpu:v100``), or one described in a file (``*.json``).

    ``ValueError`` for an unknown name, a file that cannot be read, or a bad field, which it names.
    """
    text = os.fspath(name)
    shipped = not text.endswith(".json")
    if shipped and text not in device_names():
        raise ValueError(f"device: expected a .json file or one of {', '.join(device_names())}, got {text!r}")
    file = _FOLDER / f"{text.replace(':', '-')}.json" if shipped else Path(text)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read device {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file}: expected an object with the fields of a device, got {type(content).__name__}"
        )
    known = [field.name for field in fields(Device)]
    if missing := [field for field in known if field not in content]:
        raise ValueError(f"{file}: {missing[0]}: missing")
    if unknown := [field for field in content if field not in known]:
        raise ValueError(f"{file}: {unknown[0]}: unknown; expected {', '.join(known)}")
    try:
        return Device(**content)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _number(field: str, value: Any, bound: str, holds) -> None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not holds(value):
        raise ValueError(f"{field}: expected a finite number {bound}, got {value!r}")
