"""CUDA graphs without CUDA: operators are captured with the tensors that they read and wrote, and replayed on
these. As of a real graph, no Python of the model's runs again, and results stand where they stood."""

from contextlib import contextmanager

import torch
from mprec.triton_kernels.capturing import Capture, capturing
from mprec.triton_kernels.faults import Counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def as_on_a_gpu(func, arguments, named):
    """Kernels on bags look at no ID beyond the last offset there; those of the CPU say there are some."""
    names = [argument.name for argument in func._schema.arguments]
    if func.namespace == "mprec" and {"indices", "offsets"} <= set(names):
        arguments = list(arguments)
        at, offsets = names.index("indices"), arguments[names.index("offsets")]
        arguments[at] = arguments[at][: int(offsets[-1])]
    return func(*arguments, **named)


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = as_on_a_gpu(func, args, kwargs or {})
        self.calls.append((func, args, kwargs or {}, result))
        return result


class FakeGraphs:
    """Stands in for :class:`mprec.triton_kernels.graphs.Graphs` on the CPU.

    Attributes:
        captures, replays, turns: how many there were.
        on_replay: called after each replay, with the counter of faults.
    """

    def __init__(self, error=None):
        self.faults = Counter(torch.device("cpu"))
        self.captures = self.replays = self.turns = 0
        self.error, self.on_replay = error, lambda faults: None
        self._busy, self._capture = False, Capture(self.faults.device_copy, [])

    def capture(self, call):
        if self.error is not None:
            raise self.error
        with capturing(self._capture):
            with _Recording():
                call()  # to warm up
            with _Recording() as recording:
                call()
        self.captures += 1

        def replay():
            assert self._busy, "outside of a turn"
            with capturing(self._capture):
                for func, args, kwargs, result in recording.calls:
                    again = as_on_a_gpu(func, args, kwargs)
                    for before, now in zip(tree_leaves(result), tree_leaves(again), strict=True):
                        if isinstance(before, torch.Tensor) and before.data_ptr() != now.data_ptr():
                            before.copy_(now)
            self.replays += 1
            self.on_replay(self.faults)

        return replay

    @contextmanager
    def turn(self):
        assert not self._busy, "two turns at once"
        self._busy, self.turns = True, self.turns + 1
        try:
            yield
        finally:
            self._busy = False
