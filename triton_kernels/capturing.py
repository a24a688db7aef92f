"""What launches leave to a CUDA graph that is being captured: a counter of faults, and tables of addresses.

A replay runs no Python. What a launch would look up it finds where it was at the capture, so that the graph
has to hold on to it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import Tensor


class Capture(NamedTuple):
    """Attributes:
    fault_counter: int64 ``[4]`` on the device, in place of the device's own (see ``faults``).
    tables: those that launches read (see ``grouped``), for the graph to keep.
    """

    fault_counter: Tensor
    tables: list[Tensor]


_current: ContextVar[Capture | None] = ContextVar("mprec_capture", default=None)


def current() -> Capture | None:
    """The capture that this thread's launches are for."""
    return _current.get()


@contextmanager
def capturing(capture: Capture) -> Iterator[None]:
    """Launches of this thread are for the capture: those that warm it up, too."""
    token = _current.set(capture)
    try:
        yield
    finally:
        _current.reset(token)
