"""``torch.ops.mprec.mlp`` and ``dot_interaction``: schemas, implementations, gradients."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mprec import reference
from mprec._native import _C
from mprec.names import ACTIVATIONS, code
from mprec.ops import _autograd
from mprec.ops._checks import check_floats, check_same_device
from mprec.ops._common import direct, library, native, plain
from mprec.ops._decoders import _kept
from mprec.ops._dhe_gradient import _activation_gradient

library.define(
    "mlp(Tensor input, Tensor[] weights, Tensor[] biases, str activation, str last_activation) -> Tensor"
)
library.define("dot_interaction(Tensor vectors, bool self_interaction=False) -> Tensor")
library.define("dot_interaction_backward(Tensor grad, Tensor vectors, bool self_interaction) -> Tensor")


def pairs(count: int, self_interaction: bool) -> int:
    """How many products ``count`` vectors have."""
    return count * (count - 1) // 2 + (count if self_interaction else 0)


# ----------------------------------------------------------------------------------------------------- MLP


def _packed(weights: Sequence[Tensor], biases: Sequence[Tensor], activations: tuple[int, ...]) -> "_C.Mlp":
    """The native MLP: kept from an earlier call while its tensors stay as they are, as decoders are."""
    first = weights[0]
    key = id(first), "mlp"
    found = _kept.get(key)
    if (
        found is not None
        and found[0]() is first
        and found[1] == activations
        and _C.same_stack(found[2], first, weights, biases, torch.is_grad_enabled() and first.requires_grad)
    ):
        return found[3]
    watch = _C.StackWatch.of(first, weights, biases)  # before packing: no change may go unnoticed
    handle = _C.Mlp([w.detach() for w in weights], [b.detach() for b in biases], list(activations))
    if watch is not None:
        _kept[key] = weakref.ref(first, lambda _: _kept.pop(key, None)), activations, watch, handle
    return handle


def _check_mlp(input: Tensor, weights, biases, activation: str, last_activation: str) -> tuple[int, ...]:
    """The activations' numbers; ``ValueError`` or ``DtypeError`` if the arguments make no MLP."""
    between = code(ACTIVATIONS, activation, "activation")
    last = code(ACTIVATIONS, last_activation, "last_activation")
    check_same_device(input=input, weights=weights, biases=biases)
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"weights, biases: expected one of each per layer, at least one layer, got {len(weights)} and "
            f"{len(biases)}"
        )
    if input.dim() != 2:
        raise ValueError(f"input: expected [B, {weights[0].shape[-1]}], got {list(input.shape)}")
    check_floats(input, "input")
    columns = input.shape[1]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.dtype != input.dtype or bias.dtype != input.dtype:
            raise TypeError(
                f"layer {layer}: expected {input.dtype} as input, got weight {weight.dtype}, "
                f"bias {bias.dtype}"
            )
        if weight.dim() != 2 or weight.shape[1] != columns or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"layer {layer}: expected weight [out, {columns}] and bias [out], got {list(weight.shape)} "
                f"and {list(bias.shape)}"
            )
        columns = weight.shape[0]
    return (*[between] * (len(weights) - 1), last)


def _mlp(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], activation: str, last_activation: str
) -> Tensor:
    activations = _check_mlp(input, weights, biases, activation, last_activation)
    if input.is_cpu and native(input) and all(min(w.shape) > 0 for w in weights):
        out = torch.empty(len(input), len(weights[-1]))
        _C.mlp(_packed(weights, biases, activations), plain(input), out, torch.get_num_threads())
        return out
    return reference.mlp(input, weights, biases, activation, last_activation, dtype=_wide(input)).to(
        input.dtype
    )


def _wide(tensor: Tensor) -> torch.dtype:
    """What a value without a native kernel is computed in: float64, on a GPU its own."""
    return torch.float64 if tensor.is_cpu else tensor.dtype


def _mlp_fake(input, weights, biases, activation, last_activation):
    return input.new_empty(input.shape[0], weights[-1].shape[0])


def _mlp_formula(input, weights, biases, activation, last_activation):
    _check_mlp(input, weights, biases, activation, last_activation)
    return reference.mlp(input, weights, biases, activation, last_activation, dtype=input.dtype)


def _mlp_gradients(grad, x, weights, biases, activation, last_activation, need_input):
    """Of the input (None if not needed), then of weights and biases.

    Layers' inputs are computed again: keeping them would cost a copy out of the kernel's blocks.
    """
    last = len(weights) - 1
    inputs, sums = [], []
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        inputs.append(x)
        sums.append(F.linear(x, weight, bias))
        if layer < last:
            x = reference.activate(sums[-1], activation)
    grad_weights, grad_biases = [], []
    for layer in range(last, -1, -1):
        grad = _activation_gradient(grad, sums[layer], last_activation if layer == last else activation)
        grad_weights.append(grad.t() @ inputs[layer])
        grad_biases.append(grad.sum(0))
        grad = grad @ weights[layer] if layer or need_input else None
    return grad, *grad_weights[::-1], *grad_biases[::-1]


class _MlpByKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, keyset, activations, input, *parameters):
        half = len(parameters) // 2
        ctx.activations = activations
        ctx.save_for_backward(input, *parameters)
        return _autograd.below(op, keyset, input, parameters[:half], parameters[half:], *activations)

    @staticmethod
    def backward(ctx, grad):
        input, *parameters = ctx.saved_tensors
        half = len(parameters) // 2
        weights, biases = parameters[:half], parameters[half:]
        if _autograd.differentiate_again(grad, input, *parameters):
            with torch.enable_grad():
                out = _mlp_formula(input, weights, biases, *ctx.activations)
            grads = _autograd.gradients_of(out, [input, *parameters], grad)
        else:
            need_input = ctx.needs_input_grad[3]
            grads = _mlp_gradients(grad, input, weights, biases, *ctx.activations, need_input)
        return None, None, None, *grads


def _differentiable_mlp(op, keyset, input, weights, biases, *activations):
    return _MlpByKernel.apply(op, keyset, activations, input, *weights, *biases)


def mlp(
    input: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    activation: str = "relu",
    last_activation: str = "none",
) -> Tensor:
    """A stack of linear layers: each ``activation(x weight^T + bias)``, the last with ``last_activation``.

    Args:
        input: ``[B, inputs]``, of a floating dtype that all tensors share.
        weights, biases: ``[out, in]`` and ``[out]`` of each layer.
        activation, last_activation: ``"none"``, ``"relu"``, ``"sigmoid"`` or ``"mish"``.

    Returns:
        ``[B, outputs]``.

    Raises:
        ValueError, DtypeError, DeviceError: arguments that do not fit together.
    """
    if direct(input, *weights, *biases):
        return _mlp(input, weights, biases, activation, last_activation)
    return torch.ops.mprec.mlp(input, weights, biases, activation, last_activation)


# -------------------------------------------------------------------------------------------- interaction


def _check_vectors(vectors: Tensor) -> None:
    if vectors.dim() != 3:
        raise ValueError(f"vectors: expected [B, V, D], got {list(vectors.shape)}")
    check_floats(vectors, "vectors")


def _is_native(vectors: Tensor) -> bool:
    return vectors.is_cpu and native(vectors) and 0 < vectors.shape[1] <= 4096 and vectors.shape[2] > 0


def _dot_interaction(vectors: Tensor, self_interaction: bool = False) -> Tensor:
    _check_vectors(vectors)
    if _is_native(vectors):
        out = torch.empty(len(vectors), pairs(vectors.shape[1], self_interaction))
        _C.dot_interaction(plain(vectors), self_interaction, out, torch.get_num_threads())
        return out
    return reference.dot_interaction(vectors, self_interaction, dtype=_wide(vectors)).to(vectors.dtype)


def _dot_interaction_fake(vectors, self_interaction=False):
    return vectors.new_empty(vectors.shape[0], pairs(vectors.shape[1], self_interaction))


def _dot_interaction_backward(grad: Tensor, vectors: Tensor, self_interaction: bool) -> Tensor:
    if _is_native(vectors) and native(grad):
        out = torch.empty(vectors.shape)
        vectors, grad = plain(vectors), plain(grad)
        _C.dot_interaction_backward(grad, vectors, self_interaction, out, torch.get_num_threads())
        return out
    count = vectors.shape[1]
    rows, columns = torch.tril_indices(count, count, 0 if self_interaction else -1, device=grad.device)
    square = grad.new_zeros(len(grad), count, count)
    square[:, rows, columns] = grad
    return (square + square.transpose(1, 2)) @ vectors


def _dot_interaction_backward_fake(grad, vectors, self_interaction):
    return vectors.new_empty(vectors.shape)


def _interaction_formula(vectors, self_interaction):
    _check_vectors(vectors)
    return reference.dot_interaction(vectors, self_interaction, dtype=vectors.dtype)


class _InteractionByKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, keyset, vectors, self_interaction):
        ctx.self_interaction = self_interaction
        ctx.save_for_backward(vectors)
        return _autograd.below(op, keyset, vectors, self_interaction)

    @staticmethod
    def backward(ctx, grad):
        (vectors,) = ctx.saved_tensors
        if _autograd.differentiate_again(grad, vectors):
            with torch.enable_grad():
                out = _interaction_formula(vectors, ctx.self_interaction)
            (found,) = _autograd.gradients_of(out, [vectors], grad)
        else:
            found = torch.ops.mprec.dot_interaction_backward(grad, vectors, ctx.self_interaction)
        return None, None, found, None


def dot_interaction(vectors: Tensor, self_interaction: bool = False) -> Tensor:
    """Dot products of all pairs of each sample's vectors.

    Args:
        vectors: ``[B, V, D]``.
        self_interaction: of each vector with itself, too.

    Returns:
        ``[B, V (V - 1) / 2]``, with ``self_interaction`` ``[B, V (V + 1) / 2]``: products (1,0) (2,0) (2,1)
        (3,0) and so on, the lower triangle row by row, in torchrec's and Facebook's DLRM order.

    Raises:
        ValueError, DtypeError: not three dimensions, or not floating.
    """
    if direct(vectors):
        return _dot_interaction(vectors, self_interaction)
    return torch.ops.mprec.dot_interaction(vectors, self_interaction)


for _name, _forward, _fake in (
    ("mlp", _mlp, _mlp_fake),
    ("dot_interaction", _dot_interaction, _dot_interaction_fake),
    ("dot_interaction_backward", _dot_interaction_backward, _dot_interaction_backward_fake),
):
    library.impl(_name, _forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mprec::{_name}", _fake, lib=library)
_autograd.register("mlp", _differentiable_mlp, _mlp_formula)
_autograd.register("dot_interaction", _InteractionByKernel.apply, _interaction_formula)
