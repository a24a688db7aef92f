"""The measured limits of one core: fused multiply-add peak, read bandwidth, a hand-written row gather.

``python benchmarks/ceilings.py`` prints them.
"""

import ctypes
import functools
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import torch


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("ceilings: a C++ compiler (g++) is needed to measure this machine's limits")
    target = Path(tempfile.mkdtemp(prefix="mprec-ceilings-")) / "ceilings.so"
    source = Path(__file__).with_name("ceilings.cpp")
    flags = ["-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=fast", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-Wno-psabi", str(source), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.fma_flops.restype = ctypes.c_double
    library.fma_flops.argtypes = [ctypes.c_long, ctypes.c_void_p]
    library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    return library


@functools.cache
def _flops_per_iteration() -> float:
    sink = torch.zeros(16)
    return _library().fma_flops(1, sink.data_ptr())


def multiply_add(flops: float) -> None:
    """About `flops` float32 operations at full speed, in registers: a peer to interleave with."""
    sink = torch.zeros(16)
    _library().fma_flops(max(1, round(flops / _flops_per_iteration())), sink.data_ptr())


def fma_peak(rounds: int = 30) -> float:
    """Float32 flop/s of one core, best of `rounds` runs of about a millisecond."""
    sink = torch.zeros(16)
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        flops = _library().fma_flops(100_000, sink.data_ptr())
        best = max(best, flops / (time.perf_counter() - start))
    return best


def threads_gain(count: int, milliseconds: float = 10, rounds: int = 15) -> float:
    """How many times faster `count` threads do the multiply-adds of one, in registers.

    The median of `rounds`. What threads can give at all where CPUs share a core, or their host is busy.
    """
    flops = fma_peak() * milliseconds * 1e-3

    def run(parts: int) -> float:
        others = [threading.Thread(target=multiply_add, args=(flops / parts,)) for _ in range(parts - 1)]
        start = time.perf_counter()
        for thread in others:
            thread.start()
        multiply_add(flops / parts)
        for thread in others:
            thread.join()
        return time.perf_counter() - start

    return statistics.median(run(1) / run(count) for _ in range(rounds))


def two_threads_note() -> str:
    """`threads_gain` of two, for a row that compares them with one."""
    return f"multiply-adds in registers: {threads_gain(2):.2f}"


def read_bandwidth(nbytes: int, rounds: int = 10) -> float:
    """Bytes per second that one core reads from a buffer of `nbytes`, best of `rounds`."""
    data, sink = torch.zeros(nbytes // 256 * 64), torch.zeros(16)
    passes = max(1, (64 << 20) // nbytes)
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(passes):
            _library().read_all(data.data_ptr(), data.numel(), sink.data_ptr())
        best = max(best, passes * data.numel() * 4 / (time.perf_counter() - start))
    return best


def gather(table: torch.Tensor, ids: torch.Tensor, bag: int, out: torch.Tensor, ahead: int = 32) -> None:
    """A hand-written C gather: sum-pools bags of `bag` rows of `table` [N, D] into `out`.

    D is 16, 32, 64 or 128; `ids` int64 [n], n a multiple of `bag`, all in range (nothing is checked).
    The bound that an embedding bag can be held against.
    """
    function = getattr(_library(), f"gather_{table.shape[1]}")
    long = ctypes.c_long
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (table, ids, out)]
    function(pointers[0], pointers[1], long(ids.numel()), long(bag), long(ahead), pointers[2])


if __name__ == "__main__":
    print(f"FMA peak         {fma_peak() / 1e9:8.1f} GFLOP/s")
    print(f"two threads      {threads_gain(2):8.2f} times that")
    for name, size in (
        ("32 KiB", 32 << 10),
        ("512 KiB", 512 << 10),
        ("8 MiB", 8 << 20),
        ("256 MiB", 256 << 20),
    ):
        print(f"read {name:>8}    {read_bandwidth(size) / 1e9:8.1f} GB/s")
