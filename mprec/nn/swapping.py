"""Putting mprec's modules into a model that was written with torch's."""

import functools
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from mprec.nn.embedding import DeepHashEmbedding, Embedding, LowRankEmbedding, LowRankEmbeddingBag
from mprec.representations import DheConfig, FeatureConfig
from mprec.representations.deep_hash import DeepHashEmbeddingBag
from mprec.representations.embedding_bag import EmbeddingBag

__all__ = ["Left", "Replaced", "SwapReport", "swap"]

#: What a module becomes: a name of a representation, a configuration, or None: it is left alone.
Choice = str | DheConfig | FeatureConfig | None

_KINDS = ("table", "dhe", "low_rank")
_OURS = "is one of mprec's already"


@dataclass(frozen=True)
class Replaced:
    """One module that has changed: its name in the model, its class before, the representation that it has
    now, and its numbers of trained parameters before and now."""

    name: str
    was: type
    representation: str
    parameters_before: int
    parameters: int


@dataclass(frozen=True)
class Left:
    """One embedding that is as it was: its name in the model, its class, and why."""

    name: str
    kind: type
    reason: str


class SwapReport:
    """What :func:`swap` did to a model; printed, a table.

    Attributes:
        model: the model that was given.
        replaced, left: tuples of :class:`Replaced` and :class:`Left`, in the order of the model's modules.
    """

    def __init__(self, model: nn.Module, replaced, left, changes) -> None:
        self.model = model
        self.replaced: tuple[Replaced, ...] = tuple(replaced)
        self.left: tuple[Left, ...] = tuple(left)
        self._changes: list[_Change] = changes

    def undo(self) -> None:
        """Make the model what it was. Tables keep what they have learnt in between; modules that had become
        another representation are back with the parameters they had before.

        Raises:
            RuntimeError: a module has been changed again since.
        """
        for change in self._changes:
            if type(change.module) is not change.now:
                raise RuntimeError(
                    f"{change.name}: expected the class {change.now!r} as swap left it, got "
                    f"{type(change.module)!r}"
                )
        for change in self._changes:
            change.module.__class__ = change.was
            change.module.__dict__ = change.state
        self._changes = []

    def __str__(self) -> str:
        lines = [f"{len(self.replaced)} of {len(self.replaced) + len(self.left)} embeddings replaced"]
        names = [entry.name or "(the model)" for entry in (*self.replaced, *self.left)]
        width = max(map(len, names), default=0)
        for r in self.replaced:
            lines.append(
                f"  {r.name or '(the model)':{width}}  {r.was.__name__} -> {r.representation}, "
                f"{r.parameters_before:,} -> {r.parameters:,} parameters"
            )
        lines += ["left alone"] if self.left else []
        lines += [f"  {x.name or '(the model)':{width}}  {x.kind.__name__}: {x.reason}" for x in self.left]
        return "\n".join(lines)

    __repr__ = __str__


class _Change(NamedTuple):
    name: str
    module: nn.Module
    was: type
    state: dict[str, Any]
    now: type


def swap(
    model: nn.Module,
    representation: Choice | Mapping[str, Choice] | Iterable[FeatureConfig] | Callable[..., Choice] = "table",
    *,
    dhe: DheConfig | None = None,
    rank: int | None = None,
) -> SwapReport:
    """Give every ``torch.nn.Embedding`` and ``torch.nn.EmbeddingBag`` of a model to mprec, in place.

    The modules themselves become mprec's: whatever refers to one, sees the new one. A *table* keeps its
    parameter, hooks, options and name: optimizers, state_dicts and outputs stay as they are. A *dhe* begins
    untrained, and a *low_rank* at what comes nearest to the rows; their parameters are new ones, so make the
    optimizer afterwards. Both have a ``weight``, the table that they stand for, for code that reads one.

    Subclasses of torch's two are taken if they leave ``forward`` as it is. Tools that look for exactly
    torch's class no longer find one: ``torch.ao.quantization.quantize_dynamic`` leaves mprec's in float32, so
    quantise by :class:`mprec.nn.QuantizedEmbeddingBagCollection`.

    Args:
        model: changed in place; may be an embedding itself.
        representation: what they become:

            * ``"table"``, ``"dhe"`` or ``"low_rank"`` for all of them, or a :class:`DheConfig`;
            * ``{name: choice}`` with names as in ``model.named_modules()``; others become tables;
            * a ``Plan`` of :mod:`mprec.planner`, or :class:`FeatureConfig` s: each is for the module of its
              name, or whose name ends with it (``"user"`` for ``"embeddings.user"``); others become tables.
              Pooling stays the module's own;
            * ``function(name, module)`` that returns a choice.

            A choice is one of those names, a ``DheConfig``, a ``FeatureConfig``, or None: leave it alone.
        dhe: configuration where a choice says only ``"dhe"``; default ``DheConfig()``. Not for ``"table"``.
        rank: where a choice says only ``"low_rank"``; default a quarter of ``embedding_dim``. Likewise.

    Returns:
        What was replaced, and what was left alone and why; its ``undo()`` takes everything back.

    Warns:
        UserWarning: nothing was replaced.

    Raises:
        KeyError: a name is not that of an embedding of the model. The model is unchanged, as after any error.
        ValueError: an unknown representation, a configuration of another size than the module, or a module
            that was chosen by name or function cannot become what was chosen.
        TypeError: a choice of another type.

    Example::

        >>> large = lambda name, module: "dhe" if module.num_embeddings > 10**6 else "table"
        >>> print(mprec.nn.swap(model, large))
    """
    if dhe is not None and not isinstance(dhe, DheConfig):
        raise TypeError(
            f"dhe: expected a DheConfig, got {type(dhe).__name__}: mappings and functions are given as "
            "representation"
        )
    if representation == "table" and (dhe is not None or rank is not None):
        unused = "rank" if dhe is None else "dhe"
        raise ValueError(
            f"{unused}: has no meaning for representation='table', which all embeddings become: say "
            f"representation={'low_rank' if unused == 'rank' else 'dhe'!r}"
        )
    found = _embeddings(model)
    choose, by_name = _chooser(representation, [name for name, _ in found])
    shared = _names_of_parameters(model)
    replaced, left, changes = [], [], []
    # Everything is built before anything is changed: an error leaves the model as it was.
    made: list[tuple[_Change, dict[str, Any]]] = []
    for name, module in found:
        reason = _why_not(module)
        choice = choose(name, module)
        kind, config = _kind(choice, name, dhe, rank)
        if kind is not None:
            _check_size(choice, name, module)
        if reason is None and kind is None:
            reason = "chosen so"
        if reason is None and kind != "table":
            reason = _why_not_other(module, kind, shared[id(module.weight)])
            if reason is not None and by_name:
                raise ValueError(f"{name}: {reason}")
        if reason is None and kind == "table" and type(module) in (Embedding, EmbeddingBag):
            reason = _OURS
        if reason is not None:
            left.append(Left(name, type(module), reason))
            continue
        was, state, before = type(module), module.__dict__, _count(module)
        if kind == "table":
            now, after = _on_kernels(was), state
        else:
            new = _other(module, kind, config)
            now, after = type(new), _carried(state, new)
        changes.append(_Change(name, module, was, state, now))
        made.append((changes[-1], after))
        numbers = before if kind == "table" else _count(new)
        replaced.append(Replaced(name, was, kind, before, numbers))
    for change, after in made:
        change.module.__class__ = change.now
        change.module.__dict__ = after
    report = SwapReport(model, replaced, left, changes)
    if not replaced and not (left and all(entry.reason == _OURS for entry in left)):
        warnings.warn(f"swap has changed nothing: {report}", stacklevel=2)
    return report


def _embeddings(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Those of torch's kinds that are no part of a module of mprec's, each once."""
    inside: set[int] = set()
    found = []
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            found.append((name, module))
        elif type(module).__module__.partition(".")[0] == "mprec":
            inside.update(id(m) for m in module.modules())
            if isinstance(module, (DeepHashEmbeddingBag, LowRankEmbedding, LowRankEmbeddingBag)):
                found.append((name, module))
    return found


def _why_not(module: nn.Module) -> str | None:
    """Why a module is to be left alone whatever it were to become."""
    if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return _OURS
    base = nn.Embedding if isinstance(module, nn.Embedding) else nn.EmbeddingBag
    cls = type(module)
    forwards = (base.forward, Embedding.forward, EmbeddingBag.forward)
    if cls.forward not in forwards or "forward" in module.__dict__ or cls.__call__ is not nn.Module.__call__:
        return "its forward is not torch's"
    if nn.utils.parametrize.is_parametrized(module):
        return "it has parametrizations"
    if module._modules or module._buffers or set(module._parameters) != {"weight"}:
        return "it has more parameters, buffers or modules than a weight"
    return None


def _why_not_other(module: Any, kind: str, names: list[str]) -> str | None:
    """Why a module cannot become something else than a table."""
    if module.max_norm is not None:
        return f"max_norm={module.max_norm} has no meaning for {kind}"
    if module.scale_grad_by_freq:
        return f"scale_grad_by_freq has no meaning for {kind}"
    if kind == "low_rank" and getattr(module, "mode", "sum") == "max":
        return "mode='max' does not commute with a projection"
    if len(names) > 1:
        return f"its table is shared: {', '.join(names)}"
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return "its table has no size yet"
    base = nn.Embedding if isinstance(module, nn.Embedding) else nn.EmbeddingBag
    known = {*dir(base), *dir(EmbeddingBag), *dir(Embedding), "__init__", "original"}
    if more := sorted(set(dir(type(module))) - known):
        return f"its class has methods of its own: {', '.join(more)}"
    return None


def _chooser(representation, names: list[str]) -> tuple[Callable[[str, nn.Module], Choice], bool]:
    """A function that chooses, and whether it chooses single modules."""
    if representation is None or isinstance(representation, (str, DheConfig)):
        return lambda name, module: representation, False
    if callable(getattr(representation, "features", None)):  # a plan
        representation = representation.features()
    if isinstance(representation, Mapping):
        if unknown := sorted(set(representation) - set(names)):
            raise KeyError(f"{unknown[0]!r} is no embedding of the model; there are {names}")
        return lambda name, module: representation.get(name, "table"), True
    if callable(representation):
        return representation, True
    if isinstance(representation, FeatureConfig):
        representation = [representation]
    by_module = {}
    for feature in representation:
        if not isinstance(feature, FeatureConfig):
            raise TypeError(f"representation: expected FeatureConfigs, got {type(feature).__name__}")
        ends = [n for n in names if n == feature.name or n.endswith("." + feature.name)]
        if len(ends) != 1:
            raise KeyError(
                f"feature {feature.name!r}: expected one embedding of this name, got "
                f"{ends or 'none'}; there are {names}"
            )
        by_module[ends[0]] = feature
    return lambda name, module: by_module.get(name, "table"), True


def _kind(choice: Choice, name: str, dhe: DheConfig | None, rank: int | None) -> tuple[str | None, Any]:
    """The representation's name, and a DheConfig or a rank."""
    if choice is None:
        return None, None
    if isinstance(choice, DheConfig):
        return "dhe", choice
    if isinstance(choice, FeatureConfig):
        dhe, rank, choice = choice.dhe, choice.parameter("rank", None), choice.representation
    if not isinstance(choice, str):
        raise TypeError(f"{name}: expected a name, a DheConfig, a FeatureConfig or None, got {choice!r}")
    if choice not in _KINDS:
        raise ValueError(
            f"{name}: representation: expected one of {', '.join(_KINDS)}, which give one vector of "
            f"embedding_dim an ID, got {choice!r}"
        )
    return choice, dhe or DheConfig() if choice == "dhe" else rank


def _check_size(choice: Choice, name: str, module: Any) -> None:
    if isinstance(choice, FeatureConfig):
        wanted = choice.num_embeddings, choice.embedding_dim
        if wanted != (module.num_embeddings, module.embedding_dim):
            raise ValueError(
                f"{name}: expected {module.num_embeddings} embeddings of {module.embedding_dim} numbers, as "
                f"the module has, got {wanted[0]} of {wanted[1]}"
            )


def _other(module: Any, kind: str, config: Any) -> nn.Module:
    """A module in place of this one, in another representation."""
    like = {"device": module.weight.device, "dtype": module.weight.dtype}
    count, dim, padding_idx = module.num_embeddings, module.embedding_dim, module.padding_idx
    new: nn.Module
    if isinstance(module, nn.Embedding):
        if kind == "dhe":
            new = DeepHashEmbedding(count, dim, config, padding_idx, **like)
        else:
            new = LowRankEmbedding(count, dim, config, padding_idx, module.sparse, **like)
    elif kind == "dhe":
        new = DeepHashEmbeddingBag(
            dim, config, module.mode, module.include_last_offset, padding_idx, count, **like
        )
    else:
        bags = module.sparse, module.include_last_offset, padding_idx
        new = LowRankEmbeddingBag(count, dim, config, module.mode, *bags, **like)
    if kind == "low_rank" and not module.weight.is_meta:
        new.approximate(module.weight)
    return new.train(module.training)


@functools.cache
def _plain_attributes() -> frozenset[str]:
    return frozenset(nn.Embedding(1, 1).__dict__) | frozenset(nn.EmbeddingBag(1, 1).__dict__)


def _carried(state: dict[str, Any], new: nn.Module) -> dict[str, Any]:
    """The new module's attributes, with the hooks and what else users had put on the old one."""
    kept = {k: v for k, v in state.items() if k not in _plain_attributes()}
    hooks = {k: v for k, v in state.items() if k.startswith(("_forward_", "_backward_", "_is_full_backward"))}
    return {**kept, **new.__dict__, **hooks}


class _Swapped:
    """What a table's class has before the user's class: pickling by that class's name."""

    original: type

    def __reduce_ex__(self, protocol):
        return _remake, (self.original,), self.__getstate__()


@functools.cache
def _on_kernels(cls: type) -> type:
    """The class of tables on mprec's kernels that is otherwise ``cls``."""
    base = EmbeddingBag if issubclass(cls, nn.EmbeddingBag) else Embedding
    if cls in (nn.EmbeddingBag, nn.Embedding) or issubclass(cls, base):
        return cls if issubclass(cls, base) else base
    attributes = {"__module__": cls.__module__, "__doc__": cls.__doc__, "original": cls}
    return types.new_class(cls.__name__, (_Swapped, cls, base), None, lambda body: body.update(attributes))


def _remake(cls: type) -> nn.Module:
    swapped = _on_kernels(cls)
    return swapped.__new__(swapped)


def _names_of_parameters(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    # One module under two names is not two modules that share a table.
    once = {id(p): 0 for p in model.parameters()}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                once[id(parameter)] += 1
    return {key: found if once[key] > 1 else found[:1] for key, found in names.items()}


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
