"""Loads bochscpu-python with the CPU model of our choice: ``load(model)`` returns the ``bochscpu`` package.

The wheel offers neither a choice of model nor a build for glibc older than 2.38; ``shim.c`` supplies both.
A process can load it once.
"""

import ctypes
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Model:
    """A CPU: the factory of its CPUID inside Bochs, and the register state (XCR0) that its kernel enables."""

    factory: str
    xcr0: int


_AVX_STATE = 0x7  # x87, SSE, AVX
_AVX512_STATE = _AVX_STATE | 0xE0  # and masks, upper halves, the upper 16 registers
_TILE_STATE = 0x60000

MODELS = {
    "hsw": Model("_Z32create_corei7_haswell_4770_cpuidP8BX_CPU_C", _AVX_STATE),
    "skx": Model("_Z29create_corei7_skylake_x_cpuidP8BX_CPU_C", _AVX512_STATE),
    "icl": Model("_Z29create_corei7_icelake_u_cpuidP8BX_CPU_C", _AVX512_STATE),
    "spr": Model("_Z28create_sapphire_rapids_cpuidP8BX_CPU_C", _AVX512_STATE | _TILE_STATE),
}


def load(model: Model) -> ModuleType:
    """``ImportError`` if bochscpu-python is absent or broken; ``OSError`` if the shim does not build."""
    os.environ["BOCHS_CPU_FACTORY"] = model.factory
    with tempfile.TemporaryDirectory() as folder:
        shim = Path(folder, "shim.so")
        source = Path(__file__).with_name("shim.c")
        try:
            subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, source, "-ldl"], check=True)
        except subprocess.CalledProcessError as error:
            raise OSError(f"cc could not build {source}") from error
        ctypes.CDLL(str(shim), mode=ctypes.RTLD_GLOBAL)
    flags = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_NOW | os.RTLD_GLOBAL)
    try:
        import bochscpu
        import bochscpu.cpu
        import bochscpu.memory
    finally:
        sys.setdlopenflags(flags)
    return bochscpu
