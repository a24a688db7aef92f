"""Calls of the operators on tables: what their arguments make, and the checks of that."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mprec.bags import Bags, new
from mprec.ops._checks import check_same_device, check_tables, check_weights, on_cpu
from mprec.ops._common import NATIVE_TABLES
from mprec.row_formats import quantised_format


class Tables(NamedTuple):
    """The call of a look-up.

    Attributes:
        tables: ``[N_t, D_t]`` of one dtype; with ``bits``, rows of several formats.
        by_freq: divide gradients by how often an ID occurs.
        sparse: gradients are sparse tensors.
        bits: codes of the formats of tables that are uint8.
    """

    tables: Sequence[Tensor]
    bags: Bags
    by_freq: bool = False
    sparse: bool = False
    bits: Sequence[int] | None = None

    @property
    def device(self) -> str:
        indices = self.bags.indices
        return "cpu" if indices.is_cpu else indices.device.type

    @property
    def dims(self) -> list[int]:
        if self.bits is None:
            return [table.shape[1] for table in self.tables]
        return dims_of(self.tables, self.bits)


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


def one_table(
    weight, indices, offsets, mode, psw, include_last_offset, padding_idx, by_freq, sparse
) -> Tables:
    bags = new(Bags, (indices, offsets, mode, psw, None, 1, include_last_offset, padding_idx))
    return new(Tables, ([weight], bags, by_freq, sparse, None))


def many_tables(weights, indices, offsets, mode, psw, features, num_features, sparse) -> Tables:
    num_features = len(weights) if num_features is None else num_features
    bags = new(Bags, (indices, offsets, mode, psw, features, num_features, True, -1))
    return new(Tables, (weights, bags, False, sparse, None))


def quantised_tables(rows, bits, indices, offsets, mode, psw, features, num_features) -> Tables:
    return many_tables(rows, indices, offsets, mode, psw, features, num_features, False)._replace(bits=bits)


def _check_devices(call: Tables, name: str) -> None:
    indices, offsets, _, psw, *_ = call.bags
    if not on_cpu([*call.tables, indices, offsets] if psw is None else [*call.tables, indices, offsets, psw]):
        tensors = {"indices": indices, "offsets": offsets, "per_sample_weights": psw}
        check_same_device(**{name: call.tables}, **tensors)


def check_one(call: Tables) -> Tables:
    tables, bags, by_freq, sparse, _ = call
    _check_devices(call, "weight")
    check_weights(tables[0], "weight")
    return new(Tables, (tables, bags.checked(1, tables[0].dtype), by_freq, sparse, None))


def check_many(call: Tables) -> Tables:
    tables, bags, by_freq, sparse, _ = call
    check_tables(tables)
    _check_devices(call, "weights")
    bags = bags.checked(len(tables), tables[0].dtype, or_float32=True)
    return new(Tables, (tables, bags, by_freq, sparse, None))


def check_quantised(call: Tables) -> Tables:
    rows, bits = call.tables, call.bits
    if not rows or len(bits) != len(rows):
        raise ValueError(f"rows, bits: expected at least one, of equal number, got {len(rows)}, {len(bits)}")
    _check_devices(call, "rows")
    dims_of(rows, bits)
    return call._replace(bags=call.bags.checked(len(rows), torch.float32))
