"""Helpers for tests and benchmarks of code that uses mprec."""

import contextlib
from collections.abc import Iterator

from mprec import _native

__all__ = ["isa", "runnable_isas"]


def runnable_isas() -> list[str]:
    """The ISAs that this CPU can run, slowest first: of ``scalar``, ``avx2``, ``avx512``, ``avx512vnni``,
    ``avx512bf16``, ``amx``; on aarch64 ``scalar``, ``neon``, ``sve256``."""
    return _native.runnable_isas()


@contextlib.contextmanager
def isa(name: str) -> Iterator[None]:
    """Run the enclosed calls with the kernels of one ISA. ``ValueError`` if this CPU cannot run it."""
    before = _native.isa()
    _native.use_isa(name)
    try:
        yield
    finally:
        _native.use_isa(before)
