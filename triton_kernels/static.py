"""Compiles kernels for a GPU that is not there; reads from ptxas and machine code what they will cost.

This ranks and rejects; it proves nothing about speed. The disassembler and ptxas are those inside Triton's
own wheel.
"""

import collections
import contextlib
import dataclasses
import math
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.jit import JITFunction

from . import tuning

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

_MMA = ("HMMA", "HGMMA", "QGMMA", "IMMA", "IGMMA", "DMMA", "UTCHMMA", "UTCQMMA", "OMMA")


@dataclasses.dataclass
class Report:
    """What one compiled kernel is made of. Spills in bytes; `loops` innermost (shortest) first."""

    target: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    warps: int
    warnings: list[str]
    opcodes: collections.Counter
    loops: list[collections.Counter]
    sass: str = dataclasses.field(repr=False, default="")

    def count(self, *prefixes: str, loop: collections.Counter | None = None) -> int:
        """Instructions whose mnemonic (before the first dot) is one of `prefixes`."""
        counts = self.opcodes if loop is None else loop
        return sum(number for op, number in counts.items() if op.split(".")[0] in prefixes)

    @property
    def mma(self) -> str:
        """The matrix instruction in use, e.g. "HGMMA.64x128x16.F32.BF16"; "" if none."""
        found = [op for op in self.opcodes if op.split(".")[0] in _MMA]
        return max(found, key=lambda op: self.opcodes[op], default="")

    def hot_loops(self) -> list[collections.Counter]:
        """The innermost loops that hold matrix instructions."""
        return [loop for loop in self.loops if self.count(*_MMA, loop=loop)]


class _AbsentDevice(DriverBase):
    """A driver that names its target and can do nothing else."""

    def __init__(self, target: str):
        self._target = TARGETS[target]
        # a kernel's compiled forms are kept by device number: one of its own for each target
        self._number = 1000 + list(TARGETS).index(target)

    @classmethod
    def is_active(cls):
        return False

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return self._target

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_device(self):
        return self._number

    def get_current_stream(self, device):
        return 0

    def get_benchmarker(self):
        raise RuntimeError("nothing can be timed on an absent device")


class Launch(NamedTuple):
    """A kernel as one launch compiled it, with the launch's compile-time arguments."""

    kernel: str
    compiled: triton.compiler.CompiledKernel
    constants: dict


@contextlib.contextmanager
def absent_device(target: str):
    """Inside, Triton compiles for `target`, and tile sizes are those for it."""
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(_AbsentDevice(target))
    try:
        with tuning.pretend(target):
            yield
    finally:
        triton.runtime.driver._active = active


@contextlib.contextmanager
def recorded(target: str):
    """Inside, launches with CPU tensors compile for `target` and do not run; yields the list of `Launch`es.

    What is compiled is what would be launched: the same specialisation, and the tile sizes that
    `tuning` chooses for `target`.
    """
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, enable_fp_fusion=True, **options)
        bound = dict(zip(self.arg_names, args, strict=False)) | options
        kept = {name: value for name, value in bound.items() if isinstance(value, int | str | tl.dtype)}
        constants = {name: str(v) if isinstance(v, tl.dtype) else v for name, v in kept.items()}
        launches.append(Launch(self.__name__, compiled, constants))
        return compiled

    JITFunction.run = compile_only
    try:
        with absent_device(target):
            yield launches
    finally:
        JITFunction.run = run


def inspect(compiled, target: str) -> Report:
    """Read registers, spills and warnings from ptxas, and instructions from the disassembler."""
    arch = target.removeprefix("sm_") + ("a" if target in ("sm_90", "sm_100") else "")
    ptxas = get_ptxas(compiled.metadata.target.arch).path
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(compiled.asm["ptx"])
        command = [ptxas, "-v", "--regAllocOptLevel=2", f"--gpu-name=sm_{arch}", ptx, "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"ptxas: {done.stderr or done.stdout}")
        log = done.stderr
        sass = subprocess.run(
            [triton.knobs.nvidia.nvdisasm.path, "-c", cubin], capture_output=True, text=True, check=True
        ).stdout
    stack, stores, loads = map(
        int,
        re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
        ).groups(),
    )
    rows = list(_instructions(sass))
    return Report(
        target=target,
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spill_stores=stores,
        spill_loads=loads,
        stack=stack,
        shared=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        warnings=re.findall(r"\(C\d+\)[^\n]*", log),
        opcodes=collections.Counter(op for _, op, _ in rows),
        loops=_loops(sass, rows),
        sass=sass,
    )


def _instructions(sass: str):
    """(address, mnemonic, text) of each instruction."""
    for line in sass.splitlines():
        if found := re.match(r"\s*/\*([0-9a-f]+)\*/\s+(.*?);", line):
            text = found[2].strip().lstrip("{ ")
            if op := re.match(r"(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", text):
                yield int(found[1], 16), op[1], text


def _loops(sass: str, rows) -> list[collections.Counter]:
    """The instructions between each backward branch and its target."""
    labels, waiting = {}, []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            waiting.append(label[1])
        elif address := re.match(r"\s*/\*([0-9a-f]+)\*/", line):
            labels.update(dict.fromkeys(waiting, int(address[1], 16)))
            waiting = []
    spans = []
    for address, op, text in rows:
        target = re.search(r"`\((\.L_\w+)\)", text)
        # a branch to itself is the padding behind the last instruction
        if op.startswith("BRA") and target and labels.get(target[1], address) < address:
            spans.append((labels[target[1]], address))
    spans.sort(key=lambda span: span[1] - span[0])
    return [collections.Counter(op for at, op, _ in rows if first <= at <= last) for first, last in spans]


def useful_mma_ratio(report: Report, constants: dict) -> float | None:
    """Multiply-adds issued per useful one in the hot loop of a DHE kernel (1.0: none wasted), if known."""
    loops = report.hot_loops()
    if not loops or "BK" not in constants:
        return None
    issued = 0
    for op, number in loops[0].items():
        if warpgroup := re.match(r"[HQ]GMMA\.(\d+)x(\d+)x(\d+)", op):
            issued += number * _product_of(warpgroup) * report.warps // 4
        elif warp := re.match(r"HMMA\.(16)(8)(\d+)", op):
            issued += number * _product_of(warp) * report.warps
    if not issued:
        return None  # tcgen05 names its shape in a descriptor, not in the instruction
    products = 3 if constants["PRECISION"] == "tf32x3" and "TF32" in report.mma else 1
    tile = products * constants.get("BM", constants.get("BI")) * constants["BN"]
    if issued > 1.5 * tile * constants["BK"]:  # the loop over k was unrolled: all of it, and the next layer
        return issued / (tile * (constants["K"] + constants.get("BH2", 0)))
    return issued / (tile * constants["BK"])


def _product_of(match: re.Match) -> int:
    m, n, k = map(int, match.groups())
    return m * n * k


def issue_slots_per_hash(report: Report, constants: dict) -> list[float]:
    """Instructions that warps issue in each hot loop that hashes, per hash: short IDs first, then long."""
    threads = report.warps * 32
    hashes = constants.get("BM", constants.get("BI")) * constants["BK"]
    return [round(sum(loop.values()) * threads / hashes, 1) for loop in report.hot_loops()[:2]]


def row_load_ratio(compiled) -> float:
    """Bytes asked for per byte of a row tile, over the loads of two-dimensional tiles (1.0: each once)."""
    text, worst = compiled.asm["ttgir"], 1.0
    layouts = dict(re.findall(r"(#\w+) = #ttg.blocked<\{(.*?)\}>", text))
    for rows, columns, layout in re.findall(r"tt\.load .*?tensor<(\d+)x(\d+)x!tt\.ptr<\w+>, (#\w+)>", text):
        if layout in layouts:
            sizes = [list(map(int, s.split(","))) for s in re.findall(r"\[([\d, ]+)\]", layouts[layout])[:3]]
            covered = [math.prod(size[axis] for size in sizes) for axis in (0, 1)]
            worst = max(worst, max(covered[0] / int(rows), 1) * max(covered[1] / int(columns), 1))
    return worst


def describe(launch: Launch, target: str) -> dict:
    """The facts of one launch, as `benchmarks/results/gpu_static.json` keeps them."""
    c = launch.constants
    tile = {name: c[name] for name in ("BM", "BN", "BK", "BI", "STAGES", "BB", "LANES", "BL") if name in c}
    warps = launch.compiled.metadata.num_warps
    facts = {"kernel": launch.kernel, "target": target, "dtype": c.get("DTYPE", ""), "tile": tile}
    facts["warps"] = warps
    if target.startswith("gfx"):
        text = launch.compiled.asm["amdgcn"]
        names = ("vgpr_count", "vgpr_spill_count")
        found = {name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in names}
        mma = re.search(r"v_mfma\w+", text)
        return facts | {
            "registers": found["vgpr_count"],
            "spill_bytes": 4 * found["vgpr_spill_count"],
            "shared": launch.compiled.metadata.shared,
            "mma": mma[0] if mma else "",
        }
    report = inspect(launch.compiled, target)
    facts |= {
        "registers": report.registers,
        "spill_bytes": report.spill_stores + report.spill_loads,
        "spills_in_hot_loop": sum(report.count("LDL", "STL", loop=loop) for loop in report.hot_loops()[:2]),
        "shared": report.shared,
        "warnings": report.warnings,
        "mma": report.mma,
    }
    if report.mma and "BK" in c:
        ratio = useful_mma_ratio(report, c)
        facts["mma_per_useful"] = None if ratio is None else round(ratio, 3)
        # tcgen05 is issued by one thread, in loops of its own: which one hashes cannot be told
        if c.get("HASHED", "BI" in c) and not report.mma.startswith("UTC"):
            facts["slots_per_hash"] = issue_slots_per_hash(report, c)
    elif not report.mma:
        facts["row_load_ratio"] = round(row_load_ratio(launch.compiled), 3)
    return facts
