"""What all operators share: the library object, the test for the direct path, checks of arguments."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from mprec.errors import DeviceError, DtypeError, IdOutOfRangeError, InvalidOffsetsError
from mprec.tracing import eager

#: Owns the schemas and implementations; they last as long as this module.
library = torch.library.Library("mprec", "DEF")

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
IDS = (torch.int64, torch.int32)
#: What the native kernels read tables of; they add up in float32 and round once.
NATIVE_TABLES = (torch.float32, torch.float16, torch.bfloat16)

_PLAIN = (Tensor, Parameter)
_grad_enabled = torch.is_grad_enabled


def direct(*tensors: Tensor | None) -> bool:
    """True if :func:`eager`, and all these are exact tensors of which none needs a gradient.

    Native functions may then be tried: they check the rest (device, dtype, shape) and raise ``TypeError`` or
    ``ValueError``, after which the operator either serves the call in another way or says what is wrong.
    """
    if not eager():
        return False
    grad = _grad_enabled()
    for t in tensors:  # noqa: SIM110 - a generator costs twice as much
        if t is not None and (type(t) not in _PLAIN or (grad and t.requires_grad)):
            return False
    return True


def native(*values: Tensor | None) -> bool:
    """True if all these are float32, as native decoders and gradients want them."""
    return all(t is None or t.dtype is torch.float32 for t in values)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def ids(tensor: Tensor, name: str) -> Tensor:
    """IDs or offsets as kernels take them: contiguous int32 or int64."""
    if tensor.dtype in IDS:
        return contiguous(tensor)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype is torch.bool:
        raise DtypeError(f"{name}: expected int64 or int32, got {tensor.dtype}")
    return tensor.to(torch.int64)


def rows_as_bags(input: Tensor, per_sample_weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """IDs ``[B * L]``, offsets ``[B + 1]`` and weights of bags that are the rows of ``input`` ``[B, L]``."""
    offsets = torch.arange(input.shape[0] + 1, device=input.device) * input.shape[1]
    weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
    return input.reshape(-1), offsets, weights


def buffer(out: Tensor | None, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A CPU matrix to be written: ``out`` if given and of this form (else ``ValueError``), or a new one."""
    if out is None:
        return torch.empty(rows, columns, dtype=dtype)
    if out.dtype is not dtype or out.shape != (rows, columns):
        raise ValueError("out")  # into() says what is wrong
    return out


def into(out: Tensor | None, result: Tensor) -> Tensor:
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


def check_same_device(**tensors: Tensor | Sequence[Tensor] | None) -> None:
    """``DeviceError`` naming the first tensor that is not where the first one is."""
    first = None
    for name, value in tensors.items():
        for tensor in (value,) if isinstance(value, Tensor) else value or ():
            if first is None:
                first = (name, tensor.device)
            elif tensor.device != first[1]:
                raise DeviceError(
                    f"{name} is on {tensor.device}, but {first[0]} is on {first[1]}: expected one device"
                )


def num_bags(offsets: Tensor, include_last_offset: bool) -> int:
    bags = offsets.shape[0] - include_last_offset
    if bags < 0:
        raise InvalidOffsetsError("offsets: with include_last_offset there must be at least one, got none")
    return bags


def check_weights(weight: Tensor, name: str) -> None:
    if weight.dtype not in FLOATS:
        raise DtypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {weight.dtype}")


def check_per_sample_weights(per_sample_weights: Tensor | None, weight: Tensor, indices: Tensor) -> None:
    if per_sample_weights is None:
        return
    if per_sample_weights.dtype != weight.dtype:
        raise DtypeError(
            f"per_sample_weights: expected the dtype of weight, {weight.dtype}, got "
            f"{per_sample_weights.dtype}"
        )
    if per_sample_weights.shape != indices.shape:
        raise ValueError(
            f"per_sample_weights: expected the shape of indices, {tuple(indices.shape)}, "
            f"got {tuple(per_sample_weights.shape)}"
        )


def check_bags(offsets: Tensor, num_indices: int, include_last_offset: bool) -> None:
    """The checks of offsets that native kernels make, for the paths without them."""
    if num_bags(offsets, include_last_offset) == 0 and num_indices:
        raise InvalidOffsetsError(f"offsets: no bags, but there are {num_indices} indices")
    if offsets.numel() == 0:
        return
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0:
        raise InvalidOffsetsError(f"offsets[0]: expected 0, got {first}")
    falls = (offsets[1:] < offsets[:-1]).nonzero()
    if len(falls):
        i = int(falls[0]) + 1
        raise InvalidOffsetsError(
            f"offsets[{i}]: {int(offsets[i])} is below offsets[{i - 1}] = {int(offsets[i - 1])}; "
            "expected offsets that never fall"
        )
    if last > num_indices or (include_last_offset and last != num_indices):
        bound = "" if include_last_offset else "at most "
        raise InvalidOffsetsError(
            f"offsets[{offsets.numel() - 1}]: expected {bound}the number of indices, {num_indices}, got "
            f"{last}"
        )


def check_ids(indices: Tensor, bound: int | None, name: str = "indices") -> None:
    """The check of IDs that native kernels make, for the paths without them."""
    bad = (indices < 0) if bound is None else (indices < 0) | (indices >= bound)
    positions = bad.nonzero()
    if len(positions):
        at = tuple(positions[0].tolist())
        upper = "2**63" if bound is None else bound
        raise IdOutOfRangeError(
            f"{name}[{', '.join(map(str, at))}]: ID {int(indices[at])} is not in [0, {upper})"
        )


def pass_padding(padding_idx: int | None, num_embeddings: int) -> int:
    """``padding_idx`` as kernels take it: counted from the start, -1 for none."""
    if padding_idx is None:
        return -1
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise RuntimeError(
            f"padding_idx must be within the number of embeddings, {-num_embeddings} through "
            f"{num_embeddings - 1}, but got {padding_idx}"
        )
    return padding_idx % num_embeddings


def needs_grad(ctx, position: int) -> bool:
    """Whether argument ``position`` needs a gradient; the dispatcher leaves out trailing defaults."""
    needs = ctx.needs_input_grad
    return position < len(needs) and needs[position] is True


def passed_only(ctx, *grads):
    """Gradients of the arguments that were passed; the dispatcher leaves out trailing defaults."""
    return grads[: len(ctx.needs_input_grad)]
