"""``torch.ops.mprec.mlp`` and ``dot_interaction``: schemas, implementations, gradients."""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mprec import reference
from mprec._native import _C
from mprec.errors import DtypeError
from mprec.kernels import kernel
from mprec.names import ACTIVATIONS, code
from mprec.ops._checks import check_floats, check_same_device
from mprec.ops._common import all_float32, can_skip_dispatcher
from mprec.ops._decoders import _handles
from mprec.ops._table import Op
from mprec.tensors import plain


def pairs(count: int, self_interaction: bool) -> int:
    """How many products ``count`` vectors have."""
    return count * (count - 1) // 2 + (count if self_interaction else 0)


# ----------------------------------------------------------------------------------------------------- MLP


class Mlp(NamedTuple):
    """The call."""

    input: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    activation: str
    last_activation: str

    @property
    def device(self) -> str:
        return self.input.device.type


def _kept(first: Tensor, activations: tuple[str, str]) -> "tuple[_C.StackWatch, _C.Mlp] | None":
    """The native MLP of an earlier call whose first weight was ``first``, and what watches its weights."""
    found = _handles.get((id(first), "mlp"))
    return found[2:] if found is not None and found[0]() is first and found[1] == activations else None


def _packed(call: Mlp) -> "_C.Mlp":
    """The native MLP: kept from an earlier call while its tensors stay as they are, as decoders are."""
    _, weights, biases, *names = call
    activations, first = tuple(names), weights[0]
    found = _kept(first, activations)
    thorough = torch.is_grad_enabled() and first.requires_grad
    if found is not None and _C.same_stack(found[0], first, weights, biases, thorough):
        return found[1]
    key = id(first), "mlp"
    watch = _C.StackWatch.of(first, weights, biases)  # before packing: no change may go unnoticed
    codes = [ACTIVATIONS[call.activation]] * (len(weights) - 1) + [ACTIVATIONS[call.last_activation]]
    handle = _C.Mlp([w.detach() for w in weights], [b.detach() for b in biases], codes)
    if watch is not None:
        _handles[key] = weakref.ref(first, lambda _: _handles.pop(key, None)), activations, watch, handle
    return handle


def _check_mlp(call: Mlp) -> Mlp:
    """``ValueError`` or ``DtypeError`` if the arguments make no MLP."""
    input, weights, biases, activation, last_activation = call
    code(ACTIVATIONS, activation, "activation")
    code(ACTIVATIONS, last_activation, "last_activation")
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
    return call


@kernel(
    "mlp",
    device="cpu",
    supports=lambda call: all_float32(call.input) and all(min(w.shape) > 0 for w in call.weights),
)
def _native_mlp(call: Mlp) -> Tensor:
    out = torch.empty(len(call.input), len(call.weights[-1]), dtype=torch.float32)
    _C.mlp(_packed(call), plain(call.input), out, torch.get_num_threads())
    return out


def _wide(tensor: Tensor) -> torch.dtype:
    """What a value without a native kernel is computed in: float64, on a GPU its own."""
    return torch.float64 if tensor.is_cpu else tensor.dtype


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
        grad = reference.activation_gradient(
            grad, sums[layer], last_activation if layer == last else activation
        )
        grad_weights.append(grad.t() @ inputs[layer])
        grad_biases.append(grad.sum(0))
        grad = grad @ weights[layer] if layer or need_input else None
    return grad, *grad_weights[::-1], *grad_biases[::-1]


def _gradient_of_mlp(op: Op, arguments, grad: Tensor, wanted) -> dict:
    input, weights, biases, *activations = arguments
    need_input = "input" in wanted
    grad, *grads = _mlp_gradients(grad, input, weights, biases, *activations, need_input)
    return {"input": grad, "weights": grads[: len(weights)], "biases": grads[len(weights) :]}


MLP = Op(
    "mlp(Tensor input, Tensor[] weights, Tensor[] biases, str activation, str last_activation) -> Tensor",
    call=Mlp,
    check=_check_mlp,
    fake=lambda call: call.input.new_empty(call.input.shape[0], call.weights[-1].shape[0]),
    reference=lambda call: reference.mlp(*call, dtype=_wide(call.input)).to(call.input.dtype),
    formula=lambda call: reference.mlp(*call, dtype=call.input.dtype),
    gradient=_gradient_of_mlp,
)


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
    if can_skip_dispatcher(input, *weights, *biases):
        if weights and (found := _kept(weights[0], (activation, last_activation))) is not None:
            watch, handle = found
            out = _C.try_mlp_kept(handle, watch, input, weights, biases, torch.get_num_threads())
            if isinstance(out, Tensor):
                return out
        return MLP.run(input, weights, biases, activation, last_activation)
    return torch.ops.mprec.mlp(input, weights, biases, activation, last_activation)


# -------------------------------------------------------------------------------------------- interaction


class Interaction(NamedTuple):
    """The call; with ``grad``, of the gradients."""

    vectors: Tensor
    self_interaction: bool
    first: Tensor | None = None
    grad: Tensor | None = None

    @property
    def device(self) -> str:
        return self.vectors.device.type

    @property
    def columns(self) -> int:
        """Of the result."""
        _, count, dim = self.vectors.shape
        if self.first is None:
            return pairs(count, self.self_interaction)
        return dim + pairs(count + 1, self.self_interaction)


def _check_vectors(call: Interaction) -> Interaction:
    vectors, _, first, _ = call
    if vectors.dim() != 3:
        raise ValueError(f"vectors: expected [B, V, D], got {list(vectors.shape)}")
    check_floats(vectors, "vectors")
    if first is not None:
        if first.shape != (vectors.shape[0], vectors.shape[2]):
            expected = [vectors.shape[0], vectors.shape[2]]
            raise ValueError(f"first: expected {expected}, got {list(first.shape)}")
        if first.dtype != vectors.dtype:
            raise DtypeError(f"first: expected {vectors.dtype}, as vectors, got {first.dtype}")
        check_same_device(vectors=vectors, first=first)
    return call


def _is_native(call: Interaction) -> bool:
    vectors = call.vectors
    return (
        all_float32(vectors, call.first, call.grad) and 0 < vectors.shape[1] <= 4096 and vectors.shape[2] > 0
    )


@kernel("dot_interaction", device="cpu", supports=_is_native)
def _native_interaction(call: Interaction) -> Tensor:
    vectors, self_interaction, first, _ = call
    out = torch.empty(len(vectors), call.columns, dtype=torch.float32)
    first = None if first is None else plain(first)
    _C.dot_interaction(plain(vectors), self_interaction, first, out, torch.get_num_threads())
    return out


@kernel("dot_interaction_backward", device="cpu", supports=_is_native)
def _native_interaction_gradient(call: Interaction) -> list[Tensor]:
    vectors, self_interaction, first, grad = call
    out = [torch.empty(given.shape, dtype=torch.float32) for given in (vectors, first) if given is not None]
    first, out_first = (None, None) if first is None else (plain(first), out[1])
    _C.dot_interaction_backward(
        plain(grad), plain(vectors), self_interaction, first, out[0], out_first, torch.get_num_threads()
    )
    return out


def _interaction_gradient(call: Interaction) -> list[Tensor]:
    vectors, self_interaction, first, grad = call
    if first is not None:
        all_vectors, dim = torch.cat([first.unsqueeze(1), vectors], dim=1), first.shape[1]
        (found,) = _interaction_gradient(Interaction(all_vectors, self_interaction, None, grad[:, dim:]))
        return [found[:, 1:].contiguous(), found[:, 0] + grad[:, :dim]]
    count = vectors.shape[1]
    rows, columns = torch.tril_indices(count, count, 0 if self_interaction else -1, device=grad.device)
    square = grad.new_zeros(len(grad), count, count)
    square[:, rows, columns] = grad
    return [(square + square.transpose(1, 2)) @ vectors]


def _interaction(call: Interaction, dtype: torch.dtype) -> Tensor:
    result = reference.dot_interaction(call.vectors, call.self_interaction, call.first, dtype=dtype)
    return result.to(call.vectors.dtype)


def _gradient_of_interaction(op: Op, arguments, grad: Tensor, wanted) -> dict:
    found = torch.ops.mprec.dot_interaction_backward(grad, *op.complete(arguments))
    return dict(zip(("vectors", "first"), found, strict=False))


DOT_INTERACTION = Op(
    "dot_interaction(Tensor vectors, bool self_interaction=False, Tensor? first=None) -> Tensor",
    call=Interaction,
    check=_check_vectors,
    fake=lambda call: call.vectors.new_empty(call.vectors.shape[0], call.columns),
    reference=lambda call: _interaction(call, _wide(call.vectors)),
    formula=lambda call: _interaction(call, call.vectors.dtype),
    gradient=_gradient_of_interaction,
)
Op(
    "dot_interaction_backward(Tensor grad, Tensor vectors, bool self_interaction, Tensor? first) -> Tensor[]",
    call=lambda grad, *of: Interaction(*of, grad),
    fake=lambda call: [t.new_empty(t.shape) for t in (call.vectors, call.first) if t is not None],
    reference=_interaction_gradient,
)


def dot_interaction(vectors: Tensor, self_interaction: bool = False, first: Tensor | None = None) -> Tensor:
    """Dot products of all pairs of each sample's vectors.

    Args:
        vectors: ``[B, V, D]``.
        self_interaction: of each vector with itself, too.
        first: ``[B, D]``, a vector before the others that is also wanted itself: a DLRM's dense vector. This
            is ``cat([first, dot_interaction(cat([first[:, None], vectors], 1))], 1)`` without the copies. Of
            two floating dtypes the wider one is taken, as by ``torch.cat``.

    Returns:
        ``[B, V (V - 1) / 2]``, with ``self_interaction`` ``[B, V (V + 1) / 2]``: products (1,0) (2,0) (2,1)
        (3,0) and so on, the lower triangle row by row, in torchrec's and Facebook's DLRM order. With
        ``first``, ``[B, D +`` products of V + 1 vectors ``]``: ``first``, then the products.

    Raises:
        ValueError, DtypeError, DeviceError: not three dimensions, not floating, or not fitting together.
    """
    if first is not None and first.dtype != vectors.dtype:
        dtype = torch.promote_types(first.dtype, vectors.dtype)
        vectors, first = vectors.to(dtype), first.to(dtype)
    if can_skip_dispatcher(vectors, first):
        return DOT_INTERACTION.run(vectors, self_interaction, first)
    return torch.ops.mprec.dot_interaction(vectors, self_interaction, first)
