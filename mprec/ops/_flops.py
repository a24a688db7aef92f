"""What operators cost, for ``torch.utils.flop_counter.FlopCounterMode``: matrix products alone, as torch
counts its own; forward passes and gradients."""

import math

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

__all__: list[str] = []


def _products(shapes) -> int:
    """Two per weight of the layers, for one vector."""
    return sum(2 * math.prod(shape) for shape in shapes)


@register_flop_formula(torch.ops.mprec.dhe_bag)
def _dhe_bag(indices, offsets, coefficients, weights, *arguments, **options) -> int:
    return math.prod(indices) * _products(weights)


@register_flop_formula(torch.ops.mprec.dhe_bag_backward)
def _dhe_bag_backward(grad, indices, offsets, coefficients, weights, *arguments, **options) -> int:
    # The forward pass again, the weights' gradients, and all inputs' but those of the first layer: hashes.
    return math.prod(indices) * (3 * _products(weights) - _products(weights[:1]))


@register_flop_formula(torch.ops.mprec.dhe_bag_multi, get_raw=True)
def _dhe_bag_multi(
    indices, offsets, coefficients, weights, biases, layers, family, activation, last_activation, mode=0,
    per_sample_weights=None, features=None, num_features=None, out_val=None,
) -> int:  # fmt: skip
    stacks = _stacks(weights, layers)
    counts = _counts(offsets, indices, features, num_features, len(layers))
    return sum(count * _products(stack) for count, stack in zip(counts, stacks, strict=True))


@register_flop_formula(torch.ops.mprec.dhe_bag_multi_backward, get_raw=True)
def _dhe_bag_multi_backward(
    grad, indices, offsets, coefficients, weights, biases, layers, family, activation, last_activation, mode,
    per_sample_weights, features, num_features, need_per_sample_weights, out_val=None,
) -> int:  # fmt: skip
    stacks = _stacks(weights, layers)
    counts = _counts(offsets, indices, features, num_features, len(layers))
    return sum(
        count * (3 * _products(stack) - _products(stack[:1]))
        for count, stack in zip(counts, stacks, strict=True)
    )


def _stacks(weights, layers) -> list[list]:
    ends = [sum(layers[: t + 1]) for t in range(len(layers))]
    return [[w.shape for w in weights[end - n : end]] for end, n in zip(ends, layers, strict=True)]


def _counts(offsets, indices, features, num_features, decoders: int) -> list[int]:
    """How many IDs each decoder has; of tensors without values, an equal share."""
    num_features = num_features or decoders
    features = range(num_features) if features is None else features
    if isinstance(offsets, FakeTensor) or offsets.is_meta:
        return [indices.shape[0] // num_features for _ in features]
    batch = (offsets.shape[0] - 1) // num_features
    ends = offsets[::batch].tolist() if batch else [0] * (num_features + 1)
    return [ends[f + 1] - ends[f] for f in features]


@register_flop_formula(torch.ops.mprec.mlp)
def _mlp(input, weights, *arguments, **options) -> int:
    return input[0] * _products(weights)


@register_flop_formula(torch.ops.mprec.dot_interaction)
def _dot_interaction(vectors, self_interaction=False, first=None, **options) -> int:
    batch, count, dim = vectors
    count += first is not None
    return 2 * batch * dim * (count * (count - 1) // 2 + (count if self_interaction else 0))


@register_flop_formula(torch.ops.mprec.dot_interaction_backward)
def _dot_interaction_backward(grad, vectors, self_interaction, first, **options) -> int:
    return 2 * _dot_interaction(vectors, self_interaction, first)
