"""``torch.ops.mprec.table_sgd_`` and ``table_rowwise_adagrad_``: gradients applied as they are computed.

Both take the gradient ``grad`` ``[B, total]`` of pooled tables, table t's at ``columns[t]`` and on, with the
arguments of the forward pass, and update in place the rows that occur. Rows of 16-bit tables are rounded to
nearest (:mod:`mprec.optim` rounds stochastically). (``pooling`` is their mode: torch's functionalisation of
operators that change arguments has no place for one of that name.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mprec._native import _C
from mprec.bags import Bags, check_ndim
from mprec.kernels import kernel
from mprec.names import MODES
from mprec.ops._checks import check_same_device
from mprec.ops._common import mutated
from mprec.ops._table import Op
from mprec.tensors import plain

#: Numbers of csrc/gradient/gradient.h.
RULES = {"assign": 0, "sgd": 1, "adagrad": 2, "rowwise_adagrad": 3, "adam": 4}


class Update(NamedTuple):
    """The call: tables, their states (one list per kind), and where in ``grad`` their gradients are."""

    tables: Sequence[Tensor]
    sums: Sequence[Tensor] | None
    grad: Tensor
    bags: Bags
    columns: Sequence[int]
    lr: float
    eps: float = 0.0

    @property
    def device(self) -> str:
        return self.grad.device.type

    def written(self) -> None:
        """For kernels to call when they have updated tables and sums."""
        mutated(*self.tables, *(self.sums or ()))


def update_tables(
    rule: str,
    tables: Sequence[Tensor],
    states: Sequence[Sequence[Tensor]],
    bags: Bags,
    grad: Tensor,
    columns: Sequence[int] | None = None,
    lr: float = 0.0,
    eps: float = 0.0,
    betas: tuple[float, float] = (0.0, 0.0),
    keep: float = 1.0,
    noise: Sequence[int] | None = None,
) -> None:
    """Update tables in place on the CPU, with the gradient ``grad`` ``[B, total]`` of their pooled output, in
    float32 or the tables' type.

    ``bags`` of the tables' features alone, as native kernels take them; ``columns`` None: side by side. Rows
    that have a gradient are multiplied by ``keep`` first. 16-bit tables are rounded to nearest, or
    stochastically by noise of a key in [0, 2^63) for each table.
    Autograd is not told: :func:`mprec.ops._common.mutated` does, of tables that it knows.
    """
    first, second = [*states, None, None][:2]
    _C.update_tables(
        list(tables), first, second, bags.indices, bags.offsets, bags.per_sample_weights, bags.mode,
        bags.padding_idx, grad, columns, RULES[rule], lr, eps, *betas, keep, noise, torch.get_num_threads(),
    )  # fmt: skip


def count_steps(steps: Sequence[Tensor]) -> None:
    """Add 1 to each of some tensors of one number, float32 or int64, on the CPU."""
    _C.count_steps(steps)


def _call(grad, indices, offsets, mode, psw, padding_idx, features, num_features, columns) -> dict:
    bags = Bags(indices, offsets, mode, psw, features, num_features, padding_idx=padding_idx)
    return {"grad": grad, "bags": bags, "columns": columns}


def _check(call: Update) -> Update:
    tables, sums, grad, bags, columns = call[:5]
    check_same_device(
        weights=tables, sums=sums, grad=grad, indices=bags.indices, offsets=bags.offsets,
        per_sample_weights=bags.per_sample_weights,
    )  # fmt: skip
    check_ndim(grad, "grad", 2)
    bags = bags.checked(len(tables), torch.float32)
    if bags.mode == MODES["max"]:
        raise NotImplementedError("pooling: max is not for tables that are updated in place")
    if len(columns) != len(tables) or (sums is not None and len(sums) != len(tables)):
        raise ValueError(f"columns, sums: expected one for each of {len(tables)} tables")
    for t, (weight, column) in enumerate(zip(tables, columns, strict=True)):
        if not 0 <= column <= grad.shape[1] - weight.shape[1]:
            raise ValueError(
                f"columns[{t}]: expected {weight.shape[1]} columns within the {grad.shape[1]} of grad, got "
                f"{column}"
            )
    if len(grad) != bags.batch:
        raise ValueError(
            f"grad: expected one row for each of the {bags.batch} bags of a feature, got {len(grad)}"
        )
    return call._replace(bags=bags, grad=plain(grad), columns=list(columns))


def _native(rule: str, call: Update) -> None:
    states = () if call.sums is None else (list(call.sums),)
    bags = call.bags.only(call.bags.features)
    update_tables(rule, call.tables, states, bags, call.grad, call.columns, call.lr, call.eps)
    call.written()


@kernel("table_sgd_", device="cpu")
def _sgd(call: Update) -> None:
    _native("sgd", call)


@kernel("table_rowwise_adagrad_", device="cpu")
def _rowwise_adagrad(call: Update) -> None:
    _native("rowwise_adagrad", call)


_BAGS = (
    "Tensor grad, Tensor indices, Tensor offsets, int pooling, Tensor? per_sample_weights, int padding_idx, "
    "int[] features, int num_features, int[] columns"
)
Op(
    f"table_sgd_(Tensor(a!)[] weights, {_BAGS}, float lr) -> ()",
    call=lambda tables, *bags_and_lr: Update(tables, None, **_call(*bags_and_lr[:-1]), lr=bags_and_lr[-1]),
    check=_check,
    fake=lambda call: None,
)
Op(
    f"table_rowwise_adagrad_(Tensor(a!)[] weights, Tensor(b!)[] sums, {_BAGS}, float lr, float eps) -> ()",
    call=lambda tables, sums, *others: Update(
        tables, sums, **_call(*others[:-2]), lr=others[-2], eps=others[-1]
    ),
    check=_check,
    fake=lambda call: None,
)
