"""Operators as plain torch, for exporters that know only aten's: ``torch.onnx.export`` finds these by itself.

They compute in the weights' precision and check neither IDs nor offsets. torch also asks the table of
decompositions for the shapes of results; those are the fakes' business, here and now as without this file.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch._decomp import register_decomposition
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from mprec import reference
from mprec.names import MODES
from mprec.ops import _dense, _dhe, _tables

Slices = Iterator[tuple[Tensor, Tensor, Tensor | None]]


def _decompose(name: str, fake: Callable, formula: Callable) -> None:
    def decomposition(*arguments, **options):
        return (fake if get_proxy_mode() is None else formula)(*arguments, **options)

    register_decomposition(getattr(torch.ops.mprec, name).default)(decomposition)


def _bag_of_each(starts: Tensor, count: int) -> Tensor:
    """The bag of each of ``count`` positions, from where bags start ``[bags]``: how many later bags have
    started by then. (A search would be shorter, but exporters have none.)"""
    marks = starts.new_zeros(count + 1, dtype=torch.int64)
    later = starts[1:].to(torch.int64)
    return marks.scatter_add(0, later, torch.ones_like(later)).cumsum(0)[:count]


def _pool(
    rows: Tensor, bag: Tensor, bags: int, mode: int, weights: Tensor | None, keep: Tensor | None = None
) -> Tensor:
    """Vectors ``[n, D]`` pooled into ``[bags, D]``; those not to ``keep`` are left out."""
    where = bag[:, None].expand(-1, rows.shape[1])
    zeros = rows.new_zeros(bags, rows.shape[1])
    if mode == MODES["max"]:
        if keep is not None:
            rows = torch.where(keep[:, None], rows, -torch.inf)
        top = torch.full_like(zeros, -torch.inf).scatter_reduce(0, where, rows, "amax")
        return torch.where(top == -torch.inf, 0.0, top)
    if weights is not None:
        rows = rows * weights.to(rows.dtype)[:, None]
    ones = rows.new_ones(rows.shape[0])
    if keep is not None:
        rows, ones = torch.where(keep[:, None], rows, 0.0), keep.to(rows.dtype)
    total = zeros.scatter_add(0, where, rows)
    if mode == MODES["mean"]:
        total = total / rows.new_zeros(bags).scatter_add(0, bag, ones).clamp(min=1)[:, None]
    return total


def _slices(
    indices: Tensor, offsets: Tensor, weights: Tensor | None, features: Sequence[int] | None, count: int
) -> Slices:
    """Of each feature the IDs, the bag of each and its weight."""
    samples = (offsets.shape[0] - 1) // count
    bag = _bag_of_each(offsets[:-1], indices.shape[0])
    for f in range(count) if features is None else features:
        at = ((bag >= f * samples) & (bag < (f + 1) * samples)).nonzero()[:, 0]
        yield indices[at], bag[at] - f * samples, None if weights is None else weights[at]


def _embedding_bag(
    weight, indices, offsets, mode=0, per_sample_weights=None, include_last_offset=False, padding_idx=-1,
    scale_grad_by_freq=False, sparse=False,
) -> Tensor:  # fmt: skip
    bags = offsets.shape[0] - include_last_offset
    bag = _bag_of_each(offsets[:bags], indices.shape[0])
    keep = None if padding_idx < 0 else indices != padding_idx
    return _pool(weight[indices], bag, bags, mode, per_sample_weights, keep)


def _embedding_bag_multi(
    weights, indices, offsets, mode=0, per_sample_weights=None, features=None, num_features=None, sparse=False
) -> Tensor:
    count = num_features or len(weights)
    samples = (offsets.shape[0] - 1) // count
    parts = _slices(indices, offsets, per_sample_weights, features, count)
    vectors = [
        _pool(weight[ids], bag, samples, mode, psw)
        for weight, (ids, bag, psw) in zip(weights, parts, strict=True)
    ]
    return torch.cat(vectors, dim=1)


def _dhe_bag(
    indices, offsets, coefficients, weights, biases, family, activation, last_activation, mode=0,
    per_sample_weights=None, include_last_offset=False, padding_idx=-1,
) -> Tensor:  # fmt: skip
    bags = offsets.shape[0] - include_last_offset
    bag = _bag_of_each(offsets[:bags], indices.shape[0])
    keep = None if padding_idx < 0 else indices != padding_idx
    rows = reference.dhe(
        indices, coefficients, weights, biases, family, activation, last_activation, dtype=weights[0].dtype
    )
    return _pool(rows, bag, bags, mode, per_sample_weights, keep)


def _dhe_bag_multi(
    indices, offsets, coefficients, weights, biases, layers, family, activation, last_activation, mode=0,
    per_sample_weights=None, features=None, num_features=None,
) -> Tensor:  # fmt: skip
    count = num_features or len(layers)
    samples = (offsets.shape[0] - 1) // count
    parts = _slices(indices, offsets, per_sample_weights, features, count)
    stacks = zip(coefficients, _dhe._split(layers, weights), _dhe._split(layers, biases), parts, strict=True)
    options = family, activation, last_activation
    vectors = [
        _pool(reference.dhe(ids, *stack, *options, dtype=weights[0].dtype), bag, samples, mode, psw)
        for *stack, (ids, bag, psw) in stacks
    ]
    return torch.cat(vectors, dim=1)


def _mlp(input, weights, biases, activation, last_activation) -> Tensor:
    return reference.mlp(input, weights, biases, activation, last_activation, dtype=input.dtype)


def _dot_interaction(vectors, self_interaction=False) -> Tensor:
    return reference.dot_interaction(vectors, self_interaction, dtype=vectors.dtype)


for _name, _fake, _formula in (
    ("embedding_bag", _tables._embedding_bag_fake, _embedding_bag),
    ("embedding_bag_multi", _tables._embedding_bag_multi_fake, _embedding_bag_multi),
    ("dhe_bag", _dhe._dhe_bag_fake, _dhe_bag),
    ("dhe_bag_multi", _dhe._dhe_bag_multi_fake, _dhe_bag_multi),
    ("mlp", _dense._mlp_fake, _mlp),
    ("dot_interaction", _dense._dot_interaction_fake, _dot_interaction),
):
    _decompose(_name, _fake, _formula)
