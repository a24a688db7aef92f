"""``torch.ops.mprec.table_sgd_`` and ``table_rowwise_adagrad_``: gradients applied as they are computed.

Both take the gradient ``grad`` ``[B, total]`` of pooled tables, table t's at ``columns[t]`` and on, with the
arguments of the forward pass, and update in place the rows that occur. (``pooling`` is their mode: torch's
functionalisation of operators that change arguments has no place for one of that name.)
"""

import torch

from mprec._native import _C
from mprec.ops import _csr
from mprec.ops._common import contiguous, ids, library

_BAGS = (
    "Tensor grad, Tensor indices, Tensor offsets, int pooling, Tensor? per_sample_weights, int padding_idx, "
    "int[] features, int num_features, int[] columns"
)
library.define(f"table_sgd_(Tensor(a!)[] weights, {_BAGS}, float lr) -> ()")
library.define(
    f"table_rowwise_adagrad_(Tensor(a!)[] weights, Tensor(b!)[] sums, {_BAGS}, float lr, float eps) -> ()"
)

_SGD, _ROWWISE_ADAGRAD = 1, 3  # csrc/gradient/gradient.h


def _update(rule, weights, sums, grad, indices, offsets, mode, per_sample_weights, padding_idx, features,
            num_features, columns, lr, eps):  # fmt: skip
    csr = _csr.Csr(ids(indices, "indices"), ids(offsets, "offsets"), contiguous(per_sample_weights))
    csr = _csr.select(csr, features, num_features)
    threads = torch.get_num_threads()
    _C.update_tables(
        list(weights), sums, None, *csr, mode, padding_idx, contiguous(grad), list(columns), rule, lr, eps,
        0.0, 0.0, threads,
    )  # fmt: skip


def _table_sgd_(weights, *bags):
    _update(_SGD, weights, None, *bags, 0.0)


def _table_rowwise_adagrad_(weights, sums, *bags):
    _update(_ROWWISE_ADAGRAD, weights, list(sums), *bags)


for _name, _function in (("table_sgd_", _table_sgd_), ("table_rowwise_adagrad_", _table_rowwise_adagrad_)):
    library.impl(_name, _function, "CPU")
    torch.library.register_fake(f"mprec::{_name}", lambda *arguments: None, lib=library)
