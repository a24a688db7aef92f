"""What all operators share: the test for the direct path, and torch's forms of arguments."""

import torch
from torch import Tensor
from torch.nn import Parameter

from mprec.errors import DtypeError
from mprec.tracing import eager

#: What the native kernels read tables of; they add up in float32 and round once.
NATIVE_TABLES = (torch.float32, torch.float16, torch.bfloat16)

_PLAIN = (Tensor, Parameter)
_grad_enabled = torch.is_grad_enabled


def can_skip_dispatcher(*tensors: Tensor | None) -> bool:
    """True if :func:`eager`, and all these are exact tensors of which none needs a gradient.

    Native functions may then be tried: they look at the rest (device, dtype, shape) and give ``None`` for a
    form that they do not take; the operator then serves the call in another way, or says what is wrong.
    """
    if not eager():
        return False
    grad = _grad_enabled()
    for t in tensors:  # noqa: SIM110 - a generator costs twice as much
        if t is not None and (type(t) not in _PLAIN or (grad and t.requires_grad)):
            return False
    return True


def all_float32(*values: Tensor | None) -> bool:
    """True if all these are float32, as native decoders and gradients want them."""
    return all(t is None or t.dtype is torch.float32 for t in values)


def mutated(*tensors: Tensor) -> None:
    """Tell autograd that these were written: what it saved of them is out of date."""
    torch._C._increment_version([t for t in tensors if not t.is_inference()])


def rows_as_bags(input: Tensor, per_sample_weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """IDs ``[n]``, offsets ``[B + 1]`` and weights of bags that are the rows of ``input``: ``[B, L]``, or
    nested of the jagged layout."""
    if input.is_nested:
        values = _jagged_values(input, "input")
        if per_sample_weights is None:
            return values, input.offsets(), None
        weights = _jagged_values(per_sample_weights, "per_sample_weights")
        if not torch.equal(input.offsets(), per_sample_weights.offsets()):
            raise ValueError("per_sample_weights: expected rows as long as those of input")
        return values, input.offsets(), weights
    offsets = torch.arange(input.shape[0] + 1, device=input.device) * input.shape[1]
    weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
    return input.reshape(-1), offsets, weights


def _jagged_values(nested: Tensor, name: str) -> Tensor:
    jagged = nested.is_nested and nested.layout is torch.jagged and nested.dim() == 2
    if not jagged or nested.lengths() is not None:
        raise ValueError(f"{name}: expected a nested tensor [B, *] of the jagged layout, without holes")
    return nested.values()


def write_to(out: Tensor | None, result: Tensor) -> Tensor:
    """``result``; or ``out`` with it written there, if given.

    Raises ``RuntimeError`` if gradients are wanted, ``ValueError`` and ``DtypeError`` if ``out`` is not like
    ``result``.
    """
    if out is None:
        return result
    if result.requires_grad or out.requires_grad:
        raise RuntimeError("out: does not support gradients, and one of the tensors requires them")
    if out.dtype != result.dtype:
        raise DtypeError(f"out: expected {result.dtype}, got {out.dtype}")
    if out.shape != result.shape:
        raise ValueError(f"out: expected shape {tuple(result.shape)}, got {tuple(out.shape)}")
    return out.copy_(result)


def padding_from_start(padding_idx: int | None, num_embeddings: int) -> int:
    """``padding_idx`` as kernels take it: counted from the start, -1 for none."""
    if padding_idx is None:
        return -1
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise RuntimeError(
            f"padding_idx must be within the number of embeddings, {-num_embeddings} through "
            f"{num_embeddings - 1}, but got {padding_idx}"
        )
    return padding_idx % num_embeddings
