"""Who watches a call: nobody, or a compiler, a tracer, a mode or a function transform.

What is asked of torch's internals for that is gathered here.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["eager", "has_values", "may_look", "not_compiled", "traced", "values_of"]

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transforms_active = torch._C._are_functorch_transforms_active
_tracing = torch._C._get_tracing_state
_is_compiling = torch.compiler.is_compiling
_profiled = torch.autograd._profiler_enabled

#: Decorates what compilers are to leave alone; unlike torch.compiler.disable it does not import them.
not_compiled = torch._disable_dynamo


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


def may_look() -> bool:
    """True where tensors have addresses and values: neither traced nor under a transform."""
    return not (_dispatch_modes() or _transforms_active())


def has_values(tensor: Tensor) -> bool:
    """False of a tensor that stands for a shape and a type: on the meta device, or fake."""
    if tensor.is_meta or not _dispatch_modes():
        return not tensor.is_meta
    from torch._subclasses.fake_tensor import is_fake  # whoever set the mode has imported it

    return not is_fake(tensor)


def values_of(tensor: Tensor) -> Tensor:
    """As native code reads it; under a transform of ``torch.func`` (but ``vmap``), what the tensor wraps."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    if tensor.is_cpu and tensor.is_contiguous():
        return tensor
    with torch._C._DisableFuncTorch():
        return tensor.detach().cpu().contiguous()
