"""Latency over batch size of a model's shape on a described device. Not a measurement.

A batch goes through stages: embeddings, bottom MLP, interaction, top MLP. A stage takes its launches and the
longer of computing and moving bytes; the batch adds a fixed cost, and the copies to and from a device that is
not the host. Small matrix products that leave parts of a wide device idle, and copies that overlap with
computing, are left out: the first makes wide devices look fast at small batches, the second slow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from mprec import __version__
from mprec.dispatch import BATCH_SIZES, Profile
from mprec.dispatch.paths import shape_digest
from mprec.simulate.devices import Device
from mprec.simulate.shapes import ModelShape

__all__ = ["HASH_OPS", "Stage", "curve", "fits", "latency_s", "resident", "stages", "to_profile"]

HASH_OPS = 16  # vector operations of one hash, about; they run at the float32 rate


@dataclass(frozen=True)
class Stage:
    """What one step of a batch costs, in units that no device enters.

    ``flops`` (a multiply-add is two) and ``vector_ops`` per sample; ``weight_bytes`` per batch;
    ``activation_bytes`` per sample; ``lookups``: (rows per sample, bytes of their table) for each table;
    ``launches`` per batch.
    """

    name: str
    launches: int
    flops: float = 0.0
    vector_ops: float = 0.0
    weight_bytes: float = 0.0
    activation_bytes: float = 0.0
    lookups: tuple[tuple[float, int], ...] = ()


def stages(shape: ModelShape) -> list[Stage]:
    """The steps of a batch. Tables are one call for all features; decoders are a call for hashing with the
    first layer and one for the rest (mprec's kernels); a layer with its bias and activation is one call.
    """
    item, dim, pooling = shape.item_bytes, shape.dim, shape.pooling
    found = []
    if tables := shape.table_bytes():
        found.append(
            Stage(
                "tables",
                1,
                flops=len(tables) * pooling * dim,
                activation_bytes=len(tables) * dim * item,
                lookups=tuple((pooling, nbytes) for nbytes in tables),
            )
        )
    if decoders := [feature.dhe for feature in shape.features if feature.has_dhe]:
        widths = [decoder.widths(dim) for decoder in decoders]
        products = sum(a * b for layers in widths for a, b in itertools.pairwise(layers))
        found.append(
            Stage(
                "decoders",
                2,
                flops=2 * pooling * products,
                vector_ops=HASH_OPS * pooling * sum(decoder.k for decoder in decoders),
                weight_bytes=shape.decoder_bytes(),
                activation_bytes=item * (len(decoders) * dim + 2 * pooling * sum(w[1] for w in widths)),
            )
        )
    if shape.num_dense:
        found.append(_mlp("bottom", shape.bottom_widths, item))
    pairs = shape.vectors * (shape.vectors - 1) // 2
    read_and_written = item * (shape.vectors * dim + dim + pairs)
    found.append(Stage("interaction", 1, flops=2 * pairs * dim, activation_bytes=read_and_written))
    found.append(_mlp("top", shape.top_widths, item))
    return found


def _mlp(name: str, widths: Sequence[int], item: int) -> Stage:
    layers = list(itertools.pairwise(widths))
    return Stage(
        name,
        len(layers),
        flops=2 * sum(a * b for a, b in layers),
        weight_bytes=item * sum((a + 1) * b for a, b in layers),
        activation_bytes=item * sum(a + b for a, b in layers),
    )


def latency_s(shape: ModelShape, device: Device, batch_size: int | np.ndarray) -> np.ndarray:
    """Simulated seconds of batches of so many samples (a number or an array; float64 of its shape).

    ``ValueError`` if the device has no figure for the shape's precision.
    """
    batch = np.asarray(batch_size, dtype=np.float64)
    steps = stages(shape)
    matrix = device.peak(shape.precision) * device.compute_efficiency
    vector = device.peak("float32") * device.compute_efficiency
    weights = sum(stage.weight_bytes for stage in steps)
    cached = _cached_tables(shape, device, weights)
    seconds = np.full(batch.shape, device.call_overhead_s)
    for stage in steps:
        compute = batch * (stage.flops / matrix + stage.vector_ops / vector)
        written = batch * stage.activation_bytes
        fast = written <= device.cache_bytes
        moved = stage.weight_bytes / device.bandwidth(weights)
        moved = moved + written / np.where(fast, device.cache_bandwidth, device.memory_bandwidth)
        for rows, table_bytes in stage.lookups:
            bandwidth = device.cache_bandwidth if table_bytes <= cached else device.memory_bandwidth
            row_s = shape.row_bytes / (bandwidth * device.gather_efficiency) + device.lookup_s
            moved = moved + batch * rows * row_s
        seconds = seconds + stage.launches * device.launch_overhead_s + np.maximum(compute, moved)
    if device.link_bandwidth:
        copied = batch * (shape.input_bytes() + 4)  # a float32 score comes back
        seconds = seconds + 2 * device.link_latency_s + copied / device.link_bandwidth
    return seconds


def _cached_tables(shape: ModelShape, device: Device, weights: float) -> int:
    """Bytes of the largest table that stays in the cache: small tables first, in what weights leave."""
    free, largest = device.cache_bytes - weights, 0
    for nbytes in sorted(shape.table_bytes()):
        if nbytes > free:
            break
        free, largest = free - nbytes, nbytes
    return largest


def curve(shape: ModelShape, device: Device, max_batch: int = 2048) -> list[float]:
    """Simulated seconds of batches of 0 ... ``max_batch`` samples, as ``SimulatedPath`` takes them."""
    if max_batch < 1:
        raise ValueError(f"max_batch: expected at least 1, got {max_batch}")
    return latency_s(shape, device, np.arange(max_batch + 1)).tolist()


def fits(shape: ModelShape, device: Device) -> bool:
    """Whether all parameters are within the device's memory."""
    return shape.nbytes() <= device.memory_bytes


def resident(shapes: Mapping[str, ModelShape], device: Device) -> list[str]:
    """Names of the models that the device holds at once, in the order given: as many as fit, the smallest
    first. Models share no weights.
    """
    free, held = device.memory_bytes, set()
    for name in sorted(shapes, key=lambda name: shapes[name].nbytes()):
        if shapes[name].nbytes() <= free:
            free -= shapes[name].nbytes()
            held.add(name)
    return [name for name in shapes if name in held]


def to_profile(
    shapes: Mapping[str, ModelShape],
    quality: Mapping[str, float],
    device: Device,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    *,
    noise: float = 0.05,
) -> Profile:
    """A *simulated* profile of the models on a device, for a dispatcher, a planner or a report.

    ``noise``: deviation of the logarithm of a call's time, which makes the quantiles; the mean is the
    roofline's. ``KeyError`` for a model without a quality.
    """
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise: expected a finite number of at least 0, got {noise!r}")
    sizes = sorted(set(batch_sizes))
    if not sizes or sizes[0] < 1:
        raise ValueError(f"batch_sizes: expected at least one, all positive, got {list(batch_sizes)}")
    factors = {
        name: math.exp(noise * NormalDist().inv_cdf(q) - noise**2 / 2)
        for name, q in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
    }
    cells = {}
    for name, shape in shapes.items():
        mean = latency_s(shape, device, np.array(sizes))
        statistics = {key: (factor * mean).tolist() for key, factor in factors.items()}
        ones = [1.0] * len(sizes)
        cells[name] = {
            "warm": {
                "batch_sizes": sizes,
                "calls": [0] * len(sizes),
                "unique_share": ones,
                **statistics,
                "mean": mean.tolist(),
            }
        }
    digests = {name: shape_digest(shape.to_dict()) for name, shape in shapes.items()}
    return Profile(
        paths={
            name: {"representation": name, "quality": quality[name], "shape": digests[name]}
            for name in shapes
        },
        cells=cells,
        fingerprint={
            "cpu": device.title,
            "isa": device.kind,
            "threads": device.cores,
            "mprec": __version__,
            "paths": digests,
        },
        simulated=True,
        notes={"device": device.name, "sources": dict(device.sources), "noise": noise},
    )
