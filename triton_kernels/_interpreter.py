"""Corrections to Triton's CPU interpreter (TRITON_INTERPRET=1), which holds bfloat16 and float8 as raw bits.

Kernels here compute in float32, so that only conversions and `tl.dot` meet them.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_HANDLE, _BUILDER = interpreter.TensorHandle, interpreter.InterpreterBuilder


_STORED = {tl.bfloat16: (torch.bfloat16, np.uint16), tl.float8e4nv: (torch.float8_e4m3fn, np.uint8)}


def _float32(handle):
    if handle.dtype.scalar not in _STORED:
        return handle
    dtype, _ = _STORED[handle.dtype.scalar]
    bits = torch.from_numpy(np.array(handle.data, ndmin=1)).view(dtype)
    return _HANDLE(bits.float().numpy().reshape(handle.data.shape), tl.float32)


def _rounded(values: np.ndarray, target):
    """To nearest even; float8 saturates as the hardware's conversion does, and keeps NaN."""
    dtype, stored = _STORED[target]
    numbers = torch.from_numpy(np.array(values, dtype=np.float32, ndmin=1))
    if target == tl.float8e4nv:
        numbers = numbers.clamp(-448, 448)
    bits = numbers.to(dtype).view(getattr(torch, stored.__name__)).numpy()
    return _HANDLE(bits.reshape(np.shape(values)), target)


def install() -> None:
    """Make casts to bfloat16 and float8 round to nearest even, and their products right. Idempotent."""
    if getattr(_BUILDER, "_mprec_installed", False):
        return
    cast, fp_to_fp, dot = _BUILDER.cast_impl, _BUILDER.create_fp_to_fp, _BUILDER.create_dot

    def cast_impl(self, source, target):
        if target.scalar in _STORED and source.dtype.scalar != target.scalar:
            return _rounded(_float32(source).data, target.scalar)
        return cast(self, _float32(source), target)

    def create_fp_to_fp(self, source, target, rounding):
        if target.scalar in _STORED:
            return _rounded(_float32(source).data, target.scalar)
        if source.dtype.scalar in _STORED:
            return cast(self, _float32(source), target)
        return fp_to_fp(self, source, target, rounding)

    def create_dot(self, a, b, c, precision, imprecise):
        return dot(self, _float32(a), _float32(b), c, precision, imprecise)

    _BUILDER.cast_impl, _BUILDER.create_fp_to_fp, _BUILDER.create_dot = cast_impl, create_fp_to_fp, create_dot
    # the class binds these names to the uncorrected cast_impl through lambdas that call self.cast_impl
    _BUILDER._mprec_installed = True
