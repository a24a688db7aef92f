"""How operators are differentiated.

In an ordinary backward pass by kernels: an ``autograd.Function`` around the operator. In all else that torch
can ask of a function (forward-mode AD, derivatives of derivatives, ``torch.func`` transforms, batched
gradients) by the formula of :mod:`mprec.reference`, which is plain torch and so can do whatever torch can.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import forward_ad

_C = torch._C


def by_formula(tensors: Iterable[Tensor | None]) -> bool:
    """True if a transform of ``torch.func`` runs, or one of these carries a forward-mode tangent."""
    if _C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def differentiate_again(*tensors: Tensor | None) -> bool:
    """Asked in a backward pass: True if its result is to be differentiated itself, or is batched."""
    tensors = [t for t in tensors if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    # autograd batches gradients (torch.autograd.functional's vectorize) in an older way
    return by_formula(tensors) or any(_C._functorch.is_legacy_batchedtensor(t) for t in tensors)


def is_batched(tensor: Tensor) -> bool:
    """True within ``torch.func.vmap``, of what it maps over: values cannot be looked at then."""
    while _C._functorch.is_functorch_wrapped_tensor(tensor):
        if _C._functorch.is_batchedtensor(tensor):
            return True
        tensor = _C._functorch.get_unwrapped(tensor)
    return False


def register(op, library, differentiate: Callable) -> None:
    """Make an operator (:class:`mprec.ops._table.Op`) differentiable.

    ``differentiate(op, keyset, *arguments)`` is called where a gradient is wanted.
    """

    def kernel(keyset, *arguments):
        if by_formula(_tensors(arguments)):
            return op.by_formula(*arguments)
        if torch.is_grad_enabled() and _C._any_requires_grad(*arguments):
            return differentiate(op, keyset, *op.complete(arguments))
        return op.below(keyset, arguments)

    library.impl(op.name, kernel, "Autograd", with_keyset=True)
    library.impl(op.name, op.by_formula, "FuncTorchBatched")


def _tensors(arguments) -> Iterable[Tensor]:
    for a in arguments:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, (list, tuple)):
            yield from (t for t in a if isinstance(t, Tensor))


def gradients_of(out: Tensor, inputs: list[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """Gradients of ``out``, a formula's result, that can be differentiated again; None where not wanted."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]
