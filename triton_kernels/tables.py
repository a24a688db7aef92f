"""Kernels of tables' operators on CUDA (and ROCm) tensors: bags, gradients, optimizers.

Nothing here waits for the device, so offsets and IDs are not checked before a launch: kernels clamp offsets,
leave out IDs out of range and count them, and a later call raises (``faults``). What the kernels lack
(float64, gradients of maxima, sparse gradients) goes the way of any other device.
"""

import torch
from torch import Tensor

from mprec.bags import Bags
from mprec.kernels import kernel
from mprec.tensors import plain

from . import embedding_bag as pooling
from . import gradient
from .launch_arguments import KERNEL_DTYPES, aligned, columns_of, rounds


def _is_float(call) -> bool:
    return call.tables[0].dtype in KERNEL_DTYPES


@kernel("embedding_bag", "embedding_bag_multi", device="cuda", supports=_is_float)
def embedding_bag(call) -> Tensor:
    tables, bags = call.tables, call.bags.with_last_offset()
    dims = call.dims
    out = tables[0].new_empty(bags.batch, sum(dims))
    pooling.embedding_bag_grouped(
        [aligned(table) for table in tables], bags.indices, bags.offsets, bags.batch,
        bags.served(len(tables)), bags.mode, bags.per_sample_weights, bags.padding_idx, out,
        columns_of(dims),
    )  # fmt: skip
    return out


@kernel("quantized_embedding_bag_multi", device="cuda")
def quantised_embedding_bag(call) -> Tensor:
    """A launch for each kind of rows."""
    tables, bags, dims = call.tables, call.bags, call.dims
    features, columns = bags.served(len(tables)), columns_of(dims)
    kinds: dict[tuple, list[int]] = {}
    for t, (table, width) in enumerate(zip(tables, call.bits, strict=True)):
        kind = pooling.FLOAT if table.dtype in KERNEL_DTYPES else pooling.kind_of(width)
        kinds.setdefault((kind, table.dtype), []).append(t)
    out = tables[0].new_empty(bags.batch, sum(dims), dtype=torch.float32)
    for (kind, _), parts in kinds.items():
        pooling.embedding_bag_grouped(
            [aligned(tables[t]) for t in parts], bags.indices, bags.offsets, bags.batch,
            [features[t] for t in parts], bags.mode, bags.per_sample_weights, -1, out,
            [columns[t] for t in parts], kind,
        )  # fmt: skip
    return out


@kernel(
    "embedding_bag_backward",
    "embedding_bag_multi_backward",
    device="cuda",
    supports=lambda call: call.is_dense_sum and _is_float(call.of),
)
def embedding_bag_gradient(call) -> tuple[list[Tensor], Tensor]:
    tables = call.of.tables
    if not call.need_tables:
        return [call.grad.new_empty(0) for _ in tables], call.without_weights()
    columns, grad = columns_of(call.of.dims), plain(call.grad)
    found: dict[int, Tensor] = {}
    for parts, segments in _sorted(tables, call.of.bags.with_last_offset()):
        grads = gradient.weight_gradients(
            [tables[t] for t in parts], segments, grad, [columns[t] for t in parts]
        )
        found |= zip(parts, grads, strict=True)
    return [found[t] for t in range(len(tables))], call.without_weights()


def _sorted(tables, bags: Bags):
    """(which tables, their entries sorted by row), no feature twice at a time."""
    features = bags.served(len(tables))
    for parts in rounds(features):
        yield parts, gradient.sort_entries(
            [len(tables[t]) for t in parts], bags.indices, bags.offsets, bags.batch,
            [features[t] for t in parts], bags.num_features, bags.mode, bags.per_sample_weights,
            bags.padding_idx,
        )  # fmt: skip


@kernel("table_sgd_", device="cuda", supports=_is_float)
def sgd(call) -> None:
    for parts, segments in _sorted(call.tables, call.bags):
        columns = [call.columns[t] for t in parts]
        gradient.sgd_([call.tables[t] for t in parts], segments, call.grad, columns, call.lr)
    call.written()


@kernel("table_rowwise_adagrad_", device="cuda", supports=_is_float)
def rowwise_adagrad(call) -> None:
    for parts, segments in _sorted(call.tables, call.bags):
        tables, sums = [call.tables[t] for t in parts], [call.sums[t] for t in parts]
        columns = [call.columns[t] for t in parts]
        gradient.rowwise_adagrad_(tables, sums, segments, call.grad, columns, call.lr, call.eps)
    call.written()
