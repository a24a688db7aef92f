"""What can be made of a trained model: a recipe names a form of its embeddings, and makes it.

| recipe | embeddings |
|---|---|
| ``table`` | every decoder decoded into rows, once (exact) |
| ``table[float16]``, ``[int8]``, ``[int4]`` | those rows in fewer bits |
| ``low_rank:R``, ``low_rank:R[int8]`` | rows of rank R: R codes a row and a projection a feature |
| ``dhe:N`` | decoders taught by the rows, in an N-th of the rows' bytes; rows where that is too little |
| ``dhe`` | ``dhe:4`` |
| these, or a trained path, and ``/int8`` or ``/bfloat16`` | the same, with dense layers in fewer bits |

Each starts from the rows of the trained model, its tables and decoded decoders; its MLPs' weights stay as
they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor, nn

from mprec.cache import materialize
from mprec.data import ClickDataset
from mprec.derive.distil import distil, shape_for
from mprec.derive.factorise import code_limits, low_rank
from mprec.derive.sensitivity import sensitivity
from mprec.models import DLRM
from mprec.nn import (
    EmbeddingBagCollection,
    LowRankEmbeddingBagCollection,
    QuantizedEmbeddingBagCollection,
    folded,
)

__all__ = ["PRECISIONS", "Source", "choose", "default_recipes", "make", "representation_of", "split"]

PRECISIONS = ("float16", "int8", "int4")
Progress = Callable[[float], object]


class Source:
    """A trained model as recipes take it, with what they ask of its training data.

    ``model``: a DLRM whose embeddings are an :class:`mprec.nn.EmbeddingBagCollection`. ``train``: how often
    its IDs occur says which rows matter, and its samples what of a row matters; labels are not looked at.
    """

    def __init__(self, model: DLRM, train: ClickDataset) -> None:
        self.model, self.train = folded(model).eval(), train
        embeddings = self.model.embeddings
        if type(embeddings) is not EmbeddingBagCollection:
            raise TypeError(f"model: expected plain embeddings to derive from, got {type(embeddings)}")
        if mismatched := [f.name for f in embeddings.features if f.num_embeddings != self._size(f.name)]:
            raise ValueError(f"train: feature {mismatched[0]!r} has another vocabulary than the model's")

    def _size(self, name: str) -> int:
        return dict(self.train.features).get(name, -1)

    @cached_property
    def rows(self) -> EmbeddingBagCollection:
        """Tables alone: the model's own if it has nothing else."""
        embeddings = self.model.embeddings
        if all(f.representation == "table" for f in embeddings.features):
            return embeddings
        if endless := [f.name for f in embeddings.features if f.num_embeddings > 1 << 31]:
            raise ValueError(f"feature {endless[0]!r}: its raw values are its IDs, too many for rows")
        return materialize(embeddings)

    def weight(self, name: str) -> Tensor:
        return self.rows.tables._modules[name].weight.detach()

    @cached_property
    def counts(self) -> dict[str, Tensor]:
        return {f.name: torch.from_numpy(self.train.counts(f.name)) for f in self.rows.features}

    @cached_property
    def metric(self) -> dict[str, Tensor]:
        return sensitivity(self.model, self.train)


def default_recipes(source: Source) -> list[str]:
    """Recipes that suit a model, most bytes first; at last two that are small and fast at once. ``dhe`` is
    for models without decoders."""
    dim = source.model.embedding_dim
    ranks = [dim // part for part in (2, 4, 8, 16) if dim // part >= 1]
    tables = all(f.representation == "table" for f in source.model.embeddings.features)
    return [
        *([] if tables else ["table"]),
        *(f"table[{precision}]" for precision in PRECISIONS),
        *(["dhe"] if tables else []),
        *(f"low_rank:{rank}[int8]" for rank in ranks),
        *(f"{rows}/int8" for rows in ("table[int8]", f"low_rank:{max(1, dim // 4)}[int8]")),
    ]


def split(recipe: str) -> tuple[str, str]:
    """``table[int8]/bfloat16`` -> the recipe of the embeddings and the precision of dense layers."""
    embeddings, slash, dense = recipe.rpartition("/")
    return (embeddings, dense) if slash and dense in ("bfloat16", "int8") else (recipe, "float32")


def _parts(recipe: str) -> tuple[str, int | None, str]:
    """(representation, number, precision). ``ValueError`` for what is no recipe."""
    found = re.fullmatch(r"(table|dhe|low_rank)(?::([1-9]\d*))?(?:\[(\w+)\])?", recipe)
    representation, number, precision = found.groups() if found else ("", None, None)
    fits = {
        "table": number is None and precision in (None, *PRECISIONS),
        "dhe": precision is None,
        "low_rank": number is not None and precision in (None, "float16", "int8"),
    }
    if not fits.get(representation):
        raise ValueError(
            f"recipe {recipe!r}: expected table, table[{'|'.join(PRECISIONS)}], dhe, dhe:PART, "
            "low_rank:RANK or low_rank:RANK[float16|int8], or one of these and /int8 or /bfloat16"
        )
    return representation, None if number is None else int(number), precision or "float32"


def representation_of(recipe: str) -> str:
    """``low_rank:4[int8]`` -> ``low_rank``. ``ValueError`` for what is no recipe."""
    return _parts(recipe)[0]


def make(
    source: Source, recipe: str, *, seed: int = 0, progress: Progress | None = None
) -> EmbeddingBagCollection:
    """The embeddings that a recipe makes. ``ValueError`` for what is no recipe, or cannot be made of this
    model: the message says why."""
    representation, number, precision = _parts(recipe)
    if representation == "low_rank":
        return _low_rank(source, number, precision)
    if representation == "dhe":
        return _distilled(source, 1 / (number or 4), seed, progress)
    if precision == "float32":
        if source.rows is source.model.embeddings:
            raise ValueError("the model has tables already")
        return source.rows
    return QuantizedEmbeddingBagCollection(source.rows, tables=precision)


def _low_rank(source: Source, rank: int, precision: str) -> LowRankEmbeddingBagCollection:
    features = source.rows.features
    tables = {
        f.name: low_rank(source.weight(f.name), source.counts[f.name], rank, source.metric[f.name])
        for f in features
    }
    limits = {name: code_limits(table, source.counts[name]) for name, table in tables.items()}
    return LowRankEmbeddingBagCollection(features, tables, precision=precision, limits=limits)


def _distilled(source: Source, share: float, seed: int, progress: Progress | None) -> EmbeddingBagCollection:
    shapes = {f.name: shape_for(f.num_embeddings, f.embedding_dim, share, seed) for f in source.rows.features}
    chosen = [name for name, shape in shapes.items() if shape is not None]
    if not chosen:
        raise ValueError("no vocabulary is so large that a decoder would be smaller than its rows")
    features = [
        replace(f, representation="dhe", dhe=shapes[f.name]) if shapes[f.name] else f
        for f in source.rows.features
    ]
    made = EmbeddingBagCollection(features, device="meta")
    for f in features:
        if f.has_table:
            made.tables._modules[f.name].weight = nn.Parameter(source.weight(f.name), requires_grad=False)
    for done, name in enumerate(chosen):
        made.dhe._modules[name] = distil(
            source.weight(name),
            source.counts[name],
            shapes[name],
            next(f.mode for f in features if f.name == name),
            source.metric[name],
            seed=seed,
            progress=progress and (lambda share, done=done: progress((done + share) / len(chosen))),
        )
    return made


def choose(recipes: Sequence[str] | None, source: Source, trained: Sequence[str] = ()) -> list[str]:
    """The recipes asked for, or the default ones, with ``trained`` paths in int8 among them. ``ValueError``
    for one that is none, or twice there."""
    if recipes is None:
        return [*(f"{name}/int8" for name in trained), *default_recipes(source)]
    for recipe in recipes:
        if (embeddings := split(recipe)[0]) not in trained:
            _parts(embeddings)
    if len(set(recipes)) != len(recipes):
        raise ValueError(f"recipes: each only once, got {', '.join(recipes)}")
    return list(recipes)
