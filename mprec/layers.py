"""Modules whose weights may be read in place of calling them: linear layers, and members of collections."""

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn

__all__ = [
    "call",
    "does_more",
    "read_by_collections",
    "recompute",
    "refuse_more",
    "run_as_modules",
    "share_hooks",
    "size_places",
]

_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
# Forward passes that read the weights and no more. The first is that of modules that are never called.
_READ: set[Any] = {nn.Module.forward, nn.EmbeddingBag.forward, nn.Embedding.forward, nn.Linear.forward}
_PLACES_OF_HOOKS = {
    *_HOOKS,
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
}
_M = TypeVar("_M", bound=type[nn.Module])


def read_by_collections(kind: _M) -> _M:
    """Declares a class whose weights say all that its forward pass does."""
    _READ.add(kind.forward)
    return kind


def does_more(member: nn.Module) -> bool:
    """Whether a member of a collection does more than look up by its weights, without padding or bounds: it
    has hooks, a forward pass of its own, or such options. Collections call it then. Its ``mode`` is not read:
    the feature's counts.
    """
    get = (
        member.__dict__.get
    )  # asked of each member at each call: a loop over names takes three times as long
    return bool(
        type(member).forward not in _READ
        or get("forward")
        or get("_forward_hooks")
        or get("_forward_pre_hooks")
        or get("_backward_hooks")
        or get("_backward_pre_hooks")
        or get("max_norm") is not None
        or get("padding_idx") is not None
        or get("scale_grad_by_freq")
    )


def call(member: nn.Module, ids: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
    """The pooled vectors ``[B, D]`` of bags of one feature, whose ``offsets`` ``[B + 1]`` end with the number
    of IDs, by calling the member.

    Raises:
        TypeError: it has no forward pass, so that nothing would run its hooks.
        ValueError: what it returns is not of B rows.
    """
    refuse_uncallable(member)
    bags = len(offsets) - 1
    if not getattr(member, "include_last_offset", True):
        offsets = offsets[:-1]
    out = member(ids, offsets) if weights is None else member(ids, offsets, weights)
    if out.dim() != 2 or out.shape[0] != bags:
        raise ValueError(f"{type(member).__name__}: expected it to return [{bags}, D], got {list(out.shape)}")
    return out


def refuse_uncallable(member: nn.Module) -> None:
    """``TypeError`` for a module without a forward pass."""
    if type(member).forward is nn.Module.forward and "forward" not in member.__dict__:
        raise TypeError(
            f"{type(member).__name__}: expected no hooks and no other options, because collections read it "
            "and never call it, got some; a hook may stand on the collection, or on a module that is called"
        )


def refuse_more(member: nn.Module, name: str) -> None:
    """``TypeError`` for a member whose weights, which are to be converted, do not say all that it does."""
    if does_more(member):
        raise TypeError(
            f"{name}: expected a module without hooks or a forward pass of its own, whose weights say all "
            f"that it does, got {type(member).__name__} with more than that"
        )


def share_hooks(module: nn.Module, twin: nn.Module) -> None:
    """``twin`` runs the hooks of ``module``, also those that are registered or removed later."""
    found = {key: value for key, value in module.__dict__.items() if key in _PLACES_OF_HOOKS}
    # torch sets the last one with the first backward hook, and on the module alone. Without hooks it says
    # nothing, so it may say now what it will say then.
    full = module._is_full_backward_hook
    twin.__dict__.update(found, _is_full_backward_hook=True if full is None else full)


def run_as_modules(layers: Iterable[nn.Module]) -> bool:
    """Whether one of them does more than ``nn.Linear`` with its weight and bias: it has another forward pass
    (an adapter, say), no bias, or hooks."""
    return not all(map(_is_read, layers))


def _is_read(layer: nn.Module) -> bool:
    return (
        type(layer).forward is nn.Linear.forward
        and "forward" not in layer.__dict__
        and layer.bias is not None
        and not any(not _is_torch_own(hook) for kind in _HOOKS for hook in getattr(layer, kind).values())
    )


def _is_torch_own(hook) -> bool:
    """Of torch's pruning and weight norm, which :func:`recompute` runs."""
    return type(hook).__module__.startswith("torch.nn.utils.")


def recompute(layer: nn.Module) -> None:
    """What torch's pruning and weight norm do before a layer's own forward pass: make its weight anew from
    the parameters that stand for it."""
    for hook in layer._forward_pre_hooks.values():
        if _is_torch_own(hook):
            hook(layer, ())


def size_places(layer: nn.Module) -> list[tuple[dict, None]]:
    """Dicts that grow when :func:`run_as_modules` changes its answer, for watches."""
    return [(layer.__dict__, None), (layer._forward_hooks, None), (layer._forward_pre_hooks, None)]
