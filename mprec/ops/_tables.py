"""Bags of rows of tables: ``torch.ops.mprec.embedding_bag``, ``embedding_bag_multi``, and
``quantized_embedding_bag_multi``, whose tables hold rows of other formats.
"""

import torch
from torch import Tensor

from mprec import reference
from mprec._native import _C
from mprec.bags import Bags, new
from mprec.kernels import kernel
from mprec.names import MODES
from mprec.ops import _autograd, _backward
from mprec.ops._common import NATIVE_TABLES
from mprec.ops._table import Op
from mprec.ops._table_calls import (
    Tables,
    check_many,
    check_one,
    check_quantised,
    many_tables,
    one_table,
    quantised_tables,
)
from mprec.ops._table_gradients import Gradients, Pooling, check_gradient, fake_gradient, plain_gradient
from mprec.tensors import plain


def _fake(call: Tables) -> Tensor:
    dtype = call.tables[0].dtype if call.bits is None else torch.float32
    return call.tables[0].new_empty(call.bags.batch, sum(call.dims), dtype=dtype)


@kernel(
    "embedding_bag",
    "embedding_bag_multi",
    "quantized_embedding_bag_multi",
    device="cpu",
    supports=lambda call: call.bits is not None or call.tables[0].dtype in NATIVE_TABLES,
)
def _native(call: Tables) -> Tensor:
    tables, bits, threads = call.tables, call.bits, torch.get_num_threads()
    indices, offsets, mode, psw, features, count, last, padding_idx = call.bags.with_float_weights()
    if bits is None and count == len(tables) == 1:  # any offsets, and padding
        return _C.embedding_bag(
            plain(tables[0]), indices, offsets, psw, mode, last, padding_idx, None, threads
        )
    bits, out = (None, None) if bits is None else (list(bits), _fake(call))
    return _C.embedding_bag_multi(
        [plain(table) for table in tables], indices, offsets, psw, mode, -1, out, None, threads,
        bits, features=features, num_features=count,
    )  # fmt: skip


def _plain(call: Tables, dtype: torch.dtype) -> Tensor:
    """In plain torch, computed in ``dtype``."""
    bags, tables = call.bags, call.tables
    bags.check_offsets()
    if not _autograd.is_batched(bags.indices):
        bags.check_ids([len(table) for table in tables])
    pooled = [
        reference.embedding_bag(
            table, part.indices, part.offsets, part.mode, part.per_sample_weights, part.include_last_offset,
            part.padding_idx, dtype=dtype,
        )
        for table, (_, _, part) in zip(tables, bags.parts(len(tables)), strict=True)
    ]  # fmt: skip
    return (pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)).to(tables[0].dtype)


def _reference(call: Tables) -> Tensor:
    return _plain(call, torch.float64)


def _formula(call: Tables) -> Tensor:
    for name, option in (("scale_grad_by_freq", call.by_freq), ("sparse", call.sparse)):
        if option:
            raise NotImplementedError(
                f"{name}: not with torch.func transforms or forward-mode derivatives, whose gradients are "
                "dense and not scaled"
            )
    if _autograd.is_batched(call.bags.offsets):
        raise NotImplementedError("offsets: torch.func.vmap cannot map over them; map over input [B, L]")
    return _plain(call, torch.float64 if call.tables[0].dtype == torch.float64 else torch.float32)


# -------------------------------------------------------------------------------------------- the operators

Op(
    "embedding_bag(Tensor weight, Tensor indices, Tensor offsets, int mode=0, "
    "Tensor? per_sample_weights=None, bool include_last_offset=False, int padding_idx=-1, "
    "bool scale_grad_by_freq=False, bool sparse=False) -> Tensor",
    call=one_table,
    check=check_one,
    fake=_fake,
    reference=_reference,
    formula=_formula,
    differentiate=Pooling.apply_to,
    see_through=True,
)
Op(
    "embedding_bag_multi(Tensor[] weights, Tensor indices, Tensor offsets, int mode=0, "
    "Tensor? per_sample_weights=None, int[]? features=None, int? num_features=None, bool sparse=False) "
    "-> Tensor",
    call=many_tables,
    check=check_many,
    fake=_fake,
    reference=_reference,
    formula=_formula,
    differentiate=Pooling.apply_to,
)
Op(
    "quantized_embedding_bag_multi(Tensor[] rows, int[] bits, Tensor indices, Tensor offsets, int mode=0, "
    "Tensor? per_sample_weights=None, int[]? features=None, int? num_features=None) -> Tensor",
    call=quantised_tables,
    check=check_quantised,
    fake=_fake,
)
Op(
    "embedding_bag_backward(Tensor grad, Tensor weight, Tensor indices, Tensor offsets, int mode, "
    "Tensor? per_sample_weights, bool include_last_offset, int padding_idx, bool scale_grad_by_freq, "
    "bool sparse, bool need_weight, bool need_per_sample_weights) -> (Tensor, Tensor)",
    call=lambda grad, *of: new(Gradients, (grad, one_table(*of[:-2]), of[-2], of[-1])),
    check=check_gradient,
    fake=fake_gradient,
    reference=plain_gradient,
    result=lambda gradients: (gradients[0][0], gradients[1]),
)
Op(
    "embedding_bag_multi_backward(Tensor grad, Tensor[] weights, Tensor indices, Tensor offsets, int mode, "
    "Tensor? per_sample_weights, int[] features, int num_features, bool sparse, "
    "bool need_per_sample_weights) -> (Tensor[], Tensor)",
    call=lambda grad, *of: new(Gradients, (grad, many_tables(*of[:-1]), True, of[-1])),
    check=check_gradient,
    fake=fake_gradient,
    reference=plain_gradient,
)


def _maximal(weights, indices, offsets, padding_idx, include_last_offset, features, num_features) -> Tables:
    mode = MODES["max"]
    bags = Bags(indices, offsets, mode, None, features, num_features, include_last_offset, padding_idx)
    return Tables(weights, bags)


Op(
    "embedding_bag_maximal_ids(Tensor[] weights, Tensor indices, Tensor offsets, int padding_idx, "
    "bool include_last_offset, int[] features, int num_features) -> Tensor",
    call=_maximal,
    check=lambda call: call._replace(bags=call.bags.of_kernels()),
    fake=lambda call: call.bags.indices.new_empty(call.bags.batch, sum(call.dims), dtype=torch.int64),
    reference=lambda call: _backward.maximal_ids(call.tables, call.bags),
)
