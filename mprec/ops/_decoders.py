"""Packed native decoders, kept while their weights stay as they are.

A ``_C.Decoder`` holds a copy of the weights in the order in which the kernels read them. It is kept per first
weight tensor and precision, weakly, and used again if every tensor still has its storage address and its
version counter. In-place operations raise the counter, optimizers' steps included; writes through
``tensor.data`` or NumPy views do not: call :func:`clear_decoders` after those. Nothing is kept while grad
mode is on (training changes the weights at every step), nor for tensors made under ``inference_mode``, which
carry no counter.
"""

import weakref
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from mprec._native import _C
from mprec.names import ACTIVATIONS, FAMILIES, code
from mprec.ops._common import contiguous

_address = Tensor.data_ptr
_version = Tensor._version.__get__
_LINEAR = ("weight", "bias")
_groups: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, tuple]] = weakref.WeakKeyDictionary()
_kept: dict[tuple[int, str], tuple[weakref.ref, tuple, "_C.Decoder"]] = {}


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
    """The native decoder of one feature: kept from an earlier call if grad mode is off, else packed now."""
    tensors = (coefficients, *weights, *biases)
    options = (len(weights), family, activation, last_activation, precision)
    if torch.is_grad_enabled():
        return _pack(tensors, *options)
    first = weights[0]
    key = id(first), precision
    try:
        stamp = (*options, *map(_address, tensors), *map(_version, tensors))
    except RuntimeError:  # tensors made in inference mode
        return _pack(tensors, *options)
    found = _kept.get(key)
    if found is not None and found[1] == stamp and found[0]() is first:
        return found[2]
    handle = _pack(tensors, *options)
    _kept[key] = (weakref.ref(first, lambda _: _kept.pop(key, None)), stamp, handle)
    return handle


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
    """Forget all packed decoders: needed only after changing weights through ``.data`` or a NumPy view."""
    _kept.clear()
    _groups.clear()


def _pack(tensors, layers, family, activation, last_activation, precision):
    coefficients, *rest = [contiguous(t.detach()) for t in tensors]
    return _C.Decoder(
        coefficients,
        rest[:layers],
        rest[layers:],
        code(FAMILIES, family, "family"),
        code(ACTIVATIONS, activation, "activation"),
        code(ACTIVATIONS, last_activation, "last_activation"),
        precision,
    )
