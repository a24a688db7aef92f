"""Packed native decoders, kept while their weights stay as they are.

A ``_C.Decoder`` holds a copy of the weights in the order in which the kernels read them. It is used again if
every tensor is still the same object, with the same storage, sizes, version counter and contents. In-place
operations raise the counter, optimizers' steps included: what they change is seen at once.

Writes through ``tensor.data``, NumPy or DLPack raise no counter, and show in the bytes alone. Each call
compares checksums of short tensors (up to 512 bytes: biases, say) and of a share of the others' bytes, in
turn: (1 + n) / 2048 of them before n IDs are decoded; and a few elements of each tensor. So such a write is
seen at once by calls of 2048 IDs, in small decoders, and where it changes a whole tensor; else by the time
that some 2048 IDs more have been decoded (n IDs in a call: after 2048 / (1 + n) calls); or at once if
:func:`clear_decoders` is called (modules' ``invalidate()``). Packing again compares all bytes, and so do
forward passes of training, and backward passes for which no activations were kept. Nothing is kept of
tensors made under ``inference_mode``, which
carry no counter.

Three ways to keep one, by who calls: :func:`decoder` knows a caller's tensors again, :class:`ModuleDecoder`
watches where one module keeps them, :func:`group_decoders` where several do.
"""

import functools
import weakref
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from mprec import reference
from mprec._native import _C
from mprec.bags import Bags
from mprec.hashing import coefficient_rows
from mprec.layers import does_more, size_places
from mprec.names import ACTIVATIONS, FAMILIES, code
from mprec.ops._checks import check_weights
from mprec.tensors import plain

Decoder, WeightWatch = _C.Decoder, _C.WeightWatch

_LINEAR = ("weight", "bias")
_groups: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, tuple]] = weakref.WeakKeyDictionary()
_handles: dict[tuple[int, str], tuple[weakref.ref, tuple, "_C.StackWatch", "_C.Decoder | _C.Mlp"]] = {}


def _count_fused_step(optimizer: torch.optim.Optimizer, *_) -> None:
    """Raise the counters that torch's fused optimizers leave as they were (torch 2.13 on the CPU)."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(group["params"])


@functools.cache
def _watch_fused_steps() -> None:
    """From the first packed decoder on, every optimizer's steps in this process are counted."""
    register_optimizer_step_post_hook(_count_fused_step)


def packed_decoder(
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    family: str,
    activation: str,
    last_activation: str,
    precision: str = "float32",
    *,
    thorough: bool = False,
) -> "_C.Decoder":
    """The native decoder of one feature: kept from an earlier call, or packed now.

    ``thorough``: compare all bytes of the weights, not a share of them.
    """
    options = family, activation, last_activation, precision
    first = weights[0]
    key = id(first), precision
    found = _handles.get(key)
    if (
        found is not None
        and found[0]() is first
        and found[1] == options
        and _C.same_stack(found[2], coefficients, weights, biases, thorough)
    ):
        return found[3]
    watch = _C.StackWatch.of(coefficients, weights, biases)  # before packing: no change may go unnoticed
    handle = _pack(coefficients, weights, biases, *options)
    if watch is not None:
        _handles[key] = weakref.ref(first, lambda _: _handles.pop(key, None)), options, watch, handle
    return handle


def drop_changed(coefficients: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    """Compare all bytes of what :func:`decoder` has kept of these, before a forward pass of training."""
    key = id(weights[0]), "float32"
    found = _handles.get(key)
    if found is not None and not _C.same_stack(found[2], coefficients, weights, biases, True):
        _handles.pop(key, None)


class ModuleDecoder:
    """The decoder of one module, for one native call between the module's input and its output.

    The module has ``stack()``, a ``config`` and ``decoder`` layers.

    Attributes:
        config: the module's when ``kept`` was made.
        kept: for ``_C.dhe_bag_kept``, which gives ``False`` once the weights have changed.
    """

    def __init__(self) -> None:
        self.config = self.kept = None

    def try_pool(
        self,
        module: nn.Module,
        bags: Bags,
        bound: int | None,
        threads: int | None,
        dedupe: bool | None,
    ) -> Tensor | None:
        """The pooled vectors by one native call; None for what that does not take. Only with grad mode off.

        ``bound``: IDs are to be below, or None.
        """
        indices, offsets, mode, weights, _, _, include_last_offset, padding_idx = bags
        threads = threads or torch.get_num_threads()
        kept = self.kept if self.config is module.config else self.pack(module)
        while kept is not None:
            out = _C.dhe_bag_kept(
                kept, indices, offsets, weights, mode, include_last_offset, padding_idx, bound, threads,
                dedupe,
            )  # fmt: skip
            if out is not False:
                return out
            kept = self.pack(module)
        return None

    def __reduce__(self):  # copies and pickles of a module start without one
        return ModuleDecoder, ()

    def pack(self, module: nn.Module) -> "_C.KeptDecoder | None":
        """``kept``, made anew; ``None`` if the module's tensors cannot be watched, or kernels do not take
        them. Only with grad mode off."""
        self.config = self.kept = None
        if module.runs_layers() or not packable(*module.stack()):
            return None
        watch = _C.WeightWatch.of(places_of(module))
        if watch is None:  # tensors made in inference mode, parametrised layers
            return None
        c = module.config
        handle = packed_decoder(*module.stack(), c.family, c.activation, c.last_activation, thorough=True)
        self.config, self.kept = c, _C.KeptDecoder(watch, handle)
        return self.kept


def group_decoders(
    owner: nn.Module,
    group: Hashable,
    modules: Sequence[nn.Module],
    options: tuple[str, str, str],
    precisions: Sequence[str] | None = None,
    ids: int = 0,
) -> list["_C.Decoder"] | None:
    """The decoders of several modules (with ``stack()`` and ``decoder`` layers), for one kernel call of so
    many IDs of each; ``None`` if kernels do not take them.

    As :func:`decoder` for each, but one native check of all weights, which is kept with ``owner``, replaces
    one per decoder. Only with grad mode off.
    """
    kept = _groups.get(owner)
    found = None if kept is None else kept.get(group)
    if (
        found is not None
        and found[0] == modules
        and found[3] == list(map(type, modules))
        and not found[1].changed(ids)
    ):
        return found[2]
    precisions = ["float32"] * len(modules) if precisions is None else precisions
    if any(does_more(module) or module.runs_layers() for module in modules):
        return None
    stacks = [module.stack() for module in modules]
    if not all(packable(*stack) for stack in stacks):
        return None
    places = [place for module in modules for place in places_of_member(module)]
    watch = _C.WeightWatch.of(places)  # before packing: no change in between may go unnoticed
    handles = [
        packed_decoder(*stack, *options, p, thorough=True)
        for stack, p in zip(stacks, precisions, strict=True)
    ]
    if watch is not None:
        _groups.setdefault(owner, {})[group] = list(modules), watch, handles, list(map(type, modules))
    return handles


def places_of(module: nn.Module) -> list[tuple[dict, str | None]]:
    """Where a module keeps its coefficients, its decoder, the decoder's layers, their weights and hooks."""
    layers = module._modules["decoder"]._modules
    return [
        (module._buffers, "coefficients"),
        (module._modules, "decoder"),
        *((layers, name) for name in layers),
        *((layer._parameters, name) for layer in layers.values() for name in _LINEAR),
        *(place for layer in layers.values() for place in size_places(layer)),
    ]


def places_of_member(module: nn.Module) -> list[tuple[dict, str | None]]:
    """The same of a module that is read and not called: its own hooks, too."""
    return [*size_places(module), (module.__dict__, "padding_idx"), *places_of(module)]


def check_float16(tensors: Sequence[Tensor], name: str) -> None:
    """``ValueError`` if finite numbers would become infinite in float16."""
    for tensor in tensors:
        numbers = tensor.detach()
        if numbers.numel() and not bool((numbers.to(torch.float16).isfinite() | ~numbers.isfinite()).all()):
            raise ValueError(f"{name}: float16 holds numbers up to 65504, got {float(numbers.abs().max())}")


def check_decoder(
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    family: str,
    activation: str,
    last_activation: str,
    name: str = "",
    scaled: bool = False,
) -> None:
    """``ValueError`` or ``DtypeError`` if these do not make a decoder. ``name`` precedes arguments' names.

    ``scaled``: weights in float8, with float32 scales and biases ``[2, out]`` in place of biases.
    """
    rows = coefficient_rows(family)
    code(ACTIVATIONS, activation, f"{name}activation")
    code(ACTIVATIONS, last_activation, f"{name}last_activation")
    if coefficients.dtype != torch.int32:
        raise TypeError(f"{name}coefficients: expected int32, got {coefficients.dtype}")
    if coefficients.dim() != 2 or len(coefficients) != rows or not coefficients.shape[1]:
        raise ValueError(
            f"{name}coefficients: expected [{rows}, k] for family {family!r}, got {list(coefficients.shape)}"
        )
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"{name}weights, biases: expected one of each per layer, at least one layer, "
            f"got {len(weights)} and {len(biases)}"
        )
    inputs = coefficients.shape[1]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if not scaled:
            check_weights(weight, f"{name}weights[{layer}]")
        of_weight = reference.FLOAT8 if scaled else weights[0].dtype
        of_bias = torch.float32 if scaled else of_weight
        if weight.dtype != of_weight or bias.dtype != of_bias:
            raise TypeError(
                f"{name}layer {layer}: expected weight {of_weight} and bias {of_bias}, "
                f"got weight {weight.dtype}, bias {bias.dtype}"
            )
        if (
            weight.dim() != 2
            or weight.shape[1] != inputs
            or bias.shape != ((2, weight.shape[0]) if scaled else weight.shape[:1])
        ):
            raise ValueError(
                f"{name}layer {layer}: expected weight [out, {inputs}] and bias "
                f"{'[2, out]' if scaled else '[out]'}, got {list(weight.shape)} and {list(bias.shape)}"
            )
        inputs = weight.shape[0]


def packable(coefficients: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> bool:
    """Whether native decoders can be made of these: float32 on the CPU."""
    return coefficients.is_cpu and all(t.is_cpu and t.dtype is torch.float32 for t in (*weights, *biases))


def clear_decoders() -> None:
    """Forget all packed decoders: after changing weights through ``.data``, NumPy or DLPack, to see the
    change at once."""
    _handles.clear()
    _groups.clear()
    _C.WeightWatch.forget_all()


def _pack(coefficients, weights, biases, family, activation, last_activation, precision):
    _watch_fused_steps()
    check_decoder(coefficients, weights, biases, family, activation, last_activation)
    if precision == "float16":
        check_float16(weights, "decoder")
    return _C.Decoder(
        plain(coefficients.detach()),
        [plain(t.detach()) for t in weights],
        [plain(t.detach()) for t in biases],
        code(FAMILIES, family, "family"),
        code(ACTIVATIONS, activation, "activation"),
        code(ACTIVATIONS, last_activation, "last_activation"),
        precision,
    )
