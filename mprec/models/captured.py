"""A model's whole path as captured CUDA graphs: a batch is scored by one replay, whose launches cost the host
nothing.

    path = mprec.compile_path(model.cuda())
    scores = path(dense, bags)  # [B], as model(dense, bags).sigmoid()

A graph is of fixed sizes. There is one for each *bucket*: so many samples at most, and so many IDs. A batch
is padded to its bucket with samples whose bags are empty, and whose scores nobody reads.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mprec._native import PlaceWatch
from mprec.bags import Bags
from mprec.errors import IdOutOfRangeError, PathCompileError
from mprec.layers import does_more, size_places
from mprec.models.compiled import check_model, check_precision
from mprec.representations import PARTS
from mprec.representations.deep_hash import DeepHashEmbeddingBag

__all__ = ["BUCKETS", "CapturedPath"]

#: Samples of the buckets.
BUCKETS = tuple(2**i for i in range(13))  # 1 to 4096
_MOST_IDS = 64  # of a bucket, for each bag
_READ = "rows", "projection", "hot", "rest"  # parts of members that are read


class Graphs(Protocol):
    """What captures and replays: :class:`mprec.triton_kernels.graphs.Graphs` on CUDA."""

    faults: Any

    def capture(self, call: Callable[[], None]) -> Callable[[], None]: ...

    def turn(self) -> AbstractContextManager[None]: ...


class Bucket(NamedTuple):
    """At most so many samples and IDs together."""

    samples: int
    ids: int


class CapturedPath:
    """What :func:`mprec.compile_path` returns for a model on CUDA. Safe for concurrent calls, in turns.

    A bucket's graph is captured at its first batch, which takes time (seconds, if kernels are compiled too).
    Graphs share the memory of what lies between inputs and scores. Weights are read
    where they lie: what is written to them counts at once. When a weight or a module was replaced or moved,
    the graphs are captured anew.

    A batch goes to the model itself, as if there were no graphs: in training mode, if it is larger than the
    last bucket or has more than 64 IDs a bag, if its tensors are in a form that the graphs do not take, once
    a module of the model has got a hook or a forward pass of its own, and if its bucket could not be
    captured, of which ``reasons`` and a warning say why.

    Attributes:
        model, precision: as given.
        buckets: numbers of samples, ascending.
        reasons: by bucket, why it was not captured.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: str = "float32",
        buckets: Sequence[int] = BUCKETS,
        graphs: Graphs | None = None,
    ) -> None:
        check_precision(precision)
        if not buckets or list(buckets) != sorted({int(size) for size in buckets}) or buckets[0] < 1:
            raise ValueError(f"buckets: expected rising numbers of samples from 1 on, got {list(buckets)}")
        if precision != "float32":
            raise PathCompileError(f"precision: dense layers in {precision} are for the CPU")
        self.model, self.precision, self.buckets = model, precision, tuple(buckets)
        self.reasons: dict[Bucket, str] = {}
        self.device = check_on_one_device(model)
        self._graphs = graphs or _graphs_of(self.device)
        self._lock = threading.Lock()
        self._watch = watch_of(model)
        self._captured: dict[Bucket, _Captured] = {}

    @torch.no_grad()
    def __call__(self, dense: Tensor, indices: Bags | Tensor, offsets: Tensor | None = None) -> Tensor:
        """Click probabilities, where the inputs are: on the model's device or on the CPU.

        Inputs on the device are not waited for. An ID out of range is left out, and a later call raises.
        Inputs on the CPU (in pinned memory they are copied without a stop on the way) are checked before, the
        scores are waited for, and an ID out of range raises at once.

        Args:
            dense: float32 ``[B, num_dense]``.
            indices: int64 or int32 ``[n]``, feature after feature; or, alone, :class:`mprec.bags.Bags` of all
                features.
            offsets: int64 or int32 ``[F * B + 1]``, from 0 to n.

        Returns:
            float32 ``[B]``.

        Raises:
            IdOutOfRangeError, InvalidOffsetsError, DtypeError, ValueError.
        """
        given = (dense, indices) if offsets is None else (dense, indices, offsets)
        if offsets is None:
            if not isinstance(indices, Bags) or not indices.is_plain:
                return self._by_model(*given)
            indices, offsets = indices.indices, indices.offsets
        if self.model.training or not self._takes(dense, indices, offsets):
            return self._by_model(*given)
        bags = Bags(indices, offsets, num_features=len(self.model.embeddings.features))
        if dense.is_cpu:
            bags.check_offsets()
        with self._lock:
            captured = self._capture_of(len(dense), len(indices))
            if captured is not None:
                return self._replay(captured, dense, bags)
        return self._by_model(*given)

    def program(self) -> None:
        """There is no native call: what :meth:`CompiledPath.program` gives on the CPU."""
        return None

    # ------------------------------------------------------------------------------------------------ batches

    def _takes(self, dense: Tensor, indices: Tensor, offsets: Tensor) -> bool:
        tensors = dense, indices, offsets
        if any(type(tensor) is not Tensor for tensor in tensors):
            return False
        features, samples = len(self.model.embeddings.features), dense.shape[0] if dense.dim() else 0
        return (
            (dense.dim(), indices.dim(), offsets.dim()) == (2, 1, 1)
            and samples > 0
            and dense.shape[1] == self.model.num_dense
            and offsets.shape[0] == features * samples + 1
            and dense.dtype is torch.float32
            and {indices.dtype, offsets.dtype} <= {torch.int64, torch.int32}
            and len({tensor.device for tensor in tensors}) == 1
            and (dense.is_cpu or dense.device == self.device)
        )

    def _replay(self, captured: _Captured, dense: Tensor, bags: Bags) -> Tensor:
        faults = self._graphs.faults
        with self._graphs.turn():
            faults.raise_if_arrived()  # of an earlier call
            captured.fill(dense, bags)
            captured.replay()
            faults.start_copy()
            scores = captured.scores[: len(dense)]
            if not dense.is_cpu:
                return scores.clone()
            scores = scores.to("cpu", copy=True)  # waits, for the counter of faults as well
            try:
                faults.raise_if_arrived()
            except IdOutOfRangeError:
                bounds = [f.num_embeddings if f.has_rows else None for f in self.model.embeddings.features]
                bags.check_ids(bounds)  # says where
                raise
            return scores

    @torch.no_grad()
    def _by_model(self, dense: Tensor, *bags: Any) -> Tensor:
        where = next(self.model.parameters()).device
        there = [each.to(where) if isinstance(each, Tensor | Bags) else each for each in (dense, *bags)]
        return self.model(*there).sigmoid().to(dense.device)

    # ------------------------------------------------------------------------------------------------- graphs

    def _capture_of(self, samples: int, ids: int) -> _Captured | None:
        """The graph for so many samples and IDs; None: there is none."""
        if self._watch.changed():
            self._captured.clear()
            self.reasons.clear()
            try:
                device, watch = check_on_one_device(self.model), watch_of(self.model)
            except PathCompileError:  # the model has changed into one that cannot be captured
                return None
            if device != self.device:
                return None
            self._watch = watch
        bucket = self._bucket(samples, ids)
        if bucket is None or bucket in self.reasons:
            return None
        captured = self._captured.get(bucket)
        if captured is None:
            try:
                captured = self._captured[bucket] = _Captured(self.model, bucket, self.device, self._graphs)
            except Exception as error:
                self.reasons[bucket] = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"mprec: batches of up to {bucket.samples} samples and {bucket.ids} IDs are scored "
                    f"without a CUDA graph: {self.reasons[bucket]}",
                    stacklevel=3,
                )
        return captured

    def _bucket(self, samples: int, ids: int) -> Bucket | None:
        size = next((size for size in self.buckets if size >= samples), None)
        if size is None:
            return None
        bags = size * len(self.model.embeddings.features)
        room = bags
        while room < ids:
            room *= 2
        return Bucket(size, room) if room <= _MOST_IDS * bags else None

    def __reduce__(self):
        return CapturedPath, (self.model, self.precision, self.buckets)

    def __repr__(self) -> str:
        return f"CapturedPath({type(self.model).__name__}, {self.precision}, {self.device})"


class _Captured:
    """A bucket's inputs and scores, which stay where they are, and the graph from the ones to the others."""

    def __init__(self, model: nn.Module, bucket: Bucket, device: torch.device, graphs: Graphs) -> None:
        self.model, (samples, ids) = model, bucket
        self._features, self._filled = len(model.embeddings.features), 0
        whole = {"dtype": torch.int64, "device": device}
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            self._dense = torch.zeros(samples, model.num_dense, device=device, dtype=torch.float32)
            self._indices = torch.zeros(ids, **whole)
            self._offsets = torch.zeros(self._features * samples + 1, **whole)
            self._count = torch.zeros(1, **whole)
            bag = torch.arange(self._features * samples + 1, **whole)
            self._feature, self._sample = bag // samples, bag % samples
            self.scores = torch.zeros(samples, device=device, dtype=torch.float32)
            self.replay = graphs.capture(self._score)

    def _score(self) -> None:
        # Offsets come as the batch has them, of B samples a feature. A sample from B on gets the end of the
        # feature's last bag: where the next feature begins.
        at = self._feature * self._count + torch.minimum(self._sample, self._count)
        bags = Bags(self._indices, self._offsets.index_select(0, at), num_features=self._features)
        self.scores.copy_(self.model(self._dense, bags).sigmoid())

    def fill(self, dense: Tensor, bags: Bags) -> None:
        samples = len(dense)
        self._dense[:samples].copy_(dense, non_blocking=True)
        if samples < self._filled:
            self._dense[samples : self._filled].zero_()
        self._filled = samples
        self._indices[: len(bags.indices)].copy_(bags.indices, non_blocking=True)
        self._offsets[: len(bags.offsets)].copy_(bags.offsets, non_blocking=True)
        self._count.fill_(samples)


def check_on_one_device(model: nn.Module) -> torch.device:
    """Where the model is. ``PathCompileError``: not captured, and why."""
    check_model(model)
    for name, member in members_of(model.embeddings):
        if does_more(member) or (isinstance(member, DeepHashEmbeddingBag) and member.runs_layers()):
            raise PathCompileError(
                f"embeddings: {name} has to be called for its bags alone, which waits for them"
            )
    dense = [model.top] if model.bottom is None else [model.bottom, model.top]
    for parameter in (parameter for part in dense for parameter in part.parameters()):
        if parameter.dtype is not torch.float32:
            raise PathCompileError(f"model: expected dense layers in float32, got {parameter.dtype}")
    devices = sorted({str(tensor.device) for tensor in (*model.parameters(), *model.buffers())})
    if len(devices) != 1:
        raise PathCompileError(f"model: expected all weights on one device, got {', '.join(devices)}")
    return torch.device(devices[0])


def members_of(collection: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """What a collection reads in place of calling it, by name."""
    for part in PARTS:
        for feature, member in getattr(collection._modules.get(part.container), "_modules", {}).items():
            parts = [member, *(member._modules[name] for name in _READ if name in member._modules)]
            yield from ((f"{part.container}.{feature}", each) for each in parts)


def watch_of(model: nn.Module) -> PlaceWatch:
    """Of all places where modules, tensors and hooks stand. ``PathCompileError``: one cannot be watched."""
    places: list[tuple[dict, str | None]] = [(model.__dict__, "interaction")]
    for module in model.modules():
        owners: Iterable[dict] = (module._modules, module._parameters, module._buffers)
        places += [(owner, key) for owner in owners for key in owner]
        places += size_places(module)
    try:
        return PlaceWatch(places)
    except ValueError as error:
        raise PathCompileError(f"model: {error}") from error


def _graphs_of(device: torch.device) -> Graphs:
    if device.type != "cuda":
        raise PathCompileError(f"model: expected one on CUDA, got one on {device}")
    try:
        from mprec.triton_kernels.graphs import Graphs
    except ImportError as error:
        raise PathCompileError(f"graphs need Triton, whose kernels they hold: {error}") from error
    return Graphs(device)
