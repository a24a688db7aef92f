"""What the compiled kernels may hold: no instruction beyond their ISA, and no function that the linker could
merge with another ISA's."""

import platform
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import checked

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86-64 code")

ISAS = ("avx2", "avx512", "avx512vnni", "avx512bf16", "amx")


def objects(build: Path, isa: str = "avx512") -> dict[str, Path]:
    found = {path.name: path for path in build.glob("CMakeFiles/mprec_kernels.dir/**/*.cpp.o")}
    assert any(isa in name for name in found), "no objects"
    return found


def isa_of(name: str, isas: tuple[str, ...] = ISAS) -> str:
    suffix = name.removesuffix(".cpp.o").rpartition("_")[2]
    return suffix if suffix in isas else "baseline"


_PREFIXES = {"26", "2e", "36", "3e", "64", "65", "66", "67", "f0", "f2", "f3"}
# Not tzcnt: compilers emit it where an old CPU's bsf, which shares its encoding, does as well.
_SCALAR_EXTENSIONS = {"lzcnt", "popcnt", "movbe", "crc32"}


def instructions(path: Path) -> Iterator[tuple[str, str]]:
    """(encoding, text) of each: the byte after the prefixes tells VEX and EVEX from all others."""
    for line in checked(["objdump", "-d", "--insn-width=16", path]).splitlines():
        if match := re.match(r"\s+[0-9a-f]+:\t((?:[0-9a-f]{2} )+)\s*\t(.*)", line):
            first = next((b for b in match[1].split() if b not in _PREFIXES), "")
            encoding = {"c4": "VEX", "c5": "VEX", "62": "EVEX"}.get(first, "legacy")
            text = match[2].strip()
            if encoding == "legacy" and text.split()[0] in _SCALAR_EXTENSIONS:
                encoding = "scalar extension"
            yield encoding, text


ALLOWED = {"baseline": {"legacy"}, "avx2": {"legacy", "scalar extension", "VEX"}}


def test_instructions_stay_within_the_isa(kernel_build):
    seen = {}
    for name, path in objects(kernel_build).items():
        isa = isa_of(name)
        for encoding, text in instructions(path):
            seen[isa, encoding] = True
            assert isa not in ALLOWED or encoding in ALLOWED[isa], f"{name}: {encoding} instruction {text}"
    assert seen["baseline", "legacy"]
    assert seen["avx2", "VEX"]
    assert seen["avx512", "EVEX"], "the disassembly was misread"


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_kernels_use_whole_registers(kernel_build, isa):
    register = {"avx2": "%ymm", "avx512": "%zmm"}[isa]
    for name, path in objects(kernel_build).items():
        if isa_of(name) == isa:
            assert any(register in text for _, text in instructions(path)), name


def check_symbols(path: Path, isa: str, nm: str = "nm") -> int:
    """A weak symbol (an inline function, a template) of an ISA's object must be named after the ISA: else the
    linker may keep this copy for callers that run on any CPU. The number of symbols."""
    lines = checked([nm, "-C", "--defined-only", path]).splitlines()
    for line in lines:
        _, kind, symbol = line.split(maxsplit=2)
        if kind in "WVu" and not symbol.startswith("DW.ref."):
            assert f"mprec::{isa}::" in symbol, f"{path.name} defines {symbol}"
    return len(lines)


def test_no_function_of_an_isa_can_stand_in_for_another(kernel_build):
    found = {path: isa_of(name) for name, path in objects(kernel_build).items()}
    assert sum(check_symbols(path, isa) for path, isa in found.items() if isa != "baseline")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # compiles all kernels
@pytest.mark.parametrize(
    ("architecture", "isa", "register"), [("aarch64", "sve256", r"\bz\d+\.[bhsd]\b|\bp\d+(/[mz]|\.[bhsd])")]
)
def test_code_of_another_architecture(cross_build, architecture, isa, register):
    """An ISA's registers occur in its own objects, all of them, and in no others."""
    _, build = cross_build(architecture)
    for name, path in objects(build, isa).items():
        code = checked([f"{architecture}-linux-gnu-objdump", "-d", "--no-show-raw-insn", path])
        its_own = isa_of(name, (isa,)) == isa
        assert bool(re.search(register, code)) == its_own, name
        assert not its_own or check_symbols(path, isa, f"{architecture}-linux-gnu-nm")
