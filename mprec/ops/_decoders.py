"""Packed native decoders, kept while their weights stay as they are.

A ``_C.Decoder`` holds a copy of the weights in the order in which the kernels read them. It is used again if
every tensor is still the same object, with the same storage, sizes, version counter and a sample of its
elements. In-place operations raise the counter, optimizers' steps included; writes through ``tensor.data`` or
NumPy views do not, but show in the sample unless they leave most of a tensor as it was: call
:func:`clear_decoders` after such, in training too, where a step's backward pass uses the decoder that its
forward pass packed. Nothing is kept for tensors made under ``inference_mode``, which carry no counter.

Three ways to keep one, by who calls: :func:`decoder` knows a caller's tensors again, :class:`ModuleDecoder`
watches where one module keeps them, :func:`group_decoders` where several do.
"""

import weakref
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from mprec._native import _C
from mprec.names import ACTIVATIONS, FAMILIES, code
from mprec.ops._common import contiguous

_LINEAR = ("weight", "bias")
_groups: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, tuple]] = weakref.WeakKeyDictionary()
_kept: dict[tuple[int, str], tuple[weakref.ref, tuple, "_C.StackWatch", "_C.Decoder | _C.Mlp"]] = {}


def _count_fused_step(optimizer: torch.optim.Optimizer, *_) -> None:
    """Raise the counters that torch's fused optimizers leave as they were (torch 2.13 on the CPU)."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(group["params"])


register_optimizer_step_post_hook(_count_fused_step)


def decoder(
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    family: str,
    activation: str,
    last_activation: str,
    precision: str = "float32",
) -> "_C.Decoder":
    """The native decoder of one feature: kept from an earlier call, or packed now if gradients are wanted."""
    options = family, activation, last_activation, precision
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*weights, *biases)):
        return _pack(coefficients, weights, biases, *options)
    first = weights[0]
    key = id(first), precision
    found = _kept.get(key)
    if (
        found is not None
        and found[0]() is first
        and found[1] == options
        and _C.same_stack(found[2], coefficients, weights, biases)
    ):
        return found[3]
    try:
        watch = _C.StackWatch(coefficients, weights, biases)  # before packing: no change may go unnoticed
    except RuntimeError:  # tensors made in inference mode
        watch = None
    handle = _pack(coefficients, weights, biases, *options)
    if watch is not None:
        _kept[key] = weakref.ref(first, lambda _: _kept.pop(key, None)), options, watch, handle
    return handle


class ModuleDecoder:
    """The decoder of one module, for one native call between the module's input and its output.

    The module has ``stack()``, a ``config`` and ``decoder`` layers.

    Attributes:
        config: the module's when ``kept`` was made.
        kept: for ``_C.dhe_bag_kept``, which gives ``None`` once the weights have changed.
    """

    def __init__(self) -> None:
        self.config = self.kept = None

    def __reduce__(self):  # copies and pickles of a module start without one
        return ModuleDecoder, ()

    def pack(self, module: nn.Module) -> "_C.KeptDecoder | None":
        """``kept``, made anew; ``None`` if the module's tensors cannot be watched. Only with grad mode off.

        Raises ``TypeError`` or ``ValueError`` for what kernels do not take.
        """
        self.config = self.kept = None
        layers = module._modules["decoder"]._modules
        places = [(module._buffers, "coefficients"), (module._modules, "decoder")]
        places += [(layers, name) for name in layers]
        places += [(layer._parameters, name) for layer in layers.values() for name in _LINEAR]
        try:
            watch = _C.WeightWatch(places)
        except (RuntimeError, KeyError):  # tensors made in inference mode, parametrised layers
            return None
        c = module.config
        handle = decoder(*module.stack(), c.family, c.activation, c.last_activation)
        self.config, self.kept = c, _C.KeptDecoder(watch, handle)
        return self.kept


def group_decoders(
    owner: nn.Module,
    group: Hashable,
    modules: Sequence[nn.Module],
    options: tuple[str, str, str],
    precisions: Sequence[str] | None = None,
) -> list["_C.Decoder"]:
    """The decoders of several modules (with ``stack()`` and ``decoder`` layers), for one kernel call.

    As :func:`decoder` for each, but one native check of all weights, which is kept with ``owner``, replaces
    one per decoder. Only with grad mode off.
    """
    parts = [(module, *module._modules["decoder"]._modules.values()) for module in modules]
    kept = _groups.get(owner)
    found = None if kept is None else kept.get(group)
    if found is not None and found[0] == parts and not found[1].changed():
        return found[2]
    places = [(module._buffers, "coefficients") for module in modules]
    places += [(layer._parameters, name) for _, *layers in parts for layer in layers for name in _LINEAR]
    precisions = ["float32"] * len(modules) if precisions is None else precisions
    try:
        watch = _C.WeightWatch(places)  # before packing: no change in between may go unnoticed
    except RuntimeError:  # tensors made in inference mode
        watch = None
    handles = [decoder(*m.stack(), *options, p) for m, p in zip(modules, precisions, strict=True)]
    if watch is not None:
        _groups.setdefault(owner, {})[group] = parts, watch, handles
    return handles


def clear_decoders() -> None:
    """Forget all packed decoders: needed only after changing part of a tensor through ``.data`` or NumPy."""
    _kept.clear()
    _groups.clear()
    _C.WeightWatch.forget_all()


def _pack(coefficients, weights, biases, family, activation, last_activation, precision):
    return _C.Decoder(
        contiguous(coefficients.detach()),
        [contiguous(t.detach()) for t in weights],
        [contiguous(t.detach()) for t in biases],
        code(FAMILIES, family, "family"),
        code(ACTIVATIONS, activation, "activation"),
        code(ACTIVATIONS, last_activation, "last_activation"),
        precision,
    )
