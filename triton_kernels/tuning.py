"""Which tile sizes a kernel gets: an estimate of registers and shared memory, and the choice by shape.

Weights are loaded by pointers (cp.async). Tensor descriptors (TMA), compiled for sm_90 with the same tiles,
gave the hot loop 13.2 issue slots per hash of a short ID as before (long IDs 17.5 instead of 21.1), float32
1 to 8 % more, spills inside the hot loop of the widest tile, and need a workspace for each launch.
"""

import contextlib
from typing import NamedTuple

import torch


class Config(NamedTuple):
    """Tile sizes of a DHE kernel: BM IDs x BN outputs, BK hashes a step, STAGES weight tiles in flight."""

    BM: int
    BN: int
    BK: int
    STAGES: int
    warps: int


class _Budget(NamedTuple):
    """What compiles without spills: float32 accumulators a thread (by bytes per weight), shared memory, BK.

    The rest of the 255 registers holds hashes and addresses; tf32x3 also holds both halves of its operands,
    and sm_90's float8 holds each product before it is added to the others (`dense.multiply_add`).
    """

    accumulators: dict[int, int]
    shared: int
    depth_bytes: int


_BUDGETS = {
    "sm_80": _Budget({1: 72, 2: 72, 4: 40}, 160 * 1024, 64),
    "sm_90": _Budget({1: 80, 2: 144, 4: 80}, 224 * 1024, 128),
    "sm_100": _Budget({1: 96, 2: 144, 4: 80}, 224 * 1024, 128),
    "gfx942": _Budget({2: 128, 4: 80}, 64 * 1024, 128),
}


_MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}

_pretended: list[str] = []


@contextlib.contextmanager
def pretend(target: str):
    """Inside, tile sizes are those for `target`, whatever device tensors are on."""
    _pretended.append(target)
    try:
        yield
    finally:
        _pretended.pop()


def pretending() -> bool:
    """Whether a `pretend` is in force."""
    return bool(_pretended)


def target_of(device: torch.device) -> str:
    """The tuning target nearest to a device: "sm_80", "sm_90", "sm_100" or "gfx942"."""
    if _pretended:
        return _pretended[-1]
    if device.type != "cuda":
        return "sm_90"  # the interpreter
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


def multiprocessors(device: torch.device) -> int:
    """How many of them the device has; of a device that is only pretended, how many its kind has."""
    if _pretended:
        return _MULTIPROCESSORS[_pretended[-1]]
    return torch.cuda.get_device_properties(device).multi_processor_count


def tile_width(columns: int) -> int:
    """The power of two >= columns, at least 16 (the matrix unit's smallest tile)."""
    return max(16, 1 << (columns - 1).bit_length())


def accumulators_per_thread(config: Config, second_width: int = 0) -> int:
    """float32 accumulators that each thread holds: the [BM, BN] tile and, when fused, [BM, second_width]."""
    return config.BM * (config.BN + second_width) // (32 * config.warps)


def shared_bytes(config: Config, dtype: torch.dtype, second_width: int = 0, third_width: int = 0) -> int:
    """Shared memory that the weight tiles need: the pipeline of the first layer, and the later layers'."""
    pipeline = config.STAGES * config.BN * config.BK
    later = max(config.BN * second_width, second_width * third_width)
    return (pipeline + later) * dtype.itemsize


def _rows(count: int) -> int:
    # Few IDs: small tiles, so that more than a handful of multiprocessors have work.
    return 16 if count <= 256 else 64 if count <= 4096 else 128


def _candidates(target: str, count: int, widths: list[int], k: int, dtype: torch.dtype, fused: bool,
                hashed: bool):  # fmt: skip
    """Configs within the budget, widest tile first: fewer tiles across means fewer times the same hash."""
    rows = _rows(count)
    # below 64 rows there is no wgmma, and a thread holds what sm_80's instructions need
    budget = _BUDGETS["sm_80" if rows < 64 and target != "gfx942" else target]
    depth = min(budget.depth_bytes // dtype.itemsize, tile_width(k))
    second, third = (*(tile_width(width) for width in widths[1:]), 0, 0)[:2] if fused else (0, 0)
    # mma.sync splits a wide tile's columns over warps, and each would hash for itself; a tall one's rows
    many = target == "sm_80" and hashed and count > 4096 and dtype.itemsize == 2
    if many and widths[0] > 32 and max(second, third) <= 16:
        yield Config(256, 64, 16, 3, 4)
    # few rows: the widest tile would leave multiprocessors idle, and spills on sm_90
    for columns in (256, 128, 64, 32, 16)[rows < 128 :]:
        config = Config(rows, columns, depth, 3, rows // 16)
        if (
            columns <= tile_width(widths[0])
            and accumulators_per_thread(config, max(second, third)) <= budget.accumulators[dtype.itemsize]
            and shared_bytes(config, dtype, second, third) <= budget.shared
        ):
            yield config


def split_layers(count: int) -> list[list[int]]:
    """The ways to cut `count` layers into launches of one to three."""
    if count == 0:
        return [[]]
    return [[n, *rest] for n in (3, 2, 1) if n <= count for rest in split_layers(count - n)]


def alternatives(
    target: str, count: int, k: int, widths: list[int], dtype: torch.dtype, hashed: bool
) -> list[Config]:
    """What an autotuner may time for a launch of these layers; what cannot fit is left out uncompiled."""
    found = list(_candidates(target, count, widths, k, dtype, len(widths) > 1, hashed))[:3]
    deeper = [config._replace(STAGES=stages) for config in found[:1] for stages in (2, 4)]
    flatter = [config._replace(BM=64, warps=4) for config in found[:1] if config.BM == 128]
    budget = _BUDGETS[target]
    second, third = (*(tile_width(width) for width in widths[1:]), 0, 0)[:2]
    return [
        config
        for config in dict.fromkeys([*found, *deeper, *flatter])
        if shared_bytes(config, dtype, second, third) <= budget.shared
    ]


def layer_config(
    target: str, count: int, k: int, width: int, dtype: torch.dtype, hashed: bool = True
) -> Config:
    """For one layer alone: count rows of k hashes or inputs, `width` outputs."""
    configs = list(_candidates(target, count, [width], k, dtype, False, hashed))
    if count <= 256:  # latency: narrow tiles spread the weights over the multiprocessors
        configs = [config for config in configs if config.BN <= 32]
    return configs[0]


def fused_config(
    target: str, count: int, k: int, widths: list[int], dtype: torch.dtype, hashed: bool = True
) -> Config | None:
    """For two or three layers in one kernel, or None where they do not fit registers and shared memory.

    None also where the first layer would be cut in tiles narrower than 128 (64 for float32): the hashes,
    computed again for each tile, would cost more than writing the hidden layer to memory and reading it.
    """
    if not 2 <= len(widths) <= 3:
        return None
    narrowest = min(64 if dtype.itemsize == 4 else 128, tile_width(widths[0]))
    for config in _candidates(target, count, widths, k, dtype, True, hashed):
        if narrowest <= config.BN or config.BM == 256:
            return config
    return None
