"""Calls as CUDA graphs: what a call launches is captured once, and replayed on the memory that it read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .capturing import Capture, capturing
from .faults import Counter

_WARM_UP = 3  # calls before the capture: kernels are compiled, libraries make their workspaces


class Graphs:
    """CUDA graphs of one device. They share a pool of memory for what lies between inputs and results, and so
    run one at a time (:meth:`turn`). What they read and write from outside belongs to the caller.

    Attributes:
        faults: IDs out of range that replays met.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.faults = device, Counter(device)
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream, self._done = torch.cuda.Stream(), torch.cuda.Event()

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """A replay of what ``call`` launches. Raises what the call raises, and ``RuntimeError`` for what
        cannot be captured, such as waiting for the device."""
        kept = Capture(self.faults.device_copy, [])
        with torch.cuda.device(self.device), capturing(kept):
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UP):
                    call()
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on allocating and waiting meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                call()
            here.wait_stream(self._stream)

        def replay(graph=graph, kept=kept) -> None:  # `kept` lives as long as the replay can be called
            graph.replay()

        return replay

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Work on the graphs' memory, on the current stream, behind the turn before on whatever stream."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)
