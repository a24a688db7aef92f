"""Linear layers whose weights may be read in place of calling them."""

from collections.abc import Iterable

from torch import nn

__all__ = ["recompute", "run_as_modules", "size_places"]

_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


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
