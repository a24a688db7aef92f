"""What runs batches, one after another: this process, a process of its own, a CUDA device, a simulated
device.

An executor has ``name``, ``paths`` (:class:`mprec.dispatch.ScoringPath`) and the ``profile`` that measured
them on it. An engine runs each on a thread of its own, so that ``run`` may block. Threads of one process
share Python's interpreter lock: an executor that keeps it busy wants a process (:class:`ProcessExecutor`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from mprec._native import PathProgram
from mprec.data import Batch
from mprec.dispatch import Profile, ScoringPath

__all__ = ["CudaExecutor", "Executor", "LocalExecutor", "SimulatedExecutor"]


class Executor:
    """Base of all executors: the paths are called in the thread that calls ``run``."""

    def __init__(self, name: str, paths: Sequence[ScoringPath], profile: Profile) -> None:
        if not paths:
            raise ValueError("paths: expected at least one")
        names = [path.name for path in paths]
        if len(set(names)) != len(names):
            raise ValueError(f"paths: expected distinct names, got {names}")
        self.name, self.paths, self.profile = name, list(paths), profile
        self._models = {path.name: path.model for path in paths}

    def start(self) -> None:
        """Make ready to run; called once before the first ``run``."""

    def run(self, path: str, batch: Batch) -> torch.Tensor:
        """Scores float [B] of the batch by the path of that name, on the CPU. Raises what the path raises."""
        return torch.as_tensor(self._models[path](batch))

    def program(self, path: str) -> PathProgram | None:
        """The path as a native call, as its weights are now, if ``run`` would do no more than that call. An
        engine then runs it on threads that need no interpreter."""
        program = getattr(self._models[path], "program", None)
        return program() if program is not None and type(self).run is Executor.run else None

    def close(self) -> None:
        """Let go of what ``start`` took."""


class LocalExecutor(Executor):
    """The paths in this process, with torch's threads."""


class CudaExecutor(Executor):
    """Paths whose models are on a CUDA device: batches are copied on a stream of the executor's own, so that
    other executors work on meanwhile. Captured paths (:func:`mprec.compile_path`) replay their graphs there.
    """

    def __init__(
        self, name: str, paths: Sequence[ScoringPath], profile: Profile, device: torch.device | str = "cuda"
    ) -> None:
        super().__init__(name, paths, profile)
        self.device = torch.device(device)
        self._stream: torch.cuda.Stream | None = None

    def start(self) -> None:
        self._stream = torch.cuda.Stream(self.device)

    def run(self, path: str, batch: Batch) -> torch.Tensor:
        with torch.cuda.stream(self._stream):
            batch = batch.pin_memory()
            if not getattr(self._models[path], "is_captured", False):  # that copies to where its graph reads
                batch = batch.to(self.device, non_blocking=True)
            return super().run(path, batch).cpu()  # the copy back waits for this stream alone


class SimulatedExecutor(Executor):
    """A device that is not at hand: scores come from the paths' models, and not before the profile's mean
    time of the batch is over. Results are simulated, and must be called so."""

    def run(self, path: str, batch: Batch) -> torch.Tensor:
        end = time.perf_counter() + self.profile.curve(path, "mean").at(len(batch))
        scores = super().run(path, batch)
        if (rest := end - time.perf_counter()) > 0:
            time.sleep(rest)
        return scores
