"""The kernels' objects and test program, built once, and the emulator that runs it on other CPUs."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).with_name("emulator")
BUILD = ROOT / "build" / "kernel_test"


def run_command(command: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)


def checked(command: list) -> str:
    done = run_command(command)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def kernel_build() -> Path:
    """Build folder of the static kernel test. Kept between runs: only what changed is compiled again."""
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert cmake, "cmake is not installed: pip install mprec[test]"
    checked([cmake, "-S", ROOT, "-B", BUILD, "-DMPREC_PYTHON=OFF", "-DMPREC_KERNEL_TEST=ON"])
    checked([cmake, "--build", BUILD, "--parallel", "2"])
    return BUILD


@pytest.fixture(scope="session")
def emulate() -> Callable[..., subprocess.CompletedProcess]:
    """``emulate(cpu, program, *arguments)``; skips where Bochs is absent, fails if it must not be."""

    def run(cpu: str, *command, options=(), **keywords) -> subprocess.CompletedProcess:
        return run_command([sys.executable, EMULATOR, "--cpu", cpu, *options, *command], **keywords)

    check = run_command([sys.executable, EMULATOR, "--check"])
    if check.returncode != 0:
        reason = f"no emulated CPU (pip install mprec[test]): {check.stderr.strip()}"
        if os.environ.get("MPREC_REQUIRE_EMULATION") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return run
