"""The wheel's kernels against their formulas in float64: on this CPU, and on emulated ones."""

import re
import subprocess

import pytest
from conftest import run_command

# Model: the best ISA that it can run. The emulator has no AMX: that is run on a CPU that has it.
MODELS = {"spr": "avx512bf16", "icl": "avx512vnni", "skx": "avx512", "hsw": "avx2"}
OF_NO_ISA = 5  # cases: of dispatch, and of the helpers' pool
FAMILIES = ("embedding_bag", "gradient", "dhe", "cached dhe", "dense")


def report(done: subprocess.CompletedProcess) -> int:
    """Number of cases that passed; fails with the program's report unless all did."""
    text = f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, text
    passed, failed = map(int, re.search(r"^(\d+) passed, (\d+) failed$", done.stdout, re.M).groups())
    assert passed > 0, text
    assert failed == 0, text
    return passed


@pytest.mark.parametrize("threads", [1, 3])
def test_on_this_cpu(kernel_build, threads):
    assert report(run_command([kernel_build / "kernel_test", "--threads", str(threads)])) > 10


@pytest.mark.parametrize(
    "cpu", ["skx", *(pytest.param(cpu, marks=pytest.mark.slow) for cpu in ("spr", "icl", "hsw"))]
)
def test_on_emulated_cpu(kernel_build, emulate, cpu):
    done = emulate(cpu, kernel_build / "kernel_test", MODELS[cpu])
    assert report(done) > 10
    for family in FAMILIES:
        assert f"{MODELS[cpu]} {family}" in done.stdout


# CPUs of qemu's user mode, which runs threads, the ISAs that they can run, and those of them that are tested.
# Vectors of SVE are as long as the CPU's, or as those that programs are given there, in bytes, if shorter.
@pytest.mark.slow
@pytest.mark.timeout(1800)  # compiles all kernels
@pytest.mark.parametrize(
    ("architecture", "cpu", "runnable", "tested"),
    [
        ("aarch64", "cortex-a72", ("scalar", "neon"), ("scalar", "neon")),
        ("aarch64", "max,sve-default-vector-length=32", ("scalar", "neon", "sve256"), ("sve256",)),
    ],
)
def test_on_another_architecture(cross_build, architecture, cpu, runnable, tested):
    qemu, build = cross_build(architecture)
    for threads in ("1", "3"):
        done = run_command([qemu, "-cpu", cpu, build / "kernel_test", "--threads", threads, *tested])
        assert report(done) > 10
        heading = rf"^# {architecture} CPU, .*: {' '.join(runnable)}; {threads} thread"
        assert re.search(heading, done.stdout, re.M), done.stdout
        for isa in tested:
            for family in FAMILIES:
                assert f"{isa} {family}" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("architecture", "cpu", "isa"),
    [
        ("aarch64", "max,sve=off", "sve256"),
        ("aarch64", "max,sve-default-vector-length=16", "sve256"),
        ("aarch64", "max,sve-default-vector-length=64", "sve256"),
        ("aarch64", "a64fx,sve-default-vector-length=32", "sve256"),  # has no products of bfloat16 numbers
    ],
)
def test_an_isa_of_another_architecture_is_not_reached_without_it(cross_build, architecture, cpu, isa):
    qemu, build = cross_build(architecture)
    done = run_command([qemu, "-cpu", cpu, build / "kernel_test", isa])
    assert report(done) == OF_NO_ISA
    assert f"{isa}: this CPU cannot run it" in done.stdout


@pytest.mark.parametrize(
    ("cpu", "isa"),
    [("hsw", "avx512"), ("hsw", "avx512vnni"), ("skx", "avx512vnni"), ("icl", "avx512bf16"), ("spr", "amx")],
)
def test_an_isa_is_not_reached_without_it(kernel_build, emulate, cpu, isa):
    done = emulate(cpu, kernel_build / "kernel_test", isa)
    assert report(done) == OF_NO_ISA
    assert f"{isa}: this CPU cannot run it" in done.stdout


def test_avx512_is_not_reached_where_the_kernel_does_not_save_its_registers(kernel_build, emulate):
    done = emulate("skx", kernel_build / "kernel_test", "avx512", options=["--xcr0", "0x7"])
    assert report(done) == OF_NO_ISA
    assert "avx512: this CPU cannot run it" in done.stdout
