"""``torch.ops.mprec.table_sgd_`` and ``table_rowwise_adagrad_``: gradients applied as they are computed.

Both take the gradient ``grad`` ``[B, total]`` of pooled tables, table t's at ``columns[t]`` and on, with the
arguments of the forward pass, and update in place the rows that occur. (``pooling`` is their mode: torch's
functionalisation of operators that change arguments has no place for one of that name.)
"""

import torch

from mprec._native import _C
from mprec.ops import _csr
from mprec.ops._checks import (
    check_features,
    check_mode,
    check_ndim,
    check_per_sample_weights,
    check_same_device,
)
from mprec.ops._common import ids, library, mutated, plain

_BAGS = (
    "Tensor grad, Tensor indices, Tensor offsets, int pooling, Tensor? per_sample_weights, int padding_idx, "
    "int[] features, int num_features, int[] columns"
)
library.define(f"table_sgd_(Tensor(a!)[] weights, {_BAGS}, float lr) -> ()")
library.define(
    f"table_rowwise_adagrad_(Tensor(a!)[] weights, Tensor(b!)[] sums, {_BAGS}, float lr, float eps) -> ()"
)

_SGD, _ROWWISE_ADAGRAD = 1, 3  # csrc/gradient/gradient.h


def checked(grad, weights, sums, indices, offsets, mode, per_sample_weights, features, num_features, columns):
    """``indices`` and ``offsets`` as kernels take them; checks for every device."""
    check_same_device(
        weights=weights, sums=sums, grad=grad, indices=indices, offsets=offsets,
        per_sample_weights=per_sample_weights,
    )  # fmt: skip
    check_mode(mode, per_sample_weights)
    if mode == 2:
        raise NotImplementedError("pooling: max is not for tables that are updated in place")
    check_features(features, num_features, len(weights))
    check_ndim(grad, "grad", 2)
    check_ndim(indices, "indices")
    check_ndim(offsets, "offsets")
    check_per_sample_weights(per_sample_weights, torch.float32, indices)
    if len(columns) != len(weights) or (sums is not None and len(sums) != len(weights)):
        raise ValueError(f"columns, sums: expected one for each of {len(weights)} tables")
    for t, (weight, column) in enumerate(zip(weights, columns, strict=True)):
        if not 0 <= column <= grad.shape[1] - weight.shape[1]:
            raise ValueError(
                f"columns[{t}]: expected {weight.shape[1]} columns within the {grad.shape[1]} of grad, got "
                f"{column}"
            )
    batch = _csr.batch_size(offsets, num_features)
    if len(grad) != batch:
        raise ValueError(f"grad: expected one row for each of the {batch} bags of a feature, got {len(grad)}")
    return ids(indices, "indices"), ids(offsets, "offsets")


def _update(rule, weights, sums, grad, indices, offsets, mode, per_sample_weights, padding_idx, features,
            num_features, columns, lr, eps):  # fmt: skip
    indices, offsets = checked(
        grad, weights, sums, indices, offsets, mode, per_sample_weights, features, num_features, columns
    )
    csr = _csr.Csr(indices, offsets, plain(per_sample_weights))
    csr = _csr.select(csr, features, num_features)
    threads = torch.get_num_threads()
    _C.update_tables(
        list(weights), sums, None, *csr, mode, padding_idx, plain(grad), list(columns), rule, lr, eps,
        0.0, 0.0, threads,
    )  # fmt: skip
    mutated(*weights, *(sums or ()))


def _table_sgd_(weights, *bags):
    _update(_SGD, weights, None, *bags, 0.0)


def _table_rowwise_adagrad_(weights, sums, *bags):
    _update(_ROWWISE_ADAGRAD, weights, list(sums), *bags)


for _name, _function in (("table_sgd_", _table_sgd_), ("table_rowwise_adagrad_", _table_rowwise_adagrad_)):
    library.impl(_name, _function, "CPU")
    torch.library.register_fake(f"mprec::{_name}", lambda *arguments: None, lib=library)
