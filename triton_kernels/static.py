"""Compiles kernels for a GPU that is not there; reads from ptxas and machine code what they will cost.

This ranks and rejects; it proves nothing about speed. The disassembler and ptxas are those inside Triton's
own wheel.
"""

import collections
import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
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


def compile_kernel(kernel, types: dict, constants: dict, target: str, aligned=(), **options):
    """Compile `kernel` for `target` with argument `types` ({name: "*bf16" | "i32" | "tensordesc<...>"}).

    `constants` are the constexpr arguments; `aligned` names the arguments that are multiples of 16.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options={"enable_fp_fusion": True, **options})


def inspect(compiled, target: str) -> Report:
    """Read registers, spills and warnings from ptxas, and instructions from the disassembler."""
    arch = target.removeprefix("sm_")
    suffix = "a" if int(arch) >= 90 else ""
    ptxas = TOOLS / ("ptxas-blackwell" if int(arch) >= 90 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        ptx.write_text(compiled.asm["ptx"])
        command = [ptxas, "-v", f"--gpu-name={target}{suffix}", ptx, "-o", cubin]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        sass = subprocess.run(
            [TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True
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
