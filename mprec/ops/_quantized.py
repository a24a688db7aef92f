"""``torch.ops.mprec.quantized_embedding_bag_multi`` and ``quantized_dhe_bag_multi``: tables and decoders in
few bytes, float32 results.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mprec import reference
from mprec._native import _C
from mprec.ops import _csr, _dhe
from mprec.ops._checks import (
    check_bags,
    check_features,
    check_ids,
    check_mode,
    check_ndim,
    check_per_sample_weights,
    check_same_device,
)
from mprec.ops._common import NATIVE_TABLES, ids, library, plain

library.define(
    "quantized_embedding_bag_multi(Tensor[] rows, int[] bits, Tensor indices, Tensor offsets, int mode=0, "
    "Tensor? per_sample_weights=None, int[]? features=None, int? num_features=None) -> Tensor"
)
# affines: float32 [2, out] of each layer, the scales of its outputs and their biases
library.define(
    "quantized_dhe_bag_multi(Tensor indices, Tensor offsets, Tensor[] coefficients, Tensor[] weights, "
    "Tensor[] affines, int[] layers, str family, str activation, str last_activation, int mode=0, "
    "Tensor? per_sample_weights=None, int[]? features=None, int? num_features=None) -> Tensor"
)


def dims_of(rows: Sequence[Tensor], bits: Sequence[int]) -> list[int]:
    """Numbers in a row of each table. ``TypeError`` or ``ValueError`` for what is not a table of rows."""
    dims = []
    for t, (table, width) in enumerate(zip(rows, bits, strict=True)):
        if table.dim() != 2 or table.dtype not in (torch.uint8, *NATIVE_TABLES):
            raise TypeError(
                f"rows[{t}]: expected [N, bytes] of uint8, or [N, D] of float32, float16 or bfloat16, got "
                f"{list(table.shape)} of {table.dtype}"
            )
        if table.dtype == torch.uint8 and width not in (8, 4):
            raise ValueError(f"bits[{t}]: expected 8 or 4, got {width}")
        columns = table.shape[1]
        if table.dtype == torch.uint8:  # FBGEMM's fused rows: scale and bias follow the numbers
            columns = columns - 8 if width == 8 else (columns - 4) * 2
        if columns < 1:
            raise ValueError(f"rows[{t}]: {table.shape[1]} bytes hold no row of {width} bits")
        dims.append(columns)
    return dims


def _quantized_embedding_bag_multi(
    rows: Sequence[Tensor],
    bits: Sequence[int],
    indices: Tensor,
    offsets: Tensor,
    mode: int = 0,
    per_sample_weights: Tensor | None = None,
    features: Sequence[int] | None = None,
    num_features: int | None = None,
) -> Tensor:
    indices, offsets, num_features, _ = checked(
        rows, bits, indices, offsets, mode, per_sample_weights, features, num_features
    )
    return _C.embedding_bag_multi(
        [plain(table) for table in rows],
        indices,
        offsets,
        plain(per_sample_weights),
        mode,
        -1,
        torch.empty(_csr.batch_size(offsets, num_features), sum(dims_of(rows, bits)), dtype=torch.float32),
        None,
        torch.get_num_threads(),
        list(bits),
        features=features,
        num_features=num_features,
    )


def checked(rows, bits, indices, offsets, mode, per_sample_weights, features, num_features):
    """``indices``, ``offsets``, ``num_features`` as kernels take them, and the tables' dimensions; the checks
    that need no values, for every device."""
    if not rows or len(bits) != len(rows):
        raise ValueError(f"rows, bits: expected at least one, of equal number, got {len(rows)}, {len(bits)}")
    check_same_device(rows=rows, indices=indices, offsets=offsets, per_sample_weights=per_sample_weights)
    check_features(features, num_features, len(rows))
    check_mode(mode, per_sample_weights)
    check_ndim(indices, "indices")
    check_ndim(offsets, "offsets")
    check_per_sample_weights(per_sample_weights, torch.float32, indices)
    num_features = len(rows) if num_features is None else num_features
    _csr.batch_size(offsets, num_features)
    return ids(indices, "indices"), ids(offsets, "offsets"), num_features, dims_of(rows, bits)


def _quantized_embedding_bag_multi_fake(
    rows, bits, indices, offsets, mode=0, per_sample_weights=None, features=None, num_features=None
):
    batch = (offsets.shape[0] - 1) // (len(rows) if num_features is None else num_features)
    return rows[0].new_empty(batch, sum(dims_of(rows, bits)), dtype=torch.float32)


library.impl("quantized_embedding_bag_multi", _quantized_embedding_bag_multi, "CPU")
torch.library.register_fake(
    "mprec::quantized_embedding_bag_multi", _quantized_embedding_bag_multi_fake, lib=library
)


def _quantized_dhe_bag_multi(
    indices: Tensor,
    offsets: Tensor,
    coefficients: Sequence[Tensor],
    weights: Sequence[Tensor],
    affines: Sequence[Tensor],
    layers: Sequence[int],
    family: str,
    activation: str,
    last_activation: str,
    mode: int = 0,
    per_sample_weights: Tensor | None = None,
    features: Sequence[int] | None = None,
    num_features: int | None = None,
) -> Tensor:
    """The formula, in float64: CPUs have no float8 products. On CUDA there is a kernel."""
    options = (family, activation, last_activation)
    _dhe.stacks_of(coefficients, weights, affines, layers, options, scaled=True)
    check_same_device(
        indices=indices,
        offsets=offsets,
        coefficients=coefficients,
        weights=weights,
        affines=affines,
        per_sample_weights=per_sample_weights,
    )
    indices, offsets, num_features = _dhe.checked_multi(
        indices, offsets, torch.float32, mode, per_sample_weights, features, num_features, len(layers)
    )
    check_bags(offsets, len(indices), True, num_features)
    check_ids(indices, offsets, [None] * num_features, _csr.batch_size(offsets, num_features))
    out = reference.dhe_bag_multi(
        indices, offsets, coefficients, weights, affines, layers, *options, mode, per_sample_weights,
        features, num_features,
    )  # fmt: skip
    return out.to(torch.float32)


def _quantized_dhe_bag_multi_fake(
    indices, offsets, coefficients, weights, affines, layers, family, activation, last_activation, mode=0,
    per_sample_weights=None, features=None, num_features=None,
):  # fmt: skip
    batch = (offsets.shape[0] - 1) // (len(layers) if num_features is None else num_features)
    dims = [stack[-1].shape[0] for stack in _dhe._split(layers, weights)]
    return affines[0].new_empty(batch, sum(dims))


library.impl("quantized_dhe_bag_multi", _quantized_dhe_bag_multi, "CPU")
torch.library.register_fake("mprec::quantized_dhe_bag_multi", _quantized_dhe_bag_multi_fake, lib=library)
