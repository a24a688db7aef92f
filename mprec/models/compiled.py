"""A model's whole path as one native call: from a batch to click probabilities without a step of Python's,
and without its interpreter lock.

    path = mprec.compile_path(model)
    scores = path(dense, bags)  # [B], as model(dense, bags).sigmoid()
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mprec._native import PathProgram, WeightWatch
from mprec.bags import Bags
from mprec.errors import IdOutOfRangeError, InvalidOffsetsError, PathCompileError
from mprec.layers import size_places
from mprec.models.dlrm import DLRM
from mprec.models.stages import dense_weights, stages_of
from mprec.names import ACTIVATIONS
from mprec.ops.pooling import run_program

__all__ = ["PRECISIONS", "CompiledPath", "check_model", "check_precision"]

#: Of dense layers.
PRECISIONS = ("float32", "bfloat16", "int8")


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
        """Bytes of the packed dense layers, and of lists of hot IDs."""
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
        constant = dense_weights(model.constant, "constant")
    else:
        places.append((model._modules, "bottom"))
        bottom = _layers(model.bottom, "bottom", places)
    weights, biases, activations = _layers(model.top, "top", places)
    if activations[-1] != ACTIVATIONS["none"]:
        raise PathCompileError("top: expected no activation after the last layer, which gives logits")
    activations[-1] = ACTIVATIONS["sigmoid"]
    stages = stages_of(model.embeddings, model.embedding_dim)
    places += stages.places
    watch = WeightWatch.of(places)  # before packing: no change in between may go unnoticed
    if watch is None:
        raise PathCompileError("weights: made in inference mode, so that their changes cannot be noticed")
    packed = stages.packed()
    try:
        return PathProgram(
            num_features=len(model.embeddings.features),
            num_dense=model.num_dense,
            dim=model.embedding_dim,
            bottom=bottom,
            constant=constant,
            top=(weights, biases, activations),
            mixing=_mixing(model._mixing),
            interaction="cat" if model.interaction == "cat" else "dot",
            watch=watch,
            precision=precision,
            **packed,
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
            places += [(layer._parameters, key) for key in ("weight", "bias")]
            weights.append(dense_weights(layer.weight, f"{name}[{position}].weight"))
            if layer.bias is None:
                biases.append(torch.zeros(layer.out_features, dtype=torch.float32))
            else:
                biases.append(dense_weights(layer.bias, f"{name}[{position}].bias"))
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


def _mixing(matrix: Tensor | None) -> list[tuple[int, int, float]]:
    """Terms (vector, part, weight); vector 0 is the bottom MLP's."""
    if matrix is None:
        return []
    return list(_terms(dense_weights(matrix, "mixing")))


def _terms(matrix: Tensor) -> Iterator[tuple[int, int, float]]:
    for vector, row in enumerate(matrix.tolist(), 1):
        terms = [(vector, part, weight) for part, weight in enumerate(row) if weight != 0]
        yield from terms or [(vector, 0, 0.0)]
