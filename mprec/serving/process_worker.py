"""A process that scores batches for :class:`mprec.serving.ProcessExecutor`, and how the two talk.

A batch lies in an :class:`Arena`, memory that both processes see; a short message over a pipe says how large
it is, and another that the scores are there. What the arena has no room or no dtype for goes over the pipe.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import pickle
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from mprec.bags import Bags
from mprec.data import Batch
from mprec.dispatch import ScoringPath
from mprec.ops import clear_decoders

__all__ = ["ERROR", "IN_ARENA", "REQUEST", "WHOLE", "Arena", "Packed", "fits", "pack", "work"]

#: In the arena or not, weights changed or not, path's position, samples, dense numbers, indices, features.
REQUEST = struct.Struct("<??5q")
IN_ARENA, WHOLE, ERROR = b"a", b"w", b"e"  # first byte of a reply


class Arena:
    """Shared memory laid out for one batch: offsets and indices, then dense numbers, labels and scores.

    ``ints`` and ``floats`` are all of it as int64 and as float32, NumPy arrays or tensors.
    """

    def __init__(self, ints: Any, floats: Any) -> None:
        self._ints, self._floats = ints, floats

    def parts(self, samples: int, columns: int, indices: int, features: int) -> tuple:
        """Views: dense [samples, columns], indices, offsets, labels, scores."""
        ints, floats, offsets = self._ints, self._floats, features * samples + 1
        dense = 2 * (offsets + indices)
        labels = dense + samples * columns
        scores = labels + samples
        return (
            floats[dense:labels].reshape(samples, columns),
            ints[offsets : offsets + indices],
            ints[:offsets],
            floats[labels:scores],
            floats[scores : scores + samples],
        )


def fits(nbytes: int, samples: int, columns: int, indices: int, features: int) -> bool:
    """Whether an arena has room for such a batch and its scores."""
    return 8 * (features * samples + 1 + indices) + 4 * samples * (columns + 2) <= nbytes


# -- models with their weights in shared memory


@dataclass(frozen=True)
class Packed:
    """Models as another process takes them: ``models`` are pickles that name their tensors by position.

    ``tensors`` describes each: position of its storage, offset, shape, strides, dtype, whether it is a
    parameter, whether it requires a gradient. A storage stands in ``storages`` once, whoever shares it.
    """

    models: list[bytes]
    tensors: list[tuple]
    storages: list[torch.UntypedStorage]

    def unpack(self) -> list[Callable[[Batch], Any]]:
        tensors = []
        for storage, offset, shape, strides, dtype, parameter, requires_grad in self.tensors:
            tensor = torch.empty(0, dtype=dtype).set_(self.storages[storage], offset, shape, strides)
            if parameter:
                tensor = torch.nn.Parameter(tensor, requires_grad)
            tensors.append(tensor)
        return [_Unpickler(io.BytesIO(model), tensors).load() for model in self.models]


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and remembers the modules that it meets."""

    def __init__(self, file: io.BytesIO, tensors: dict[int, Tensor], modules: dict[int, torch.nn.Module]):
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._tensors, self._modules = tensors, modules
        self._positions = {key: position for position, key in enumerate(tensors)}

    def persistent_id(self, obj: Any) -> int | None:
        if isinstance(obj, torch.nn.Module):
            self._modules[id(obj)] = obj
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._positions:
            self._positions[id(obj)] = len(self._positions)
            self._tensors[id(obj)] = obj
        return self._positions[id(obj)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]


def pack(paths: Sequence[ScoringPath]) -> tuple[Packed, list[Tensor], list[torch.nn.Module]]:
    """The paths' models for another process, with all their tensors, which move into shared memory in place,
    and modules.

    ``ValueError`` names the path whose model cannot be pickled, or has a tensor that cannot be shared.
    """
    found: dict[int, Tensor] = {}
    modules: dict[int, torch.nn.Module] = {}
    models: list[bytes] = []
    for path in paths:
        file, known = io.BytesIO(), len(found)
        try:
            _Pickler(file, found, modules).dump(path.model)
        except (pickle.PicklingError, TypeError, AttributeError, NotImplementedError) as error:
            raise ValueError(
                f"paths: the model of path {path.name!r} cannot go to another process: {error}"
            ) from error
        models.append(file.getvalue())
        for tensor in list(found.values())[known:]:
            _share(tensor, path.name)
    storages: dict[int, tuple[int, torch.UntypedStorage]] = {}
    tensors = []
    for t in found.values():
        storage = t.untyped_storage()
        position, _ = storages.setdefault(storage._cdata, (len(storages), storage))
        parameter = isinstance(t, torch.nn.Parameter)
        tensors.append(
            (position, t.storage_offset(), t.shape, t.stride(), t.dtype, parameter, t.requires_grad)
        )
    packed = Packed(models, tensors, [storage for _, storage in storages.values()])
    return packed, list(found.values()), list(modules.values())


def _share(tensor: Tensor, path: str) -> None:
    where = f"paths: path {path!r} has a tensor that cannot be shared with another process"
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
        raise ValueError(f"{where}: a {type(tensor).__name__} of layout {tensor.layout}")
    if not tensor.is_cpu:
        raise ValueError(f"{where}: it is on {tensor.device}, expected cpu")
    if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        raise ValueError(f"{where}: its dtype is {tensor.dtype}, or it is a conjugate or a negative view")
    if tensor.requires_grad and not tensor.is_leaf:
        raise ValueError(f"{where}: it is the result of a calculation with gradients")
    try:
        tensor.share_memory_()
    except RuntimeError as error:
        raise ValueError(f"{where}: {error}") from error


# -- the process


def work(pipe: Connection, memory: Tensor, packed: Packed, inputs: Sequence, threads: int) -> None:
    """The worker's life: ends when the pipe is closed at the other end.

    ``inputs`` are the paths' numbers of features and of dense numbers, or None. Signals for a whole group of
    processes (Ctrl-C, a service manager's SIGTERM) are the parent's to handle: it may still need answers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):  # the pipe was closed
        _serve(pipe, memory, packed, inputs, threads)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # at once, and without what native libraries say when an interpreter is taken down


def _serve(pipe: Connection, memory: Tensor, packed: Packed, inputs: Sequence, threads: int) -> None:
    try:
        torch.set_num_threads(threads)
        models = packed.unpack()
        _warm_up(models, inputs)
    except BaseException as error:
        pipe.send_bytes(_error(error))
        return
    gc.collect()
    gc.freeze()  # a full collection would stop some batch for a tenth of a second
    arena = Arena(memory.view(torch.int64), memory.view(torch.float32))
    pipe.send_bytes(WHOLE)
    while True:
        pipe.send_bytes(_answer(pipe.recv_bytes(), arena, models))


def _warm_up(models: Sequence[Callable], inputs: Sequence[tuple[int, int] | None]) -> None:
    for model, sizes in zip(models, inputs, strict=True):
        if sizes is None:
            continue
        features, numbers = sizes
        ids, offsets = torch.zeros(features, dtype=torch.int64), torch.arange(features + 1)
        batch = Batch(
            torch.zeros(1, numbers, dtype=torch.float32),
            Bags(ids, offsets, num_features=features),
            torch.zeros(1),
        )
        with contextlib.suppress(Exception):  # a path that raises says so when it is asked for
            model(batch)


def _answer(message: bytes, arena: Arena, models: Sequence[Callable]) -> bytes:
    try:
        in_arena, changed, path, *sizes = REQUEST.unpack_from(message)
        if changed:
            clear_decoders()  # another process's writes raise no version counter of this one's tensors
        if in_arena:
            dense, indices, offsets, labels, place = arena.parts(*sizes)
            batch = Batch(dense, Bags(indices, offsets, num_features=sizes[-1]), labels)
            scores = torch.as_tensor(models[path](batch)).detach()
            if scores.dtype == torch.float32 and scores.is_cpu and scores.shape == place.shape:
                place.copy_(scores)
                return IN_ARENA
        else:
            scores = torch.as_tensor(models[path](pickle.loads(message[REQUEST.size :]))).detach()
        return WHOLE + pickle.dumps(scores.cpu().clone())
    except BaseException as error:  # SystemExit too: the worker goes on
        return _error(error)


def _error(error: BaseException) -> bytes:
    first = error.args[0] if len(error.args) == 1 else None
    text = first if isinstance(first, str) else str(error)
    kind = type(error)
    trace = "".join(traceback.format_exception(error))
    return ERROR + pickle.dumps((kind.__module__, kind.__name__, text, trace))
