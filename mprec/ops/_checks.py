"""Checks of operators' arguments, the same for every device.

Offsets and IDs are checked by native code (``csrc/bags/check.h``), by kernels as they read them or here
before a formula does. On CUDA that would wait for the device: kernels there count what is wrong instead.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mprec._native import _C
from mprec.errors import DeviceError, DtypeError, IdOutOfRangeError, InvalidOffsetsError

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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


def check_ndim(tensor: Tensor, name: str, ndim: int = 1) -> None:
    if tensor.dim() != ndim:
        raise ValueError(f"{name} has to be a {ndim}D Tensor, but got Tensor of dimension {tensor.dim()}")


def check_floats(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in FLOATS:
        raise DtypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {tensor.dtype}")


def check_weights(weight: Tensor, name: str) -> None:
    check_ndim(weight, name, 2)
    check_floats(weight, name)


def check_tables(weights: Sequence[Tensor]) -> None:
    """At least one table, all of one dtype."""
    if not weights:
        raise ValueError("weights: expected at least one table")
    for t, weight in enumerate(weights):
        check_weights(weight, f"weights[{t}]")
        if weight.dtype != weights[0].dtype:
            raise DtypeError(f"weights[{t}]: expected {weights[0].dtype} as weights[0], got {weight.dtype}")


def check_mode(mode: int, per_sample_weights: Tensor | None) -> None:
    if mode not in (0, 1, 2):
        raise ValueError(f"mode: expected 0 (sum), 1 (mean) or 2 (max), got {mode}")
    if mode == 2 and per_sample_weights is not None:
        raise NotImplementedError(
            "per_sample_weights: only supported for mode='sum' and mode='mean', got mode='max'"
        )


def check_features(features: Sequence[int] | None, num_features: int | None, count: int) -> None:
    """``ValueError`` unless ``features`` names one of ``num_features`` for each of ``count`` parts."""
    if num_features is None:
        num_features = count
    if num_features < 1:
        raise ValueError(f"num_features: expected at least 1, got {num_features}")
    if features is None:
        if num_features != count:
            raise ValueError(f"num_features: {num_features}, but there are {count} parts and no features")
        return
    if len(features) != count:
        raise ValueError(f"features: expected one for each of {count} parts, got {len(features)}")
    for t, f in enumerate(features):
        if not 0 <= f < num_features:
            raise ValueError(f"features[{t}]: expected in [0, {num_features}), got {f}")


def check_per_sample_weights(
    per_sample_weights: Tensor | None, dtype: torch.dtype, indices: Tensor, or_float32: bool = False
) -> None:
    """One weight per index, of ``dtype``; ``or_float32``: with 16-bit tables, of float32 too."""
    if per_sample_weights is None:
        return
    if per_sample_weights.shape != indices.shape:
        raise ValueError(
            f"per_sample_weights: expected the shape of indices, {tuple(indices.shape)}, "
            f"got {tuple(per_sample_weights.shape)}"
        )
    wider = or_float32 and dtype in (torch.float16, torch.bfloat16)
    if per_sample_weights.dtype != dtype and not (wider and per_sample_weights.dtype == torch.float32):
        raise DtypeError(
            f"per_sample_weights: expected to have the same type as weight, {dtype}, got "
            f"{per_sample_weights.dtype}"
        )


def num_bags(offsets: Tensor, include_last_offset: bool) -> int:
    bags = offsets.shape[0] - include_last_offset
    if bags < 0:
        raise InvalidOffsetsError("offsets: with include_last_offset there must be at least one, got none")
    return bags


def check_bags(offsets: Tensor, num_indices: int, include_last_offset: bool, num_features: int = 1) -> None:
    """``InvalidOffsetsError`` as native kernels raise it, for the paths without them."""
    num_bags(offsets, include_last_offset)
    _C.check_offsets(_values(offsets), num_indices, include_last_offset, num_features)


def _values(tensor: Tensor) -> Tensor:
    """As native code reads it; under a transform of ``torch.func`` (but ``vmap``), what the tensor wraps."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    if tensor.is_cpu and tensor.is_contiguous():
        return tensor
    with torch._C._DisableFuncTorch():
        return tensor.detach().cpu().contiguous()


def check_ids(
    indices: Tensor,
    offsets: Tensor,
    bounds: Sequence[int | None],
    bags: int,
    features: Sequence[int] | None = None,
    num_features: int | None = None,
) -> None:
    """``IdOutOfRangeError`` as native kernels raise it, for the paths without them.

    Args:
        indices, offsets: of ``num_features`` features of ``bags`` bags each; the last offset may be missing.
        bounds: IDs of ``features[i]`` (default: of feature i) are to be below ``bounds[i]``, and not
            negative; ``None``: any other.
    """
    features = range(len(bounds)) if features is None else features
    pairs = [(f, -1 if bound is None else bound) for f, bound in zip(features, bounds, strict=True)]
    _C.check_ids(
        _values(indices),
        _values(offsets),
        bags,
        len(bounds) if num_features is None else num_features,
        pairs,
    )


def check_id_list(ids: Tensor, bound: int, name: str) -> None:
    """The same of IDs ``[n]`` that no bags hold, by the argument's name."""
    try:
        check_ids(ids.flatten(), ids.new_zeros(1), [bound], 1)
    except IdOutOfRangeError as error:
        raise IdOutOfRangeError(str(error).replace("indices", name, 1).replace(" (bag 0)", "")) from None
