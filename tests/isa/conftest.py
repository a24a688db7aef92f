"""The kernels' objects and test program, built once, and the emulator that runs it on other CPUs."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

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
    return build_kernel_test("kernel_test")


def build_kernel_test(name: str, *options: str) -> Path:
    build = BUILD / name
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert cmake, "cmake is not installed: pip install mprec[test]"
    checked([cmake, "-S", ROOT, "-B", build, "-DMPREC_PYTHON=OFF", "-DMPREC_KERNEL_TEST=ON", *options])
    checked([cmake, "--build", build, "--parallel", "2"])
    return build


def no_emulator(reason: str) -> NoReturn:
    """Skips the test, or fails it where emulation is required."""
    if os.environ.get("MPREC_REQUIRE_EMULATION") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def cross_build() -> Callable[[str], tuple[str, Path]]:
    """``cross_build(architecture)``: qemu for its programs, and the build folder of its kernel test."""

    def build(architecture: str) -> tuple[str, Path]:
        compiler, qemu = f"{architecture}-linux-gnu-g++", f"qemu-{architecture}"
        if os.environ.get("MPREC_CROSS_BUILD") != "1":
            pytest.skip("a build for another architecture takes minutes: set MPREC_CROSS_BUILD=1")
        missing = [command for command in (compiler, qemu) if not shutil.which(command)]
        packages = f"g++-{architecture}-linux-gnu qemu-user"
        assert not missing, f"no {' and no '.join(missing)} (Debian: apt install {packages})"
        return qemu, build_kernel_test(f"kernel_test-{architecture}", f"-DCMAKE_CXX_COMPILER={compiler}")

    return build


@pytest.fixture(scope="session")
def emulate() -> Callable[..., subprocess.CompletedProcess]:
    """``emulate(cpu, program, *arguments)``; skips where Bochs is absent, fails if it must not be."""

    def run(cpu: str, *command, options=(), **keywords) -> subprocess.CompletedProcess:
        return run_command([sys.executable, EMULATOR, "--cpu", cpu, *options, *command], **keywords)

    check = run_command([sys.executable, EMULATOR, "--check"])
    if check.returncode != 0:
        no_emulator(f"no emulated CPU (pip install mprec[test]): {check.stderr.strip()}")
    return run
