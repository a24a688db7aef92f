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
BUILD = ROOT / "build"


def run_command(command: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)


def checked(command: list) -> str:
    done = run_command(command)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def built_with_the_wheel() -> Path | None:
    """The folder in which an editable install left the test program beside the wheel's own objects, unless a
    source is newer (pip install -C cmake.define.MPREC_KERNEL_TEST=ON -e .).
    """
    sources = [ROOT / "CMakeLists.txt"]
    for folder in ("csrc", "tests/isa"):
        sources += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".cpp", ".h")]
    newest = max(path.stat().st_mtime for path in sources)
    programs = [path for path in BUILD.glob("cp*/kernel_test") if path.stat().st_mtime > newest]
    return max(programs, key=lambda path: path.stat().st_mtime).parent if programs else None


@pytest.fixture(scope="session")
def kernel_build() -> Path:
    """Build folder of the static kernel test: the install's, or one that is kept between runs."""
    if found := built_with_the_wheel():
        return found
    build = BUILD / "kernel_test"
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert cmake, "cmake is not installed: pip install mprec[test]"
    checked([cmake, "-S", ROOT, "-B", build, "-DMPREC_PYTHON=OFF", "-DMPREC_KERNEL_TEST=ON"])
    checked([cmake, "--build", build, "--parallel", "2"])
    return build


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
