"""IDs out of range on the device: kernels skip and count them; the host learns of it without waiting.

After each launch the counter is copied to pinned host memory behind the kernel. The next call on that
device looks at whatever copy has arrived, and raises. `check` waits, for those who want to know now.
"""

import torch
import triton
import triton.language as tl

from mprec.errors import IdOutOfRangeError
from mprec.tracing import traced

from . import capturing

_FIELDS = 4  # how many; then of the first one found: feature, position among the indices, ID


class Counter:
    """What launches count into, ``device_copy``, and what the host knows of it."""

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.device_copy = torch.zeros(_FIELDS, dtype=torch.int64, device=device)
            self.host_copy = torch.zeros(_FIELDS, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.arrival = torch.cuda.Event() if device.type == "cuda" else None
        self.pending = False

    def start_copy(self) -> None:
        """To the host, behind what the current stream does now."""
        self.host_copy.copy_(self.device_copy, non_blocking=True)
        if self.arrival is not None:
            self.arrival.record()
        self.pending = True

    def raise_if_arrived(self) -> None:
        """``IdOutOfRangeError`` if a copy has arrived and there is something in it."""
        if self.pending and self._arrived():
            self.pending = False
            self._report()

    def _arrived(self) -> bool:
        if self.arrival is None:
            return True
        return not torch.cuda.is_current_stream_capturing() and self.arrival.query()  # not allowed meanwhile

    def check(self) -> None:
        """Wait for the device; ``IdOutOfRangeError`` if there is anything."""
        self.host_copy.copy_(self.device_copy)
        self.pending = False
        self._report()

    def _report(self) -> None:
        count, feature, position, value = self.host_copy.tolist()
        if count:
            self.device_copy.zero_()
            raise IdOutOfRangeError(
                f"indices: {count} IDs out of range in an earlier call on {self.device_copy.device} were "
                f"left out; one of them is {value}, of table {feature}, at position {position}"
            )


_counters: dict[torch.device, Counter] = {}


def counter(device: torch.device) -> torch.Tensor:
    """A counter for a kernel that is about to be launched. Raises for earlier launches.

    The device's own; in a graph that torch.compile traces, a fresh one, which `after_launch` adds to that;
    for a captured path, its graphs' (see `capturing`).
    """
    if traced():
        return torch.zeros(_FIELDS, dtype=torch.int64, device=device)
    if (capture := capturing.current()) is not None:
        return capture.fault_counter
    return _state(device).device_copy


def _state(device: torch.device) -> Counter:
    state = _counters.get(device)
    if state is None:
        state = _counters[device] = Counter(device)
    state.raise_if_arrived()
    return state


def after_launch(counter: torch.Tensor, out: torch.Tensor) -> None:
    """Start copying the counter to the host, unless a CUDA graph is being captured or a copy is under way.

    `out` is what the launch wrote: in a traced graph it holds the report in place.
    """
    if traced():
        torch.ops.mprec.report_faults(out, counter)
    elif capturing.current() is None:
        _start_copy(counter.device)


def _start_copy(device: torch.device) -> None:
    state = _counters[device]
    if device.type == "cuda" and (state.pending or torch.cuda.is_current_stream_capturing()):
        return
    state.start_copy()


def check(device: torch.device) -> None:
    """Wait for the device, and raise `IdOutOfRangeError` if any launch so far met an ID out of range.

    For the end of a step, and after replays of a CUDA graph, which only count. (A captured path has a counter
    of its own, which its calls look at.)
    """
    state = _counters.get(device)
    if state is not None:
        state.check()


@triton.jit
def _add_kernel(faults, total):
    found, before = tl.load(faults), tl.load(total)
    tl.store(total, before + found)
    if (found > 0) & (before == 0):
        for field in tl.static_range(1, 4):
            tl.store(total + field, tl.load(faults + field))


# Said to change `out`, so that a compiler neither drops it nor moves it before the launch.
_library = torch.library.Library("mprec", "FRAGMENT")
_library.define("report_faults(Tensor(a!) out, Tensor faults) -> ()")


def _report_faults(out, faults):
    _add_kernel[(1,)](faults, _state(faults.device).device_copy)
    _start_copy(faults.device)


_library.impl("report_faults", _report_faults, "CompositeExplicitAutograd")
torch.library.register_fake("mprec::report_faults", lambda out, faults: None, lib=_library)


@triton.jit
def count_faults(faults, wrong, position, feature, indices):
    """Add `wrong` [lanes] to the counter; the first program to find any leaves one of them as an example."""
    found = tl.sum(wrong)
    if found > 0:  # noqa: SIM102 (Triton evaluates both sides of `and`)
        if tl.atomic_add(faults, found) == 0:
            where = tl.max(tl.where(wrong > 0, position, -1))
            tl.store(faults + 1, feature)
            tl.store(faults + 2, where)
            tl.store(faults + 3, tl.load(indices + where).to(tl.int64))
