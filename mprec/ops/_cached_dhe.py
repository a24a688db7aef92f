"""``torch.ops.mprec.cached_dhe_bag``: deep hash embeddings behind a fixed table of hot IDs' vectors.

``keys`` int64 ``[slots]`` (-1: empty) and ``rows`` ``[slots, D]`` are an open-addressing table as
``mprec.triton_kernels.row_cache.build`` makes it. IDs in it take their row, the others are decoded. Without
gradients. The native cache of :mod:`mprec.cache` serves the CPU; here, a CPU only has the plain meaning.
"""

import torch

from mprec import reference
from mprec.ops import _dhe
from mprec.ops._checks import check_bags, check_ids, check_ndim, check_same_device, num_bags
from mprec.ops._common import library
from mprec.ops._decoders import check_decoder

library.define(
    "cached_dhe_bag(Tensor keys, Tensor rows, int probes, Tensor indices, Tensor offsets, "
    "Tensor coefficients, Tensor[] weights, Tensor[] biases, str family, str activation, "
    "str last_activation, int mode=0, Tensor? per_sample_weights=None, bool include_last_offset=False, "
    "int padding_idx=-1) -> Tensor"
)


def checked(
    keys, rows, probes, indices, offsets, coefficients, weights, biases, family, activation, last_activation,
    mode, per_sample_weights, include_last_offset,
):  # fmt: skip
    """``indices`` and ``offsets`` as kernels take them; the checks that need no values, for every device."""
    check_decoder(coefficients, weights, biases, family, activation, last_activation)
    check_same_device(
        keys=keys, rows=rows, indices=indices, offsets=offsets, coefficients=coefficients, weights=weights,
        biases=biases, per_sample_weights=per_sample_weights,
    )  # fmt: skip
    check_ndim(keys, "keys")
    if keys.dtype != torch.int64:
        raise TypeError(f"keys: expected int64, got {keys.dtype}")
    if not len(keys) or len(keys) & (len(keys) - 1):
        raise ValueError(f"keys: expected a power of two of them, got {len(keys)}")
    dim = weights[-1].shape[0]
    if rows.shape != (len(keys), dim):
        raise ValueError(f"rows: expected [{len(keys)}, {dim}], got {list(rows.shape)}")
    if probes < 1:
        raise ValueError(f"probes: expected at least 1, got {probes}")
    return _dhe.checked(indices, offsets, weights[0].dtype, mode, per_sample_weights, include_last_offset)


def _cached_dhe_bag(
    keys, rows, probes, indices, offsets, coefficients, weights, biases, family, activation, last_activation,
    mode=0, per_sample_weights=None, include_last_offset=False, padding_idx=-1,
):  # fmt: skip
    indices, offsets = checked(
        keys, rows, probes, indices, offsets, coefficients, weights, biases, family, activation,
        last_activation, mode, per_sample_weights, include_last_offset,
    )  # fmt: skip
    check_bags(offsets, len(indices), include_last_offset)
    check_ids(indices, offsets, [None], num_bags(offsets, include_last_offset))
    keep = None if padding_idx < 0 else indices != padding_idx
    alone = torch.arange(len(indices), device=indices.device)
    vectors = _dhe._dhe_bag(
        indices.clamp(min=0), alone, coefficients, weights, biases, family, activation, last_activation
    )
    in_order, slot = keys.sort()
    at = torch.searchsorted(in_order, indices.long()).clamp(max=len(keys) - 1)
    hit = (in_order[at] == indices) & (indices >= 0)
    vectors = torch.where(hit[:, None], rows[slot[at]].to(vectors.dtype), vectors)
    return reference.pool(vectors, offsets, mode, per_sample_weights, include_last_offset, keep)


def _cached_dhe_bag_fake(
    keys, rows, probes, indices, offsets, coefficients, weights, biases, family, activation, last_activation,
    mode=0, per_sample_weights=None, include_last_offset=False, padding_idx=-1,
):  # fmt: skip
    return weights[-1].new_empty(offsets.shape[0] - include_last_offset, weights[-1].shape[0])


library.impl("cached_dhe_bag", _cached_dhe_bag, "CPU")
torch.library.register_fake("mprec::cached_dhe_bag", _cached_dhe_bag_fake, lib=library)
