"""An executor whose paths run in a process of its own.

Two threads of one process gain nothing at small batches, because they share Python's interpreter lock; two
processes gain almost twofold. The thread that calls ``run`` waits without holding that lock.
"""

from __future__ import annotations

import builtins
import multiprocessing
import pickle
import threading
import time
from collections.abc import Sequence
from multiprocessing import util

import numpy as np
import torch

from mprec import errors
from mprec._native import WeightWatch
from mprec.data import Batch
from mprec.dispatch import Profile, ScoringPath
from mprec.serving import process_worker as worker_module
from mprec.serving.executors import Executor
from mprec.serving.process_worker import ERROR, IN_ARENA, REQUEST, Arena, Packed, fits, pack

__all__ = ["ProcessExecutor"]

_START_S = 120.0  # Python, torch and mprec are imported, on a machine that may be busy
_END_S = 5.0
_FIRST_REST_S, _LONGEST_REST_S = 1.0, 30.0  # of a worker that dies again and again


class ProcessExecutor(Executor):
    """Runs its paths in another process, whose models share their weights' memory with this one's.

    Making one moves the weights of ``paths`` into shared memory, in place and once however many executors use
    them; no other thread may be scoring by these paths at that moment. A table of ``mprec.huge_pages`` has
    ordinary pages from then on. Later changes of the weights are seen by the next ``run``: as with packed
    decoders, call ``mprec.ops.clear_decoders`` after writes through ``.data`` or NumPy. A model whose modules
    or tensors were replaced goes to a new worker, which takes seconds.

    ``threads`` are torch's in the worker. ``arena_bytes`` of shared memory pass batches and scores; a larger
    batch goes through a pipe, which is slower. Before ``start`` and after ``close`` batches are scored in the
    caller's process, so that none is lost when an engine swaps executors.

    As for everything that ``multiprocessing`` spawns, the main script needs ``if __name__ == "__main__"``.
    The worker leaves Ctrl-C and SIGTERM to its parent and ends with it.

    Raises:
        ValueError: no threads, too small an arena, or a path whose model cannot be pickled or shared (a
            lambda, a tensor on CUDA); the message names it. A cache of rows starts empty in the worker.
    """

    def __init__(
        self,
        name: str,
        paths: Sequence[ScoringPath],
        profile: Profile,
        *,
        threads: int = 1,
        arena_bytes: int = 8 << 20,
    ) -> None:
        super().__init__(name, paths, profile)
        if threads < 1:
            raise ValueError(f"threads: expected at least 1, got {threads}")
        if arena_bytes < 8:
            raise ValueError(f"arena_bytes: expected at least 8, got {arena_bytes}")
        self.threads, self.arena_bytes = threads, arena_bytes // 8 * 8
        self._positions = {path.name: position for position, path in enumerate(self.paths)}
        self._lock = threading.Lock()
        self._open = False
        self._worker: _Worker | None = None
        self._exit_code: int | None = None
        self._deaths, self._rest_until = 0, 0.0  # of workers, since one answered
        self._pack()

    @property
    def pid(self) -> int | None:
        """The worker's process ID; None if there is none."""
        return None if self._worker is None else self._worker.process.pid

    def start(self) -> None:
        """Start the worker and wait until it is warm, some seconds. Nothing is done if it runs already.

        Raises:
            RuntimeError: it failed; the message has its traceback or exit code.
            TimeoutError: it was not ready after two minutes.
        """
        with self._lock:
            if self._worker is None:
                self._spawn()
            self._open = True

    def run(self, path: str, batch: Batch) -> torch.Tensor:
        """Scores [B] of the batch by the path of that name.

        What the path raises has its type here if that is a builtin or one of ``mprec.errors``, and is a
        ``RuntimeError`` otherwise. ``RuntimeError`` with the exit code if the worker has died: the next call
        starts another. A worker that dies again before it has answered is left alone for a second, then for
        longer.
        """
        position = self._positions[path]
        with self._lock:
            if not self._open:
                return super().run(path, batch)
            changed = self._weights_changed()
            if self._worker is None:
                self._restart()
            worker = self._worker
            message, place = worker.write(position, batch, changed)
            try:
                reply = worker.ask(message)
            except (EOFError, OSError) as error:
                self._exit_code = self._died()
                raise RuntimeError(
                    f"executor {self.name!r}: its worker ended with exit code {self._exit_code}"
                ) from error
            except BaseException:  # interrupted: its reply would be taken for the next call's
                self._worker = None
                worker.stop(kill=True)
                raise
            self._deaths = 0
            if reply == IN_ARENA:
                return torch.from_numpy(place.copy())
        if reply.startswith(ERROR):
            raise _error(reply)
        return pickle.loads(reply[1:])

    def close(self) -> None:
        """End the worker, after the batch that it scores unless that takes more than some seconds."""
        if not self._lock.acquire(timeout=_END_S):
            worker = self._worker
            if worker is not None:
                worker.process.kill()
            self._lock.acquire()
        try:
            self._open = False
            worker, self._worker = self._worker, None
        finally:
            self._lock.release()
        if worker is not None:
            worker.stop()

    # -- the lock is held

    def _spawn(self) -> None:
        inputs = [path.inputs for path in self.paths]
        self._worker = _Worker(self.name, self._packed, inputs, self.threads, self.arena_bytes)

    def _restart(self) -> None:
        rest = self._rest_until - time.monotonic()
        if rest > 0:
            raise RuntimeError(
                f"executor {self.name!r}: its worker ended {self._deaths} times in a row, at last with exit "
                f"code {self._exit_code}; it is left alone for another {rest:.1f} s"
            )
        try:
            self._spawn()
        except BaseException:
            self._died()
            raise

    def _died(self) -> int | None:
        """Count a death; the worker's exit code."""
        worker, self._worker = self._worker, None
        self._deaths += 1
        if self._deaths > 1:
            rest = min(_FIRST_REST_S * 2 ** min(self._deaths - 2, 16), _LONGEST_REST_S)
            self._rest_until = time.monotonic() + rest
        return None if worker is None else worker.stop()

    def _pack(self) -> bool:
        """Pack the models and watch their weights; True if they are not the tensors packed before."""
        packed, tensors, modules = pack(self.paths)
        key = [(id(t), t.data_ptr()) for t in tensors], packed.models, packed.tensors
        new = key != getattr(self, "_key", None)
        if new:
            self._packed, self._key = packed, key
        self._tensors = tensors  # kept: no other may take one's identity
        places = [
            (entries, name)
            for module in modules
            for entries in (module._parameters, module._buffers, module._modules)
            for name, entry in entries.items()
            if entry is not None
        ]
        places += [({"": t}, "") for t in _elsewhere(tensors, modules)]
        # Counters, and some bytes: the worker's own watches compare the bytes of what it has packed.
        self._watch = WeightWatch.of(places, blocks=4)  # None of tensors made in inference mode
        return new

    def _weights_changed(self) -> bool:
        """True if the worker must not trust what it has derived from weights. Ends a worker whose tensors are
        no longer the model's."""
        if self._watch is None:
            return True
        if not self._watch.changed():
            return False
        if self._pack() and self._worker is not None:
            worker, self._worker = self._worker, None
            worker.stop()
        return True


class _Worker:
    """This end of a worker that is ready."""

    def __init__(self, name: str, packed: Packed, inputs: Sequence, threads: int, arena_bytes: int) -> None:
        self._nbytes = arena_bytes
        memory = torch.zeros(arena_bytes, dtype=torch.uint8).share_memory_()
        # NumPy copies on one thread; torch would start a team of threads for large batches.
        self._arena = Arena(memory.view(torch.int64).numpy(), memory.view(torch.float32).numpy())
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self.process = context.Process(
            target=worker_module.work,
            args=(there, memory, packed, inputs, threads),
            name=f"mprec-{name}",
            daemon=True,
        )
        try:
            self.process.start()
        finally:
            there.close()  # so that the worker's end is the end of the pipe
        # The worker ignores SIGTERM, by which multiprocessing ends daemons; this comes before.
        self._at_exit = util.Finalize(self, self.process.kill, exitpriority=100)
        try:
            self._wait_until_ready(name)
        except BaseException:
            self.stop(kill=True)
            raise

    def _wait_until_ready(self, name: str) -> None:
        if not self._pipe.poll(_START_S):
            raise TimeoutError(f"executor {name!r}: its worker was not ready after {_START_S:g} s")
        try:
            reply = self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise RuntimeError(
                f"executor {name!r}: its worker ended with exit code {self.stop()} before it was ready; a "
                'main script needs `if __name__ == "__main__"`'
            ) from error
        if reply.startswith(ERROR):
            *_, trace = pickle.loads(reply[1:])
            raise RuntimeError(f"executor {name!r}: its worker could not start:\n{trace}")

    def write(self, path: int, batch: Batch, changed: bool) -> tuple[bytes, np.ndarray | None]:
        """(message for ``ask``, where the scores will be), with the batch in the arena; or (message with the
        batch in it, None)."""
        sizes = _sizes(batch)
        if sizes is None or not fits(self._nbytes, *sizes):
            whole = batch.moved(lambda tensor: tensor.detach().clone())  # not all that a view is a view of
            return REQUEST.pack(False, changed, path, 0, 0, 0, 0) + pickle.dumps(whole), None
        *places, scores = self._arena.parts(*sizes)
        for place, tensor in zip(places, batch.tensors().values(), strict=True):
            place[...] = tensor.detach().numpy()
        return REQUEST.pack(True, changed, path, *sizes), scores

    def ask(self, message: bytes) -> bytes:
        """The reply. ``EOFError`` or ``OSError`` if the worker has died."""
        self._pipe.send_bytes(message)
        return self._pipe.recv_bytes()

    def stop(self, kill: bool = False) -> int | None:
        """The exit code. A worker that waits for messages ends by itself."""
        self._pipe.close()
        if not kill:
            self.process.join(_END_S)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self._at_exit.cancel()
        return self.process.exitcode


def _elsewhere(tensors: Sequence[torch.Tensor], modules: Sequence[torch.nn.Module]) -> list[torch.Tensor]:
    """Those that are in no module's dicts."""
    held = {id(t) for m in modules for entries in (m._parameters, m._buffers) for t in entries.values()}
    return [tensor for tensor in tensors if id(tensor) not in held]


def _sizes(batch: Batch) -> tuple[int, int, int, int] | None:
    """Samples, dense numbers, indices and features of a batch that the arena takes; None for others."""
    dense, bags, labels = batch.dense, batch.bags, batch.labels
    indices, offsets = bags.indices, bags.offsets
    if not (
        dense.dtype == labels.dtype == torch.float32
        and indices.dtype == offsets.dtype == torch.int64
        and dense.dim() == 2
        and indices.dim() == offsets.dim() == labels.dim() == 1
        and len(dense) == len(labels)
        and bags.is_plain
        and len(offsets) == bags.num_features * len(labels) + 1
        and dense.is_cpu
        and indices.is_cpu
        and offsets.is_cpu
        and labels.is_cpu
    ):
        return None
    return len(labels), dense.shape[1], len(indices), bags.num_features


def _error(reply: bytes) -> Exception:
    module, name, text, trace = pickle.loads(reply[1:])
    home = {"builtins": builtins, "mprec.errors": errors}.get(module)
    kind = getattr(home, name, None)
    try:
        if not issubclass(kind, Exception):
            raise TypeError
        error = kind(text)
    except TypeError:  # of another home, or made of more than a text
        error = RuntimeError(f"{name}: {text}")
    error.add_note(f"In the worker:\n{trace}")
    return error
