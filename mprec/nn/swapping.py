"""Putting mprec's modules into a model that was written with torch's."""

from collections.abc import Callable, Mapping

from torch import nn

from mprec.nn.config import DheConfig
from mprec.nn.deep_hash import DeepHashEmbeddingBag
from mprec.nn.embedding_bag import EmbeddingBag

#: Which embedding bags become deep hash embeddings: by name, or by a function of name and module.
Choice = Mapping[str, DheConfig] | Callable[[str, nn.EmbeddingBag], DheConfig | None]


def swap(model: nn.Module, dhe: Choice | None = None) -> nn.Module:
    """Replace every ``torch.nn.EmbeddingBag`` in a model, in place, by mprec's.

    A table keeps its parameter, hooks, mode and name: optimizers, state_dicts and outputs stay as they are. A
    module reached by several names stays shared. Subclasses of ``torch.nn.EmbeddingBag`` are left alone.
    Tools that look for exactly torch's class no longer find one: ``torch.ao.quantization.quantize_dynamic``
    leaves mprec's in float32, so quantise by :class:`mprec.nn.QuantizedEmbeddingBagCollection`.

    Args:
        model: changed in place, unless it is an ``EmbeddingBag`` itself.
        dhe: bags to replace by untrained deep hash embeddings instead: ``{name: DheConfig}`` with names as in
            ``model.named_modules()``, or ``function(name, bag)`` that returns a ``DheConfig`` or ``None``.

    Returns:
        The model (its replacement if it is an ``EmbeddingBag`` itself).

    Raises:
        KeyError: a name in ``dhe`` is not that of a ``torch.nn.EmbeddingBag``.
        ValueError: a bag that is to become a deep hash embedding uses ``max_norm`` or ``scale_grad_by_freq``,
            which have no meaning there.

    Example::

        >>> large = lambda name, bag: DheConfig() if bag.num_embeddings > 10**6 else None
        >>> model = mprec.nn.swap(model, dhe=large)
    """
    bags = {name: m for name, m in model.named_modules() if type(m) in (nn.EmbeddingBag, EmbeddingBag)}
    if isinstance(dhe, Mapping):
        if unknown := sorted(set(dhe) - set(bags)):
            raise KeyError(f"dhe: {unknown[0]!r} is no EmbeddingBag of the model; there are {sorted(bags)}")
        choose = lambda name, bag: dhe.get(name)  # noqa: E731
    else:
        choose = dhe or (lambda name, bag: None)
    # Everything is built before anything is replaced: an error leaves the model as it was.
    new = {}
    for name, bag in bags.items():
        config = choose(name, bag)
        if config is not None:
            new[bag] = _deep_hash_bag(name, bag, config)
        elif type(bag) is nn.EmbeddingBag:
            new[bag] = _table(bag)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    return new.get(model, model)


def _table(bag: nn.EmbeddingBag) -> EmbeddingBag:
    table = EmbeddingBag.__new__(EmbeddingBag)
    table.__dict__ = bag.__dict__  # the same attributes, parameter and hooks: only forward differs
    return table


def _deep_hash_bag(name: str, bag: nn.EmbeddingBag, config: DheConfig) -> DeepHashEmbeddingBag:
    for option, value in (("max_norm", bag.max_norm), ("scale_grad_by_freq", bag.scale_grad_by_freq or None)):
        if value is not None:
            raise ValueError(f"{name}: {option}={value} has no meaning for a deep hash embedding")
    return DeepHashEmbeddingBag(
        bag.embedding_dim,
        config,
        bag.mode,
        bag.include_last_offset,
        bag.padding_idx,
        bag.num_embeddings,
        device=bag.weight.device,
        dtype=bag.weight.dtype,
    ).train(bag.training)


__all__ = ["swap"]
