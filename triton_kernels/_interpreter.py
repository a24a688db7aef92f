"""Corrections to Triton's CPU interpreter (TRITON_INTERPRET=1), which holds bfloat16 as raw 16-bit patterns.

Kernels here compute in float32, so that only conversions and `tl.dot` meet bfloat16.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_HANDLE, _BUILDER = interpreter.TensorHandle, interpreter.InterpreterBuilder


def _float32(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return _HANDLE((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _bfloat16(values: np.ndarray):
    bits = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).bfloat16().view(torch.int16)
    return _HANDLE(bits.numpy().view(np.uint16), tl.bfloat16)


def install() -> None:
    """Make bfloat16 casts round to nearest even and bfloat16 matrix products right. Idempotent."""
    if getattr(_BUILDER, "_mprec_installed", False):
        return
    cast, fp_to_fp, dot = _BUILDER.cast_impl, _BUILDER.create_fp_to_fp, _BUILDER.create_dot

    def cast_impl(self, source, target):
        if target.scalar == tl.bfloat16 and source.dtype.scalar != tl.bfloat16:
            return _bfloat16(source.data)
        return cast(self, _float32(source), target)

    def create_fp_to_fp(self, source, target, rounding):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return _bfloat16(source.data)
        return fp_to_fp(self, source, target, rounding)

    def create_dot(self, a, b, c, precision, imprecise):
        return dot(self, _float32(a), _float32(b), c, precision, imprecise)

    _BUILDER.cast_impl, _BUILDER.create_fp_to_fp, _BUILDER.create_dot = cast_impl, create_fp_to_fp, create_dot
    # the class binds these names to the uncorrected cast_impl through lambdas that call self.cast_impl
    _BUILDER._mprec_installed = True
