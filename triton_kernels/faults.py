"""IDs out of range on the device: kernels skip and count them; the host learns of it without waiting.

After each launch the counter is copied to pinned host memory behind the kernel. The next call on that
device looks at whatever copy has arrived, and raises. `check` waits, for those who want to know now.
"""

import torch
import triton
import triton.language as tl

from mprec.errors import IdOutOfRangeError

_FIELDS = 4  # how many; then of the first one found: feature, position among the indices, ID


class _Counter:
    def __init__(self, device: torch.device):
        self.device_copy = torch.zeros(_FIELDS, dtype=torch.int64, device=device)
        self.host_copy = torch.zeros(_FIELDS, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.arrival = torch.cuda.Event() if device.type == "cuda" else None
        self.pending = False


_counters: dict[torch.device, _Counter] = {}


def counter(device: torch.device) -> torch.Tensor:
    """The device's counter, for a kernel that is about to be launched. Raises for earlier launches."""
    state = _counters.get(device)
    if state is None:
        state = _counters[device] = _Counter(device)
    _raise_if_arrived(state)
    return state.device_copy


def after_launch(device: torch.device) -> None:
    """Start copying the counter to the host, unless a CUDA graph is being captured or a copy is under way."""
    state = _counters[device]
    if device.type == "cuda":
        if state.pending or torch.cuda.is_current_stream_capturing():
            return
        state.host_copy.copy_(state.device_copy, non_blocking=True)
        state.arrival.record()
    else:
        state.host_copy.copy_(state.device_copy)
    state.pending = True


def check(device: torch.device) -> None:
    """Wait for the device, and raise `IdOutOfRangeError` if any launch so far met an ID out of range.

    For the end of a step, and after replays of a CUDA graph, which only count.
    """
    state = _counters.get(device)
    if state is not None:
        state.host_copy.copy_(state.device_copy)
        state.pending = False
        _report(state)


def _raise_if_arrived(state: _Counter) -> None:
    if state.pending and (state.arrival is None or state.arrival.query()):
        state.pending = False
        _report(state)


def _report(state: _Counter) -> None:
    count, feature, position, value = state.host_copy.tolist()
    if count:
        state.device_copy.zero_()
        raise IdOutOfRangeError(
            f"indices: {count} IDs out of range in an earlier call on {state.device_copy.device} were left "
            f"out; one of them is {value}, of table {feature}, at position {position}"
        )


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
