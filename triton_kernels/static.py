"""Compiles kernels for a GPU that is not there; reads from ptxas and machine code what they will cost.

This ranks and rejects; it proves nothing about speed. The disassembler and ptxas are those inside Triton's
own wheel.
"""

import collections
import contextlib
import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
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
def recorded(target: str):
    """Inside, launches with CPU tensors compile for `target` and do not run; yields the list of `Launch`es.

    What is compiled is what would be launched: the same specialisation, and the tile sizes that
    `tuning` chooses for `target`.
    """
    launches: list[Launch] = []
    active, run = triton.runtime.driver._active, JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, enable_fp_fusion=True, **options)
        bound = dict(zip(self.arg_names, args, strict=False)) | options
        constants = {name: value for name, value in bound.items() if isinstance(value, int | str)}
        launches.append(Launch(self.__name__, compiled, constants))
        return compiled

    triton.runtime.driver.set_active(_AbsentDevice(target))
    JITFunction.run = compile_only
    try:
        with tuning.pretend(target):
            yield launches
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = active


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
