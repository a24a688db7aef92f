"""Look-ups that a model makes side by side, by one call."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mprec import ops
from mprec.nn.embedding import Embedding
from mprec.ops._common import NATIVE_TABLES
from mprec.ops._embedding import singles
from mprec.tracing import eager

__all__ = ["embed_together"]


def embed_together(modules: Iterable[nn.Module], ids: Iterable[Tensor]) -> list[Tensor]:
    """``[module(i) for module, i in zip(modules, ids)]``, in one kernel call where that gives the same.

    For models that keep an embedding for each feature in a ``ModuleDict`` or a ``ModuleList`` and look them
    up one after the other. Only the model's own code knows which IDs come together, so its loop becomes this
    call; modules, parameters and checkpoints stay as they are::

        vectors = mprec.nn.embed_together(self.tables.values(), x.unbind(1))

    Tables (:class:`Embedding`, as :func:`swap` makes them) on the CPU that look up equally many IDs are one
    call. Others are called as they are, each by itself: deep hash embeddings, embeddings of other libraries,
    and tables with hooks, ``max_norm``, ``scale_grad_by_freq``, or a ``padding_idx`` in training. Under
    compilers and tracers all are.

    Args:
        modules: one for each feature; a module may come more than once.
        ids: integers of any shape ``[*]``, one tensor for each module.

    Returns:
        Vectors ``[*, embedding_dim]`` for each module. Those of one call are parts of one tensor.

    Raises:
        ValueError: not as many modules as tensors.
        Exception: what the modules raise.
    """
    modules, ids = list(modules), list(ids)
    if len(modules) != len(ids):
        raise ValueError(f"expected as many modules as tensors of IDs, got {len(modules)} and {len(ids)}")
    groups: dict[tuple, list[int]] = {}
    if eager() and not torch.nn.modules.module._has_any_global_hook():
        for i, (module, wanted) in enumerate(zip(modules, ids, strict=True)):
            if _is_plain(module, wanted):
                key = module.weight.dtype, module.sparse, wanted.numel()
                groups.setdefault(key, []).append(i)
    vectors: dict[int, Tensor] = {}
    for (_, sparse, _), members in groups.items():
        if len(members) > 1:
            found = _looked_up([modules[i] for i in members], [ids[i] for i in members], sparse)
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
    if weight is None or not weight.is_cpu or weight.dtype not in NATIVE_TABLES or not ids.numel():
        return False
    if module.max_norm is not None or module.scale_grad_by_freq or "forward" in module.__dict__:
        return False
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    if any(getattr(module, kind) for kind in hooks):
        return False
    return module.padding_idx is None or not (torch.is_grad_enabled() and weight.requires_grad)


def _looked_up(tables: list, ids: list[Tensor], sparse: bool) -> list[Tensor]:
    """The vectors of each table; none if an ID is not in its table: the module says so itself."""
    indices = torch.cat([wanted.reshape(-1) for wanted in ids])
    ends = singles(len(indices), indices.device)
    try:
        pooled = ops.embedding_bag_multi([t.weight for t in tables], indices, ends, sparse=sparse)
    except IndexError:
        return []
    vectors, column = [], 0
    for table, wanted in zip(tables, ids, strict=True):
        part = pooled.narrow(1, column, table.embedding_dim)
        vectors.append(part.view(*wanted.shape, table.embedding_dim))
        column += table.embedding_dim
    return vectors
