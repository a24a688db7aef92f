"""A model's whole path as one native call: from a batch to click probabilities without a step of Python's,
and without its interpreter lock.

    path = mprec.compile_path(model)
    scores = path(dense, bags)  # [B], as model(dense, bags).sigmoid()
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mprec._native import PathProgram, WeightWatch
from mprec.bags import Bags
from mprec.errors import IdOutOfRangeError, InvalidOffsetsError, PathCompileError
from mprec.layers import does_more, size_places
from mprec.models.dlrm import DLRM
from mprec.names import ACTIVATIONS, MODES
from mprec.nn import (
    EmbeddingBagCollection,
    LowRankEmbeddingBagCollection,
    QuantizedEmbeddingBagCollection,
    QuantizedTable,
)
from mprec.ops._decoders import packed_decoder
from mprec.ops.pooling import run_program
from mprec.representations import DHE, TABLE
from mprec.representations.low_rank import LOW_RANK

__all__ = ["PRECISIONS", "CompiledPath", "check_model", "check_precision"]

#: Of dense layers.
PRECISIONS = ("float32", "bfloat16", "int8")


class _Table(NamedTuple):
    """Where the rows of one part lie, as ``PathProgram`` takes it."""

    tensors: dict
    key: str
    feature: int
    part: int
    mode: int
    bits: int = 8  # of a number of quantised rows
    window: tuple[int, int] | None = None  # which rows; None: all
    projection: tuple[Tensor, Tensor | None] | None = None  # matrix [r, D], bias [D], of low rank


_ACTIVATIONS = {nn.ReLU: "relu", nn.Sigmoid: "sigmoid", nn.Mish: "mish"}


class CompiledPath:
    """What :func:`mprec.compile_path` returns for a model on the CPU. Safe for concurrent calls, which
    release the interpreter lock.

    Scores differ from the model's by the rounding of ``precision``. Once a module of the model has a hook or
    a forward pass of its own, calls go to the model, until it has none any more. So does a call that the
    native code does not take: the model serves it (IDs of other integer types, strided rows), or raises what
    it raises for such an input.

    Attributes:
        model, precision: as given.
    """

    def __init__(self, model: nn.Module, precision: str = "float32") -> None:
        check_precision(precision)
        self.model, self.precision = model, precision
        self._lock = threading.Lock()
        self._native = _pack(model, precision)

    def __call__(self, dense: Tensor, indices: Bags | Tensor, offsets: Tensor | None = None) -> Tensor:
        """Click probabilities.

        Args:
            dense: float32 ``[B, num_dense]``.
            indices: int64 or int32 ``[n]``, feature after feature; or, alone, :class:`mprec.bags.Bags` of all
                features.
            offsets: int64 or int32 ``[F * B + 1]``, from 0 to n.

        Returns:
            float32 ``[B]``.

        Raises:
            IdOutOfRangeError, InvalidOffsetsError, DtypeError, ValueError: as the model's ``forward``.
        """
        native = self._native
        if offsets is None:
            if not isinstance(indices, Bags) or not indices.is_plain:
                return self._by_model(dense, indices)
            indices, offsets = indices.indices, indices.offsets
        try:
            scores = run_program(native, dense, indices, offsets)
            while scores is None and native.changed():
                native = self._pack_again(native)
                scores = run_program(native, dense, indices, offsets)
        except PathCompileError:  # the model has changed into one that has no program
            scores = None
        except (IdOutOfRangeError, InvalidOffsetsError):  # the model says so with its features' names
            scores = None
        return self._by_model(dense, indices, offsets) if scores is None else scores

    def program(self) -> PathProgram:
        """The native call itself, its weights packed as they are now."""
        native = self._native
        while native.changed():
            native = self._pack_again(native)
        return native

    @property
    def nbytes(self) -> int:
        """Bytes of the packed dense layers."""
        return self._native.nbytes

    @torch.no_grad()
    def _by_model(self, *inputs: Any) -> Tensor:
        return self.model(*inputs).sigmoid()

    def _pack_again(self, stale: PathProgram) -> PathProgram:
        with self._lock:
            if self._native is stale:  # else another thread did
                self._native = _pack(self.model, self.precision)
            return self._native

    def __reduce__(self):
        return CompiledPath, (self.model, self.precision)

    def __repr__(self) -> str:
        return f"CompiledPath({type(self.model).__name__}, {self.precision})"


@torch.no_grad()
def _pack(model: nn.Module, precision: str) -> PathProgram:
    check_model(model)
    places: list[tuple[dict, str]] = [(model._modules, "embeddings"), (model._modules, "top")]
    places += [place for module in model.modules() for place in size_places(module)]
    places += [(model._buffers, "_mixing"), (model.__dict__, "interaction")]
    bottom = constant = None
    if model.bottom is None:
        places += [(model.__dict__, "bottom"), (model._parameters, "constant")]
        constant = _dense(model.constant, "constant")
    else:
        places.append((model._modules, "bottom"))
        bottom = _layers(model.bottom, "bottom", places)
    weights, biases, activations = _layers(model.top, "top", places)
    if activations[-1] != ACTIVATIONS["none"]:
        raise PathCompileError("top: expected no activation after the last layer, which gives logits")
    activations[-1] = ACTIVATIONS["sigmoid"]
    tables, decoders, parts = _embeddings(model.embeddings, model.embedding_dim, places)
    mixing = _mixing(model._mixing)
    _check_pairs(model, parts if model._mixing is None else len(model._mixing))
    watch = WeightWatch.of(places)  # before packing: no change in between may go unnoticed
    if watch is None:
        raise PathCompileError("weights: made in inference mode, so that their changes cannot be noticed")
    handles = [(packed_decoder(*stack), feature, part, mode) for stack, feature, part, mode in decoders]
    try:
        return PathProgram(
            len(model.embeddings.features),
            model.num_dense,
            model.embedding_dim,
            tables,
            handles,
            bottom,
            constant,
            (weights, biases, activations),
            mixing,
            "cat" if model.interaction == "cat" else "dot",
            watch,
            precision,
        )
    except (TypeError, ValueError) as error:
        raise PathCompileError(str(error)) from error


def check_precision(precision: str) -> None:
    """``ValueError`` unless dense layers can be of it."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")


def check_model(model: nn.Module) -> None:
    """``PathCompileError`` unless the model computes as a DLRM does, and nobody listens meanwhile."""
    if not isinstance(model, DLRM):
        raise PathCompileError(f"model: expected a DLRM, got {type(model).__name__}")
    for name in ("forward", "mix", "score"):
        if getattr(type(model), name) is not getattr(DLRM, name) or name in model.__dict__:
            raise PathCompileError(
                f"model: {type(model).__name__} computes in its own way: it has a {name}()"
            )
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            raise PathCompileError(f"{name or 'model'}: has forward hooks, which a native call does not run")
        if "forward" in module.__dict__:
            raise PathCompileError(f"{name or 'model'}: has a forward pass of its own")


def _dense(tensor: Tensor, name: str) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype is not torch.float32 or not tensor.is_cpu:
        raise PathCompileError(
            f"{name}: expected a float32 tensor on the CPU, got {type(tensor).__name__} of {tensor.dtype} on "
            f"{tensor.device}"
        )
    return tensor.detach()


def _layers(mlp: nn.Module, name: str, places: list) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Weights, biases and activations of a Sequential of linear layers."""
    if type(mlp) is not nn.Sequential:
        raise PathCompileError(f"{name}: expected a torch.nn.Sequential, got {type(mlp).__name__}")
    weights: list[Tensor] = []
    biases: list[Tensor] = []
    activations: list[int] = []
    for position, layer in mlp._modules.items():
        places.append((mlp._modules, position))
        kind = type(layer)
        if kind is nn.Linear:
            places += [(layer._parameters, key) for key in ("weight", "bias")] + size_places(layer)
            if "forward" in layer.__dict__:
                raise PathCompileError(f"{name}[{position}]: has a forward pass of its own")
            weights.append(_dense(layer.weight, f"{name}[{position}].weight"))
            if layer.bias is None:
                biases.append(torch.zeros(layer.out_features, dtype=torch.float32))
            else:
                biases.append(_dense(layer.bias, f"{name}[{position}].bias"))
            activations.append(ACTIVATIONS["none"])
        elif kind in _ACTIVATIONS and activations and activations[-1] == ACTIVATIONS["none"]:
            activations[-1] = ACTIVATIONS[_ACTIVATIONS[kind]]
        else:
            raise PathCompileError(
                f"{name}[{position}]: expected linear layers, each with at most one of ReLU, Sigmoid and "
                f"Mish behind it, got {kind.__name__}"
            )
    if not weights:
        raise PathCompileError(f"{name}: expected at least one linear layer")
    return weights, biases, activations


def _embeddings(
    collection: nn.Module, dim: int, places: list
) -> tuple[list[_Table], list[tuple[Any, int, int, int]], int]:
    """Tables, decoders ``(stack, feature, part, mode)``, and how many parts, vectors of ``dim``."""
    if type(collection) is LowRankEmbeddingBagCollection:
        return _codes(collection, places), [], len(collection.features)
    quantised = type(collection) is QuantizedEmbeddingBagCollection
    if not quantised and type(collection) is not EmbeddingBagCollection:
        raise PathCompileError(
            "embeddings: expected an EmbeddingBagCollection, a quantised one or one of low rank, got "
            f"{type(collection).__name__}"
        )
    tables: list[_Table] = []
    decoders: list[tuple] = []
    part = 0
    places += [(collection._modules, each.container) for each in (TABLE, LOW_RANK, DHE)]
    for i, feature in enumerate(collection.features):
        name, mode = feature.name, MODES[feature.mode]
        if not {TABLE, LOW_RANK, DHE}.issuperset(feature.parts):
            raise PathCompileError(f"embeddings: feature {name!r}: {feature.representation} is not compiled")
        for each in (TABLE, LOW_RANK):
            if each not in feature.parts:
                continue
            modules, where = (
                collection._modules[each.container]._modules,
                f"embeddings.{each.container}.{name}",
            )
            places.append((modules, name))
            module, projection = modules[name], None
            _check_read(module, where)
            if each is LOW_RANK:
                places += [(module._modules, "rows"), (module._modules, "projection")]
                places.append((module.projection._parameters, "weight"))
                if type(module.projection) is not nn.Linear or module.projection.bias is not None:
                    raise PathCompileError(f"{where}.projection: expected a torch.nn.Linear without bias")
                weight = _dense(module.projection.weight, f"{where}.projection")
                module, projection = module.rows, (weight.T.contiguous(), None)
                _check_read(module, f"{where}.rows")
            if isinstance(module, QuantizedTable):
                if not module.rows.is_cpu:
                    raise PathCompileError(f"{where}: expected rows on the CPU")
                rows = _Table(module._buffers, "rows", i, part, mode, module.bits)
            else:
                if "weight" not in module._parameters:
                    raise PathCompileError(f"{where}: its weight is parametrised, or not its own")
                _dense(module._parameters["weight"], where)
                rows = _Table(module._parameters, "weight", i, part, mode)
            tables.append(rows._replace(projection=projection))
            # A table's rows may be several parts long: a hybrid's, decoded once. Another width is refused
            # with the rows themselves.
            part += 1 if projection else max(1, feature.embedding_dim // dim)
        if feature.has_dhe:
            places.append((collection.dhe._modules, name))
            _check_read(collection.dhe._modules[name], f"embeddings.dhe.{name}")
            precision = collection.decoder_precision[name] if quantised else "float32"
            decoders.append((_stack(collection.dhe._modules[name], name, precision, places), i, part, mode))
            part += 1
    return tables, decoders, part


def _check_read(member: nn.Module, name: str) -> None:
    if does_more(member):
        raise PathCompileError(f"{name}: does more than look up by its weights: it has to be called")


def _codes(collection: LowRankEmbeddingBagCollection, places: list) -> list[_Table]:
    if not collection.codes.is_cpu:
        raise PathCompileError("embeddings.codes: expected codes on the CPU")
    places += [(collection._buffers, "projections"), (collection._buffers, "biases")]
    matrices, biases = (
        _dense(collection._buffers[key], f"embeddings.{key}") for key in ("projections", "biases")
    )
    tables, start = [], 0
    for i, feature in enumerate(collection.features):
        stop = start + feature.num_embeddings
        rows = _Table(collection._buffers, "codes", i, i, MODES[feature.mode])
        tables.append(rows._replace(window=(start, stop), projection=(matrices[i], biases[i])))
        start = stop
    return tables


def _stack(module: nn.Module, name: str, precision: str, places: list) -> tuple[Any, ...]:
    """Arguments of :func:`mprec.ops._decoders.packed_decoder`."""
    if precision == "float8":
        raise PathCompileError(f"embeddings.dhe.{name}: float8 decoders are for CUDA")
    places += [(module.__dict__, "config"), (module._buffers, "coefficients"), (module._modules, "decoder")]
    if module.runs_layers():
        raise PathCompileError(
            f"embeddings.dhe.{name}: a layer of its decoder does more than read its weights"
        )
    for layer, linear in module.decoder._modules.items():
        places.append((module.decoder._modules, layer))
        places += size_places(linear)
        for key in ("weight", "bias"):
            if key not in linear._parameters:
                raise PathCompileError(f"embeddings.dhe.{name}: layer {layer} is parametrised")
            _dense(linear._parameters[key], f"embeddings.dhe.{name}: {key} of layer {layer}")
            places.append((linear._parameters, key))
    config = module.config
    return *module.stack(), config.family, config.activation, config.last_activation, precision


def _mixing(matrix: Tensor | None) -> list[tuple[int, int, float]]:
    """Terms (vector, part, weight); vector 0 is the bottom MLP's."""
    if matrix is None:
        return []
    return list(_terms(_dense(matrix, "mixing")))


def _terms(matrix: Tensor) -> Iterator[tuple[int, int, float]]:
    for vector, row in enumerate(matrix.tolist(), 1):
        terms = [(vector, part, weight) for part, weight in enumerate(row) if weight != 0]
        yield from terms or [(vector, 0, 0.0)]


def _check_pairs(model: DLRM, embedded: int) -> None:
    if model.interaction == "cat":
        return
    rows, columns = torch.tril_indices(1 + embedded, 1 + embedded, offset=-1)
    if not torch.equal(model._pairs, rows * (1 + embedded) + columns):
        raise PathCompileError("model: its pairs are not those below the diagonal, row by row")
