"""The table of operators: all that makes one of ``torch.ops.mprec`` is in one entry, an :class:`Op`.

Arguments, as the schema lists them, become one object, the *call* (tables or decoders, and a
:class:`mprec.bags.Bags`). Operators of a family share the call's type, and so its checks, shapes, kernels and
formula: one table is many tables of which there is one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mprec.kernels import kernels
from mprec.ops import _autograd
from mprec.ops._common import can_skip_dispatcher

try:  # not public, and so perhaps elsewhere in another release: operators stay whole there
    from torch._subclasses.functional_tensor import FunctionalTensorMode
    from torch.export._trace import custom_triton_ops_decomposition_disabled
    from torch.library import register_torch_dispatch
except ImportError:
    register_torch_dispatch = None

#: Owns the schemas and implementations; they last as long as this module.
library = torch.library.Library("mprec", "DEF")

#: Those with memory: on others the fakes serve.
_DEVICES = ("cpu", "cuda")

#: By name.
OPS: dict[str, "Op"] = {}


class Op:
    """One operator, ``torch.ops.mprec.{name}``; the constructor registers it.

    Args:
        schema: as ``torch.library.define`` takes it.
        call: from the schema's arguments to the call. Errors here are those of arguments that make no call.
        check: from a call to the same as kernels take it. Raises for what can be seen without a look at
            values; runs for every device.
        fake: from a call to an empty result of the right shape, for compilers.
        reference: from a checked call to the result, in plain torch: where no kernel supports the call.
        result: from what kernels, ``fake`` and ``reference`` give to what the schema says.
        keep: from the operator and its arguments to the result and what its backward pass reads beside the
            arguments; None where nobody may know of that. ``gradient`` is given it by position, last.
        formula: from a checked call to the result in plain torch that can be differentiated in every way.
        gradient: ``gradient(op, arguments, grad, wanted)`` gives gradients of tensor arguments by name, of
            those at least that ``wanted`` has; with ``formula``.
        differentiate: in place of ``gradient``: called where a gradient is wanted, with the operator, the
            dispatcher's key set and the arguments.
        see_through: under ``torch.compile`` the launches of a CUDA kernel take the operator's place, as with
            ``torch.library.triton_op`` (``torch.export`` keeps the operator).
    """

    def __init__(
        self,
        schema: str,
        *,
        call: Callable[..., Any],
        check: Callable[[Any], Any] = lambda call: call,
        fake: Callable[[Any], Any],
        reference: Callable[[Any], Any] | None = None,
        result: Callable[[Any], Any] = lambda result: result,
        formula: Callable[[Any], Any] | None = None,
        gradient: Callable[..., dict[str, Any]] | None = None,
        keep: Callable[..., tuple[Tensor, list[Tensor]] | None] = lambda op, arguments: None,
        differentiate: Callable[..., Any] | None = None,
        see_through: bool = False,
    ) -> None:
        self.name = library.define(schema)
        self.make_call, self.check, self.reference, self.result = call, check, reference, result
        self.fake, self.formula, self.gradient, self.keep = fake, formula, gradient, keep
        self.overload = getattr(torch.ops.mprec, self.name).default
        declared = self.overload._schema.arguments
        self.arguments = [a.name for a in declared]
        self._defaults = [a.default_value if a.has_default_value() else None for a in declared]
        # CompositeExplicitAutograd: one implementation for every device; it asks the tensors where they are.
        library.impl(self.name, self.run, "CompositeExplicitAutograd")
        fake_result = lambda *arguments: self.shape(self.call(*arguments))  # noqa: E731
        torch.library.register_fake(f"mprec::{self.name}", fake_result, lib=library)
        if formula is not None:
            _autograd.register(self, library, differentiate or by_kernels)
        if see_through and register_torch_dispatch is not None:
            register_torch_dispatch(
                f"mprec::{self.name}", FunctionalTensorMode, self._see_through, lib=library
            )
        OPS[self.name] = self

    def complete(self, arguments: Sequence[Any]) -> tuple:
        """The dispatcher leaves trailing defaults out."""
        return (*arguments, *self._defaults[len(arguments) :])

    def positional(self, arguments: Sequence[Any], named: Mapping[str, Any]) -> Sequence[Any]:
        """All arguments by position."""
        late = list(zip(self.arguments, self._defaults, strict=True))[len(arguments) :]
        return *arguments, *(named.get(name, default) for name, default in late)

    def call(self, *arguments):
        return self.make_call(*arguments, *self._defaults[len(arguments) :])

    def shape(self, call):
        """An empty result."""
        return self.result(self.fake(call))

    def run(self, *arguments, device: str | None = None, **named):
        """What the dispatcher calls."""
        if named:
            arguments = self.positional(arguments, named)
        return self.serve(self.call(*arguments), device)

    def serve(self, call, device: str | None = None):
        """The result by the first kernel that supports the call, or by the reference.

        ``device``: whose kernels; default: that of the call.
        """
        call = self.check(call)
        device = device or call.device
        for kernel in kernels(self.name, device):
            if kernel.supports(call):
                return self.result(kernel.run(call))
        if self.reference is None:
            raise NotImplementedError(f"torch.ops.mprec.{self.name}: no kernel for {device}")
        return self.result(self.reference(call))

    def is_unseen(self, call, *tensors: Tensor | None) -> bool:
        """Whether :meth:`serve` may take the dispatcher's place: nobody would notice. For these, the call's
        tensors, in a function of autograd."""
        return call.device in _DEVICES and can_skip_dispatcher(*tensors)

    def by_formula(self, *arguments):
        return self.result(self.formula(self.check(self.call(*arguments))))

    def below(self, keyset, arguments):
        """The result unseen by autograd."""
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def _see_through(self, mode, op, types, args, kwargs):
        call = self.call(*args) if not kwargs else None
        if call is None or call.device != "cuda" or custom_triton_ops_decomposition_disabled():
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            if any(kernel.supports(call) for kernel in kernels(self.name, "cuda")):
                return self.run(*args)
        return mode.__torch_dispatch__(op, types, args, kwargs)


def flatten(arguments: Sequence[Any]) -> tuple[list[Any], list[Tensor]]:
    """Arguments with places in the second list instead of tensors: ``torch.autograd.Function`` takes tensors
    one by one."""
    tensors: list[Tensor] = []
    shape = []
    for a in arguments:
        if isinstance(a, Tensor):
            shape.append(slice(len(tensors), None))
            tensors.append(a)
        elif isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor):
            shape.append(slice(len(tensors), len(tensors) + len(a)))
            tensors += a
        else:
            shape.append(a)
    return shape, tensors


def unflatten(shape: Sequence[Any], tensors: Sequence[Any]) -> list[Any]:
    return [
        a if not isinstance(a, slice) else tensors[a.start] if a.stop is None else list(tensors[a])
        for a in shape
    ]


def by_kernels(op: Op, keyset, *arguments):
    """The result by kernels, and what its backward pass needs."""
    shape, tensors = flatten(arguments)
    return _ByKernels.apply(op, keyset, shape, *tensors)


class _ByKernels(torch.autograd.Function):
    """The result and its gradients by kernels, a gradient's own by formula."""

    @staticmethod
    def forward(ctx, op, keyset, shape, *tensors):
        arguments = unflatten(shape, tensors)
        out, kept = op.keep(op, arguments) or (op.below(keyset, arguments), [])
        ctx.op, ctx.shape, ctx.given = op, shape, len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        op, shape, saved = ctx.op, ctx.shape, ctx.saved_tensors
        tensors, kept = saved[: ctx.given], saved[ctx.given :]
        if _autograd.differentiate_again(grad, *tensors):
            with torch.enable_grad():
                out = op.by_formula(*unflatten(shape, tensors))
            return None, None, None, *_autograd.gradients_of(out, tensors, grad)
        wanted = {
            name
            for name, place, needs in zip(
                op.arguments, shape, unflatten(shape, ctx.needs_input_grad[3:]), strict=True
            )
            if isinstance(place, slice) and (any(needs) if isinstance(needs, list) else needs)
        }
        found = op.gradient(op, unflatten(shape, tensors), grad, wanted, *kept)
        grads: list[Tensor | None] = [None] * len(tensors)
        for name, place in zip(op.arguments, shape, strict=True):
            if name in wanted and isinstance(place, slice):
                if place.stop is None:
                    grads[place.start] = found[name]
                else:
                    grads[place] = found[name]
        return None, None, None, *grads
