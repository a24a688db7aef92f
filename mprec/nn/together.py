"""Look-ups that a model makes side by side, by one call."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mprec import ops
from mprec.nn.embedding import Embedding
from mprec.ops import fused
from mprec.ops._embedding import singles
from mprec.tracing import eager

__all__ = ["embed_together"]


def embed_together(modules: Iterable[nn.Module], ids: Iterable[Tensor]) -> list[Tensor]:
    """``[module(i) for module, i in zip(modules, ids)]``, with one update of all tables in training.

    For models that keep an embedding for each feature in a ``ModuleDict`` or a ``ModuleList`` and look them
    up one after the other. Only the model's own code knows which IDs come together, so its loop becomes this
    call; modules, parameters and checkpoints stay as they are::

        vectors = mprec.nn.embed_together(self.tables.values(), x.unbind(1))

    Tables (:class:`Embedding`, as :func:`swap` makes them) that an optimizer of :mod:`mprec.optim` updates in
    the backward pass, and that look up equally many IDs, are one call there and back. All others are called
    as they are, each by itself: deep hash embeddings, embeddings of other libraries, and tables with hooks,
    ``max_norm``, ``scale_grad_by_freq`` or ``padding_idx``. Without gradients all are: joining IDs and
    dividing vectors would take longer than the look-ups (benchmarks/bench_embedding.py). So are they under
    compilers and tracers.

    Args:
        modules: one for each feature; a module may come more than once.
        ids: integers of any shape ``[*]``, one tensor for each module.

    Returns:
        Vectors ``[*, embedding_dim]`` for each module. Those of one call are parts of one tensor, which
        autograd lets nobody write in place.

    Raises:
        ValueError: not as many modules as tensors.
        Exception: what the modules raise.
    """
    modules, ids = list(modules), list(ids)
    if len(modules) != len(ids):
        raise ValueError(f"expected as many modules as tensors of IDs, got {len(modules)} and {len(ids)}")
    groups: dict[int, list[int]] = {}
    if torch.is_grad_enabled() and eager() and not torch.nn.modules.module._has_any_global_hook():
        for i, (module, wanted) in enumerate(zip(modules, ids, strict=True)):
            if _is_plain(module, wanted):
                groups.setdefault(wanted.numel(), []).append(i)
    vectors: dict[int, Tensor] = {}
    for members in groups.values():
        if len(members) > 1:
            found = _looked_up([modules[i] for i in members], [ids[i] for i in members])
            vectors.update(zip(members, found, strict=False))
    return [
        vectors[i] if i in vectors else module(wanted)
        for i, (module, wanted) in enumerate(zip(modules, ids, strict=True))
    ]


def _is_plain(module: nn.Module, ids: Tensor) -> bool:
    """Whether a look-up is a row for each ID, and nothing else happens."""
    if not isinstance(module, Embedding) or type(module).forward is not Embedding.forward:
        return False
    if type(ids) is not Tensor or ids.dtype not in (torch.int64, torch.int32) or not ids.is_cpu:
        return False
    weight = module._parameters.get("weight")  # not that of a parametrised module
    if weight is None or not weight.is_cpu or not ids.numel():
        return False
    if not weight.requires_grad or fused.attached(weight) is None or module.padding_idx is not None:
        return False
    if module.max_norm is not None or module.scale_grad_by_freq or "forward" in module.__dict__:
        return False
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    return not any(getattr(module, kind) for kind in hooks)


def _looked_up(tables: list, ids: list[Tensor]) -> list[Tensor]:
    """The vectors of each table; none if an ID is not in its table: the module says so itself."""
    indices = torch.cat([wanted.reshape(-1) for wanted in ids])
    ends = singles(len(indices), indices.device)
    try:
        pooled = ops.embedding_bag_multi([t.weight for t in tables], indices, ends)
    except IndexError:
        return []
    parts = pooled.split([table.embedding_dim for table in tables], dim=1)
    return [part.view(*wanted.shape, part.shape[1]) for part, wanted in zip(parts, ids, strict=True)]
