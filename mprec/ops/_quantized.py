"""``torch.ops.mprec.quantized_embedding_bag_multi``: tables in few bytes, float32 results."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mprec.ops import _csr
from mprec.ops._common import NATIVE_TABLES, check_same_device, contiguous, ids, library
from mprec.ops._tables import run_embedding_bag_multi

library.define(
    "quantized_embedding_bag_multi(Tensor[] rows, int[] bits, Tensor indices, Tensor offsets, int mode=0, "
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
