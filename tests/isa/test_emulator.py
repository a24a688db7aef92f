"""The emulator itself: right results, and the right signal for what a CPU or a kernel refuses."""

import subprocess
from pathlib import Path

import pytest
from conftest import EMULATOR, checked


@pytest.fixture(scope="module")
def probe(tmp_path_factory) -> Path:
    program = tmp_path_factory.mktemp("probe") / "probe"
    source = EMULATOR / "probe.cpp"
    checked(["g++", "-O1", "-fopenmp", "-static", f"-I{EMULATOR.parent}", "-o", program, source])
    return program


SIGILL, SIGABRT, SIGFPE, SIGSEGV = 132, 134, 136, 139


@pytest.mark.parametrize(
    ("cpu", "action", "status"),
    [
        ("spr", "avx512", 0),
        ("icl", "avx512", 0),
        ("skx", "avx512", 0),
        ("hsw", "avx512", SIGILL),
        ("skx", "over-read", SIGSEGV),
        ("hsw", "under-read", SIGSEGV),
        ("hsw", "use-after-unmap", SIGSEGV),
        ("hsw", "write-to-code", SIGSEGV),
        ("hsw", "protection", 0),
        ("hsw", "divide", SIGFPE),
        ("hsw", "abort", SIGABRT),
        ("hsw", "exit-7", 7),
        ("hsw", "throw", 0),
        ("hsw", "threads", 1),
    ],
)
def test_ends_as_on_the_real_machine(emulate, probe, cpu, action, status):
    done = emulate(cpu, probe, action)
    assert done.returncode == status, done.stderr


def test_kernel_without_avx512_state(emulate, probe):
    done = emulate("skx", probe, "avx512", options=["--xcr0", "0x7"])
    assert done.returncode == SIGILL


def test_standard_streams_and_arguments(emulate, probe):
    done = emulate("hsw", probe, "echo", "word", input="a line\n")
    assert (done.returncode, done.stdout) == (0, "a line\nword")


def test_refuses_what_it_cannot_run(emulate, tmp_path):
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    done = emulate("hsw", script)
    assert done.returncode == 125
    assert "not an x86-64 ELF" in done.stderr
    dynamic = tmp_path / "dynamic"
    subprocess.run(["g++", "-x", "c++", "-", "-o", dynamic], input=b"int main() {}", check=True)
    done = emulate("hsw", dynamic)
    assert done.returncode == 125
    assert "-static" in done.stderr
