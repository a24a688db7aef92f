"""An executor whose paths run in a process of its own.

Threads of one process share Python's interpreter lock: at batches of 64 two threads gain nothing, and while
clients submit queries an executor's thread waits for the lock at every operator. A process has its own.
Weights are in shared memory, so that all processes use one copy; batches and scores pass through a block of
shared memory, and a pipe only says where they are.
"""

from __future__ import annotations

import builtins
import contextlib
import math
import signal
import struct
import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from mprec import errors
from mprec.data import Batch
from mprec.dispatch import Path, Profile
from mprec.serving.executors import Executor

__all__ = ["ProcessExecutor"]

_START_S = 120.0
_HEADER = struct.Struct("<5q")  # path, samples, dense numbers, IDs, offsets
_BY_PIPE = -1
_ANSWER, _ERROR, _LARGE = 0, 1, 2


class ProcessExecutor(Executor):
    """``paths`` in a process of their own, which uses ``threads`` of torch's threads.

    The paths' models must be picklable; modules' weights are moved to shared memory when the executor starts,
    so that what is written to them in place is seen there too. ``arena_bytes`` hold a batch and its scores;
    larger batches go through the pipe. If the process dies, the call under way raises ``RuntimeError`` and
    the next one starts a new process.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[Path],
        profile: Profile,
        *,
        threads: int = 1,
        arena_bytes: int = 8 << 20,
    ) -> None:
        super().__init__(name, paths, profile)
        if threads < 1:
            raise ValueError(f"threads: expected at least 1, got {threads}")
        self.threads = threads
        self._arena = torch.empty(arena_bytes // 8, dtype=torch.int64)
        self._number = {path.name: i for i, path in enumerate(self.paths)}
        self._process: Any = None
        self._pipe: Any = None
        self._lock = threading.Lock()  # one call at a time

    def start(self) -> None:
        """Start the process and wait until it is ready. ``RuntimeError`` with its reason if it cannot
        start."""
        for path in self.paths:
            model = getattr(path.model, "model", path.model)
            if isinstance(model, torch.nn.Module):
                model.share_memory()
        self._arena.share_memory_()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        models = [path.model for path in self.paths]
        self._process = context.Process(
            target=_serve,
            args=(theirs, models, self._arena, self.threads),
            name=f"mprec-{self.name}",
            daemon=True,
        )
        try:
            self._process.start()
        except (TypeError, AttributeError, RuntimeError) as error:
            raise RuntimeError(
                f"executor {self.name!r}: a path cannot be sent to a process: {error}"
            ) from error
        theirs.close()
        try:
            if not self._pipe.poll(_START_S):
                raise EOFError("it did not become ready in time")
            ready = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._end()
            raise RuntimeError(f"executor {self.name!r}: its process did not start: {error}") from error
        if ready is not None:
            self._end()
            raise RuntimeError(f"executor {self.name!r}: its process did not start: {ready}")

    def run(self, path: str, batch: Batch) -> torch.Tensor:
        number = self._number[path]
        with self._lock:
            if self._process is None:
                self.start()
            try:
                return self._call(number, batch)
            except (EOFError, OSError) as error:
                process = self._process
                self._end()
                raise RuntimeError(
                    f"executor {self.name!r}: its process died (exit code {process.exitcode})"
                ) from error

    def close(self) -> None:
        with self._lock:
            self._end()

    def _call(self, number: int, batch: Batch) -> torch.Tensor:
        dense, indices, offsets = batch.dense, batch.indices, batch.offsets
        samples, columns, ids = len(batch), dense.shape[1], len(indices)
        half = (samples * columns + 1) // 2  # 64-bit words of the dense numbers
        if half + ids + len(offsets) + samples > len(self._arena):
            self._pipe.send_bytes(_HEADER.pack(number, samples, _BY_PIPE, 0, 0))
            self._pipe.send((dense.numpy(), indices.numpy(), offsets.numpy()))
        else:
            _dense(self._arena, samples, columns).copy_(dense)
            self._arena[half : half + ids].copy_(indices)
            self._arena[half + ids : half + ids + len(offsets)].copy_(offsets)
            self._pipe.send_bytes(_HEADER.pack(number, samples, columns, ids, len(offsets)))
        answer = self._pipe.recv_bytes()
        kind = answer[0]
        if kind == _ERROR:
            name, text = answer[1:].decode().split("\n", 1)
            known = getattr(builtins, name, None) or getattr(errors, name, None)
            if isinstance(known, type) and issubclass(known, Exception):
                with contextlib.suppress(TypeError):
                    raise known(text)
            raise RuntimeError(f"{name}: {text}")
        if kind == _LARGE:
            return torch.from_numpy(self._pipe.recv())
        count = struct.unpack_from("<q", answer, 1)[0]
        return self._arena.view(torch.float32)[:count].clone()

    def _end(self) -> None:
        if self._process is None:
            return
        self._pipe.close()  # the process sees it and ends
        self._process.join(2.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None


def _dense(arena: torch.Tensor, samples: int, columns: int) -> torch.Tensor:
    return arena.view(torch.float32)[: samples * columns].view(samples, columns)


def _serve(pipe, models: Sequence[Any], arena: torch.Tensor, threads: int) -> None:
    """The process: answer until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent drains
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    pipe.send(None)
    while True:
        try:
            number, samples, columns, ids, ends = _HEADER.unpack(pipe.recv_bytes())
            if columns == _BY_PIPE:
                dense, indices, offsets = map(torch.from_numpy, pipe.recv())
            else:
                start = (samples * columns + 1) // 2
                dense = _dense(arena, samples, columns)
                indices = arena[start : start + ids]
                offsets = arena[start + ids : start + ids + ends]
        except (EOFError, OSError):
            return
        try:
            batch = Batch(dense, indices, offsets, torch.zeros(samples))
            scores = torch.as_tensor(models[number](batch), dtype=torch.float32).detach().contiguous()
        except Exception as error:
            reply = bytes([_ERROR]) + f"{type(error).__name__}\n{error}".encode()
        else:
            if scores.dim() == 1 and math.prod(scores.shape) <= 2 * len(arena):
                arena.view(torch.float32)[: len(scores)].copy_(scores)
                reply = bytes([_ANSWER]) + struct.pack("<q", len(scores))
            else:
                reply = bytes([_LARGE])
        try:
            pipe.send_bytes(reply)
            if reply[0] == _LARGE:
                pipe.send(scores.numpy())
        except OSError:
            return
