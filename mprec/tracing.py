"""Who watches a call: nobody, or a compiler, a tracer, a mode or a function transform."""

import torch
from torch.autograd import forward_ad

__all__ = ["eager", "traced"]

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms_active = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state
_is_compiling = torch.compiler.is_compiling
_profiled = torch.autograd._profiler_enabled


def eager() -> bool:
    """True if nothing watches this call: no compiler, tracer, profiler, mode or function transform.

    If moreover no input needs a gradient, a call may skip torch's dispatcher and go straight to the kernel,
    which saves about ten microseconds.
    """
    return not (
        _is_compiling()
        or _dispatch_modes()
        or _function_modes()
        or _transforms_active()
        or _tracing()
        or _profiled()
        or forward_ad._current_level >= 0  # a tensor may carry a tangent
    )


def traced() -> bool:
    """True while a compiler traces: tensors have no addresses, and no state outlives the call."""
    return _dispatch_modes() > 0
