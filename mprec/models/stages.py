"""A collection of embeddings as stages of a native program: where its rows lie, which decoders it has, and
what stands before them.

All that a program copies is read by :meth:`Stages.packed`, once the places are watched.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mprec.cache import CachedEmbeddingBagCollection
from mprec.cache.rows import Rows
from mprec.errors import PathCompileError
from mprec.layers import does_more
from mprec.names import MODES
from mprec.nn import (
    EmbeddingBagCollection,
    LowRankEmbeddingBagCollection,
    MeanForUnseen,
    QuantizedEmbeddingBagCollection,
    QuantizedTable,
)
from mprec.ops._decoders import packed_decoder
from mprec.representations import DHE, TABLE
from mprec.representations.hot import Hot
from mprec.representations.low_rank import LOW_RANK

__all__ = ["Stages", "dense_weights", "stages_of"]


class _At(NamedTuple):
    """Which vector a stage makes: of a feature, the part, pooled so."""

    feature: int
    part: int
    mode: int


class _Table(NamedTuple):
    """Where the rows of a table lie."""

    tensors: dict
    key: str
    bits: int = 8  # of a number of quantised rows
    window: tuple[int, int] | None = None  # which rows; None: all
    projection: tuple[Tensor, Tensor | None] | None = None  # matrix [r, D], bias [D], of low rank

    def packed(self, at: _At) -> tuple:
        matrix = None if self.projection is None else (self.projection[0].contiguous(), self.projection[1])
        return self.tensors, self.key, *at, self.bits, self.window, matrix


class _Decoder(NamedTuple):
    """Arguments of :func:`mprec.ops._decoders.packed_decoder`."""

    stack: tuple[Any, ...]

    def packed(self, at: _At) -> tuple:
        return packed_decoder(*self.stack), *at


class _Hot(NamedTuple):
    """Rows of the IDs ``ids``, over a rest for all others below ``num_embeddings``."""

    ids: Tensor
    num_embeddings: int
    rows: _Table
    rest: _Table | _Decoder

    def packed(self, at: _At) -> tuple:
        return self.ids, self.num_embeddings, *at, self.rows.packed(at), self.rest.packed(at)


class Stages:
    """The stages of a collection whose vectors have ``dim`` numbers.

    Attributes:
        places: of all weights that a program copies, and of the modules that hold them.
    """

    def __init__(self, dim: int) -> None:
        self.dim, self._parts = dim, 0  # vectors of `dim` so far
        self.places: list[tuple[dict, str | None]] = []
        self._tables: list[tuple[_Table, _At]] = []
        self._decoders: list[tuple[_Decoder, _At]] = []
        self._hot: list[tuple[_Hot, _At]] = []
        self._cached: list[tuple[Rows, list[int], int]] = []
        self._unseen: MeanForUnseen | None = None

    def packed(self) -> dict[str, list]:
        """Arguments of ``PathProgram``."""
        return {
            "tables": [table.packed(at) for table, at in self._tables],
            "decoders": [decoder.packed(at) for decoder, at in self._decoders],
            "cached": [(rows.native, parts, mode, rows.admit) for rows, parts, mode in self._cached],
            "hot": [hot.packed(at) for hot, at in self._hot],
            "unseen": [] if self._unseen is None else _unseen(self._unseen, self.dim),
        }

    def add_features(self, collection: EmbeddingBagCollection) -> None:
        """Of modules by feature; decoders behind caches are stages of their own."""
        cached = isinstance(collection, CachedEmbeddingBagCollection)
        containers = dict.fromkeys(part.container for f in collection.features for part in f.parts)
        self.places += [(collection._modules, container) for container in containers]
        for i, feature in enumerate(collection.features):
            for part in feature.parts:
                at = _At(i, self._parts, MODES[feature.mode])
                width = 1
                if part is DHE and cached:
                    self._parts += 1
                    continue
                modules = collection._modules[part.container]._modules
                where = f"embeddings.{part.container}.{feature.name}"
                self.places.append((modules, feature.name))
                module = modules[feature.name]
                _check_read(module, where)
                if part is TABLE:
                    self._tables.append((self._rows(module, where), at))
                    # Rows may be several parts long: a hybrid's, decoded once. Another width is refused with
                    # the rows themselves.
                    width = max(1, feature.embedding_dim // self.dim)
                elif part is LOW_RANK:
                    self._tables.append((self._low_rank(module, where), at))
                elif part is DHE:
                    precision = "float32"
                    if isinstance(collection, QuantizedEmbeddingBagCollection):
                        precision = collection.decoder_precision[feature.name]
                    self._decoders.append((self._decoder(module, where, precision), at))
                elif isinstance(part, Hot):
                    self._hot.append((self._hot_rows(part, module, where), at))
                else:
                    raise PathCompileError(
                        f"embeddings: feature {feature.name!r}: {feature.representation} is not compiled"
                    )
                self._parts += width

    def add_caches(self, collection: CachedEmbeddingBagCollection) -> None:
        for rows, columns, mode in collection.cached_groups():
            if rows.bound() is None:
                raise PathCompileError(
                    "embeddings.dhe: a decoder behind a cache has layers that cannot be packed, or whose "
                    "changes cannot be noticed"
                )
            self.places += rows.places()
            self._cached.append((rows, [column // self.dim for column in columns], mode))

    def add_codes(self, collection: LowRankEmbeddingBagCollection) -> None:
        """Of rows of low rank for serving, which lie in one tensor."""
        if not collection.codes.is_cpu:
            raise PathCompileError("embeddings.codes: expected codes on the CPU")
        self.places += [(collection._buffers, "projections"), (collection._buffers, "biases")]
        matrices, biases = (
            dense_weights(collection._buffers[key], f"embeddings.{key}") for key in ("projections", "biases")
        )
        start = 0
        for i, feature in enumerate(collection.features):
            stop = start + feature.num_embeddings
            rows = _Table(collection._buffers, "codes")
            rows = rows._replace(window=(start, stop), projection=(matrices[i], biases[i]))
            self._tables.append((rows, _At(i, i, MODES[feature.mode])))
            start = stop

    def add_unseen(self, module: MeanForUnseen) -> None:
        """Before the stages of its collection."""
        self.places += [(module._buffers, name) for name in module._buffers]
        self.places.append((module._modules, "collection"))
        dense_weights(module.corrections, "embeddings.corrections")
        self._unseen = module

    def _rows(self, module: nn.Module, where: str) -> _Table:
        _check_read(module, where)
        if isinstance(module, QuantizedTable):
            if not module.rows.is_cpu:
                raise PathCompileError(f"{where}: expected rows on the CPU")
            return _Table(module._buffers, "rows", module.bits)
        if "weight" not in module._parameters:
            raise PathCompileError(f"{where}: its weight is parametrised, or not its own")
        dense_weights(module._parameters["weight"], where)
        return _Table(module._parameters, "weight")

    def _low_rank(self, module: nn.Module, where: str) -> _Table:
        self.places += [(module._modules, "rows"), (module._modules, "projection")]
        if type(module.projection) is not nn.Linear or module.projection.bias is not None:
            raise PathCompileError(f"{where}.projection: expected a torch.nn.Linear without bias")
        self.places.append((module.projection._parameters, "weight"))
        weight = dense_weights(module.projection.weight, f"{where}.projection")
        return self._rows(module.rows, where)._replace(projection=(weight.T, None))

    def _hot_rows(self, part: Hot, module: nn.Module, where: str) -> _Hot:
        self.places += [(module._modules, "hot"), (module._modules, "rest"), (module._buffers, "ids")]
        self.places.append((module.__dict__, "num_embeddings"))
        if module.ids.dtype is not torch.int64 or not module.ids.is_cpu:
            raise PathCompileError(f"{where}.ids: expected int64 on the CPU, got {module.ids.dtype}")
        if part.rest is DHE:
            rest: Any = self._decoder(module.rest, f"{where}.rest", "float32")
        else:
            rest = self._low_rank(module.rest, f"{where}.rest")
        rows = self._rows(module.hot, f"{where}.hot")
        return _Hot(module.ids.contiguous(), module.num_embeddings, rows, rest)

    def _decoder(self, module: nn.Module, where: str, precision: str) -> _Decoder:
        _check_read(module, where)
        if precision == "float8":
            raise PathCompileError(f"{where}: float8 decoders are for CUDA")
        self.places += [(module.__dict__, "config"), (module._buffers, "coefficients")]
        self.places.append((module._modules, "decoder"))
        if module.runs_layers():
            raise PathCompileError(f"{where}: a layer of its decoder does more than read its weights")
        for layer, linear in module.decoder._modules.items():
            self.places.append((module.decoder._modules, layer))
            for key in ("weight", "bias"):
                if key not in linear._parameters:
                    raise PathCompileError(f"{where}: layer {layer} is parametrised")
                dense_weights(linear._parameters[key], f"{where}: {key} of layer {layer}")
                self.places.append((linear._parameters, key))
        config = module.config
        return _Decoder(
            (*module.stack(), config.family, config.activation, config.last_activation, precision)
        )


def _check_read(member: nn.Module, where: str) -> None:
    if does_more(member):
        raise PathCompileError(f"{where}: does more than look up by its weights: it has to be called")


def _unseen(module: MeanForUnseen, dim: int) -> list[tuple]:
    """Of each feature some IDs of which are unseen, as ``PathProgram`` takes it."""
    stages, column = [], 0
    for f, width in enumerate(module.output_dims):
        begin, column = column, column + width
        if not (size := int(module.sizes[f])):
            continue
        start, correction = int(module.starts[f]), module.corrections[f]
        if torch.count_nonzero(correction) != torch.count_nonzero(correction[begin:column]):
            raise PathCompileError(f"embeddings.corrections[{f}]: expected zeros in other features' columns")
        known = module.known[start : start + size].to(torch.uint8)
        proxy, averaged = int(module.proxies[f]), bool(module.averaged[f])
        stages.append((f, begin // dim, known, proxy, averaged, correction[begin:column].contiguous()))
    return stages


def stages_of(collection: nn.Module, dim: int) -> Stages:
    """``PathCompileError``: what has no stage, and why."""
    kind = type(collection)
    if kind is MeanForUnseen and type(collection.collection) is not MeanForUnseen:
        stages = stages_of(collection.collection, dim)
        stages.add_unseen(collection)
        return stages
    stages = Stages(dim)
    if kind is LowRankEmbeddingBagCollection:
        stages.add_codes(collection)
    elif kind in (EmbeddingBagCollection, QuantizedEmbeddingBagCollection):
        stages.add_features(collection)
    elif kind is CachedEmbeddingBagCollection:
        stages.add_features(collection)
        stages.add_caches(collection)
    else:
        raise PathCompileError(
            "embeddings: expected an EmbeddingBagCollection, cached, quantised, of low rank or with "
            f"MeanForUnseen, got {kind.__name__}"
        )
    return stages


def dense_weights(tensor: Tensor, name: str) -> Tensor:
    """The tensor without its gradient; ``PathCompileError`` unless it is one of torch's own, of float32 on
    the CPU."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype is not torch.float32 or not tensor.is_cpu:
        raise PathCompileError(
            f"{name}: expected a float32 tensor on the CPU, got {type(tensor).__name__} of {tensor.dtype} on "
            f"{tensor.device}"
        )
    return tensor.detach()
