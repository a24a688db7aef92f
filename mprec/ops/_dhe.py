"""``torch.ops.mprec.dhe_bag`` and ``dhe_bag_multi``: schemas and implementations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mprec import reference
from mprec._native import _C
from mprec.ops import _autograd, _csr
from mprec.ops._checks import (
    check_bags,
    check_features,
    check_ids,
    check_mode,
    check_ndim,
    check_per_sample_weights,
    check_same_device,
    num_bags,
)
from mprec.ops._common import ids, library, native, plain
from mprec.ops._decoders import check_decoder, decoder

library.define(
    "dhe_bag(Tensor indices, Tensor offsets, Tensor coefficients, Tensor[] weights, Tensor[] biases, str "
    "family, "
    "str activation, str last_activation, int mode=0, Tensor? per_sample_weights=None, "
    "bool include_last_offset=False, int padding_idx=-1) -> Tensor"
)
library.define(
    "dhe_bag_multi(Tensor indices, Tensor offsets, Tensor[] coefficients, Tensor[] weights, Tensor[] biases, "
    "int[] layers, str family, str activation, str last_activation, int mode=0, Tensor? "
    "per_sample_weights=None, "
    "int[]? features=None, int? num_features=None) -> Tensor"
)


def _split(layers: Sequence[int], values: Sequence[Tensor]) -> list[list[Tensor]]:
    """The flat tensors of all decoders, by decoder."""
    ends = [sum(layers[: t + 1]) for t in range(len(layers))]
    return [list(values[end - count : end]) for end, count in zip(ends, layers, strict=True)]


def _forward_rows(indices, coefficients, weights, biases, family, activation, last_activation):
    """Vectors of each ID without the native fused kernel: the GPU's kernel, or plain torch."""
    if indices.is_cuda and native(weights[0]):
        from mprec.triton_kernels import dhe  # imports triton: only where it is needed

        return dhe.dhe_forward(indices, coefficients, weights, biases, family, activation, last_activation)
    dtype = weights[0].dtype if indices.is_cuda else torch.float64
    return reference.dhe(
        indices, coefficients, weights, biases, family, activation, last_activation, dtype=dtype
    )


# -------------------------------------------------------------------------------------------- one decoder


def checked(indices, offsets, dtype, mode, per_sample_weights, include_last_offset, padding_idx=-1):
    """``indices`` and ``offsets`` as kernels take them; the checks that need no look at their values."""
    check_mode(mode, per_sample_weights)
    check_ndim(indices, "indices")
    check_ndim(offsets, "offsets")
    check_per_sample_weights(per_sample_weights, dtype, indices)
    num_bags(offsets, include_last_offset)
    return ids(indices, "indices"), ids(offsets, "offsets")


def _dhe_bag(
    indices: Tensor,
    offsets: Tensor,
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    family: str,
    activation: str,
    last_activation: str,
    mode: int = 0,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Tensor:
    check_decoder(coefficients, weights, biases, family, activation, last_activation)
    check_same_device(
        indices=indices,
        offsets=offsets,
        coefficients=coefficients,
        weights=weights,
        biases=biases,
        per_sample_weights=per_sample_weights,
    )
    indices, offsets = checked(
        indices, offsets, weights[0].dtype, mode, per_sample_weights, include_last_offset
    )
    per_sample_weights = plain(per_sample_weights)
    if indices.is_cpu and native(weights[0]):
        handle = decoder(coefficients, weights, biases, family, activation, last_activation)
        threads = torch.get_num_threads()
        return _C.dhe_bag(
            handle,
            indices,
            offsets,
            per_sample_weights,
            mode,
            include_last_offset,
            padding_idx,
            None,
            threads,
        )
    check_bags(offsets, len(indices), include_last_offset)
    check_ids(indices, offsets, [None], num_bags(offsets, include_last_offset))
    keep = None if padding_idx < 0 else indices != padding_idx
    rows = _forward_rows(indices, coefficients, weights, biases, family, activation, last_activation)
    out = reference.pool(rows, offsets, mode, per_sample_weights, include_last_offset, keep)
    return out.to(weights[0].dtype)


def formula(
    indices, offsets, coefficients, weights, biases, family, activation, last_activation, mode,
    per_sample_weights, include_last_offset, padding_idx,
):  # fmt: skip
    """The operator in plain torch, for what its kernels cannot be asked."""
    check_decoder(coefficients, weights, biases, family, activation, last_activation)
    indices, offsets = checked(
        indices, offsets, weights[0].dtype, mode, per_sample_weights, include_last_offset
    )
    _check_values(indices, offsets, include_last_offset, 1)
    dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    out = reference.dhe_bag(
        indices, offsets, coefficients, weights, biases, family, activation, last_activation, mode,
        per_sample_weights, include_last_offset, padding_idx, dtype=dtype,
    )  # fmt: skip
    return out.to(weights[0].dtype)


def _check_values(indices, offsets, include_last_offset, num_features) -> None:
    if _autograd.is_batched(offsets):
        raise NotImplementedError("offsets: torch.func.vmap cannot map over them; map over input [B, L]")
    check_bags(offsets, len(indices), include_last_offset, num_features)
    if not _autograd.is_batched(indices):
        bags = num_bags(offsets, include_last_offset) // num_features
        check_ids(indices, offsets, [None] * num_features, bags)


def _dhe_bag_fake(
    indices,
    offsets,
    coefficients,
    weights,
    biases,
    family,
    activation,
    last_activation,
    mode=0,
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=-1,
):
    return weights[-1].new_empty(offsets.shape[0] - include_last_offset, weights[-1].shape[0])


# ---------------------------------------------------------------------------------- one decoder per feature


def stacks_of(
    coefficients, weights, biases, layers, options, scaled=False
) -> list[tuple[Tensor, list, list]]:
    """(coefficients, weights, biases) of each decoder. ``TypeError``, ``ValueError`` if they do not fit."""
    if not layers or not len(coefficients) == len(layers) or not sum(layers) == len(weights) == len(biases):
        raise ValueError(
            f"layers: {list(layers)} do not describe {len(coefficients)} coefficients, "
            f"{len(weights)} weights and {len(biases)} {'affines' if scaled else 'biases'}"
        )
    stacks = list(zip(coefficients, _split(layers, weights), _split(layers, biases), strict=True))
    for t, stack in enumerate(stacks):
        check_decoder(*stack, *options, f"decoder {t}: ", scaled)
    return stacks


def checked_multi(indices, offsets, dtype, mode, per_sample_weights, features, num_features, count):
    """``indices``, ``offsets``, ``num_features`` as kernels take them; the checks that need no values."""
    check_features(features, num_features, count)
    check_mode(mode, per_sample_weights)
    check_ndim(indices, "indices")
    check_ndim(offsets, "offsets")
    check_per_sample_weights(per_sample_weights, dtype, indices, or_float32=True)
    num_features = count if num_features is None else num_features
    _csr.batch_size(offsets, num_features)
    return ids(indices, "indices"), ids(offsets, "offsets"), num_features


def _dhe_bag_multi(
    indices: Tensor,
    offsets: Tensor,
    coefficients: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layers: Sequence[int],
    family: str,
    activation: str,
    last_activation: str,
    mode: int = 0,
    per_sample_weights: Tensor | None = None,
    features: Sequence[int] | None = None,
    num_features: int | None = None,
) -> Tensor:
    options = family, activation, last_activation
    stacks = stacks_of(coefficients, weights, biases, layers, options)
    check_same_device(
        indices=indices,
        offsets=offsets,
        coefficients=coefficients,
        weights=weights,
        biases=biases,
        per_sample_weights=per_sample_weights,
    )
    indices, offsets, num_features = checked_multi(
        indices, offsets, weights[0].dtype, mode, per_sample_weights, features, num_features, len(layers)
    )
    if indices.is_cpu and native(*weights):
        handles = [decoder(*stack, *options) for stack in stacks]
        return _C.dhe_bag_multi(
            handles,
            indices,
            offsets,
            plain(per_sample_weights),
            mode,
            -1,
            None,
            None,
            torch.get_num_threads(),
            features=features,
            num_features=num_features,
        )
    check_bags(offsets, len(indices), True, num_features)
    csr = _csr.Csr(indices, offsets, per_sample_weights)
    features = range(num_features) if features is None else features
    batch = _csr.batch_size(offsets, num_features)
    check_ids(indices, offsets, [None] * len(features), batch, features, num_features)
    parts = []
    for stack, (begin, end, starts) in zip(
        stacks, _csr.feature_slices(csr, features, num_features), strict=True
    ):
        rows = _forward_rows(indices[begin:end], *stack, *options)
        psw = None if per_sample_weights is None else per_sample_weights[begin:end]
        parts.append(reference.pool(rows, starts, mode, psw, True).to(weights[0].dtype))
    return torch.cat(parts, dim=1)


def multi_formula(
    indices, offsets, coefficients, weights, biases, layers, family, activation, last_activation, mode,
    per_sample_weights, features, num_features,
):  # fmt: skip
    """The operator in plain torch, for what its kernels cannot be asked."""
    options = family, activation, last_activation
    stacks_of(coefficients, weights, biases, layers, options)
    indices, offsets, num_features = checked_multi(
        indices, offsets, weights[0].dtype, mode, per_sample_weights, features, num_features, len(layers)
    )
    _check_values(indices, offsets, True, num_features)
    dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    out = reference.dhe_bag_multi(
        indices, offsets, coefficients, weights, biases, layers, *options, mode, per_sample_weights,
        features, num_features, dtype=dtype,
    )  # fmt: skip
    return out.to(weights[0].dtype)


def _last_weights(weights, layers):
    return [stack[-1] for stack in _split(layers, weights)]


def _dhe_bag_multi_fake(
    indices,
    offsets,
    coefficients,
    weights,
    biases,
    layers,
    family,
    activation,
    last_activation,
    mode=0,
    per_sample_weights=None,
    features=None,
    num_features=None,
):
    batch = (offsets.shape[0] - 1) // (len(layers) if num_features is None else num_features)
    return weights[0].new_empty(batch, sum(weight.shape[0] for weight in _last_weights(weights, layers)))


for _name, _forward, _forward_fake in (
    ("dhe_bag", _dhe_bag, _dhe_bag_fake),
    ("dhe_bag_multi", _dhe_bag_multi, _dhe_bag_multi_fake),
):
    library.impl(_name, _forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mprec::{_name}", _forward_fake, lib=library)
