"""Triton kernels for CUDA and ROCm devices. Imported on first use; nothing here is needed on a CPU."""

import triton

if triton.knobs.runtime.interpret:
    from . import _interpreter

    _interpreter.install()
