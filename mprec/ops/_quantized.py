"""``torch.ops.mprec.quantized_embedding_bag_multi`` and ``quantized_dhe_bag_multi``: tables and decoders in
few bytes, float32 results.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mprec import reference
from mprec.ops import _csr
from mprec.ops._common import (
    NATIVE_TABLES,
    check_bags,
    check_ids,
    check_per_sample_weights,
    check_same_device,
    contiguous,
    ids,
    library,
)
from mprec.ops._dhe import _split, check_decoder
from mprec.ops._tables import run_embedding_bag_multi
from mprec.row_formats import quantised_format

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
        columns = table.shape[1]
        if table.dtype == torch.uint8:
            rows_are = quantised_format(width, f"bits[{t}]")
            columns = rows_are.dim(table.shape[1])
            if columns < 1:
                raise ValueError(f"rows[{t}]: {table.shape[1]} bytes hold no row of {rows_are.name}")
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
    check_same_device(rows=rows, indices=indices, offsets=offsets, per_sample_weights=per_sample_weights)
    dims, num_features = dims_of(rows, bits), len(rows) if num_features is None else num_features
    indices, offsets = ids(indices, "indices"), ids(offsets, "offsets")
    out = torch.empty(_csr.batch_size(offsets, num_features), sum(dims))
    return run_embedding_bag_multi(
        [contiguous(table) for table in rows],
        indices,
        offsets,
        mode,
        contiguous(per_sample_weights),
        out,
        None,
        features,
        num_features,
        list(bits),
    )


def _quantized_embedding_bag_multi_fake(
    rows, bits, indices, offsets, mode=0, per_sample_weights=None, features=None, num_features=None
):
    batch = (offsets.shape[0] - 1) // (len(rows) if num_features is None else num_features)
    return rows[0].new_empty(batch, sum(dims_of(rows, bits)), dtype=torch.float32)


library.impl("quantized_embedding_bag_multi", _quantized_embedding_bag_multi, "CPU")
torch.library.register_fake(
    "mprec::quantized_embedding_bag_multi", _quantized_embedding_bag_multi_fake, lib=library
)


def float8_stacks(coefficients, weights, affines, layers, options) -> list[tuple[Tensor, list, list]]:
    """(coefficients, weights, affines) of each decoder. ``TypeError``, ``ValueError`` if they do not fit."""
    if not len(coefficients) == len(layers) or not sum(layers) == len(weights) == len(affines):
        raise ValueError(
            f"layers: {list(layers)} do not describe {len(coefficients)} coefficients, {len(weights)} "
            f"weights and {len(affines)} affines"
        )
    stacks = list(zip(coefficients, _split(layers, weights), _split(layers, affines), strict=True))
    for t, stack in enumerate(stacks):
        check_decoder(*stack, *options, f"decoder {t}: ", scaled=True)
    return stacks


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
    float8_stacks(coefficients, weights, affines, layers, options)
    check_same_device(
        indices=indices,
        offsets=offsets,
        coefficients=coefficients,
        weights=weights,
        affines=affines,
        per_sample_weights=per_sample_weights,
    )
    indices, offsets = ids(indices, "indices"), ids(offsets, "offsets")
    check_per_sample_weights(per_sample_weights, affines[0], indices)
    _csr.batch_size(offsets, len(layers) if num_features is None else num_features)
    check_bags(offsets, len(indices), True)
    check_ids(indices, None)
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
    dims = [stack[-1].shape[0] for stack in _split(layers, weights)]
    return affines[0].new_empty(batch, sum(dims))


library.impl("quantized_dhe_bag_multi", _quantized_dhe_bag_multi, "CPU")
torch.library.register_fake("mprec::quantized_dhe_bag_multi", _quantized_dhe_bag_multi_fake, lib=library)
