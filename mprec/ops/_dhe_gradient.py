"""Gradients of ``torch.ops.mprec.dhe_bag`` and ``dhe_bag_multi``."""

from typing import NamedTuple

import torch
from torch import Tensor

from mprec import reference
from mprec._native import _C
from mprec.bags import Bags
from mprec.names import FAMILIES, MODES, code
from mprec.ops import _backward, _dhe
from mprec.ops._common import all_float32
from mprec.ops._decoders import packed_decoder
from mprec.ops._table import Op
from mprec.ops.pooling import decode
from mprec.tensors import plain


class Gradients(NamedTuple):
    """The call: gradients of decoders given ``grad`` ``[B, sum D]``, and those of per-sample weights if
    needed."""

    grad: Tensor
    of: _dhe.Decoders
    need_weights: bool
    kept: _dhe.Kept | None = None  # by the forward pass, of one decoder

    @property
    def device(self) -> str:
        return self.of.device

    def like(self) -> Tensor:
        """Of the dtype of per-sample weights."""
        psw = self.of.bags.per_sample_weights
        return self.grad if psw is None else psw


def _check(call: Gradients) -> Gradients:
    return call._replace(of=call.of._replace(bags=call.of.bags.of_kernels()))


def _fake(call: Gradients) -> tuple[list[Tensor], list[Tensor], Tensor]:
    grads = [
        [torch.empty_like(tensor) for stack in call.of.stacks for tensor in stack[kind]] for kind in (1, 2)
    ]
    return *grads, call.like().new_empty(call.of.bags.indices.shape if call.need_weights else 0)


def _reference(call: Gradients) -> tuple[list[Tensor], list[Tensor], Tensor]:
    of, bags = call.of, call.of.bags
    if bags.indices.is_cpu:  # plain torch trusts them
        bags.check_offsets()
        bags.check_ids([None] * len(of.stacks))
    grad_weights, grad_biases = [], []
    grad_psw = call.like().new_zeros(bags.indices.shape if call.need_weights else 0)
    columns = call.grad.split(of.dims, dim=1)
    for stack, grad, (begin, end, part) in zip(of.stacks, columns, bags.parts(len(columns)), strict=True):
        weights, biases, part_psw = _of_one(grad, stack, of.options, part, call.need_weights, call.kept)
        grad_weights += weights
        grad_biases += biases
        if part_psw is not None:
            grad_psw[begin:end] += part_psw.to(grad_psw.dtype)  # a feature may serve several decoders
    return grad_weights, grad_biases, grad_psw


def _of_one(grad: Tensor, stack: _dhe.Stack, options, bags: Bags, need_psw: bool, kept: _dhe.Kept | None):
    """Each distinct ID is decoded once, and takes the summed gradient of its occurrences."""
    need_rows = need_psw or bags.mode == MODES["max"]
    if kept is not None:
        return _of_kept(grad, stack, options, bags, need_psw, need_rows, kept)
    distinct, occurrence = torch.unique(bags.indices, return_inverse=True)
    _, weights, biases = stack
    chain = _native_chain if bags.indices.is_cpu and all_float32(*weights, *biases) else _plain_chain
    rows, backward = chain(distinct, stack, options, need_rows)
    rows = None if rows is None else rows[occurrence]
    grad_rows, grad_psw = _backward.pool_backward(grad, rows, bags)
    grad_x = grad_rows.new_zeros(len(distinct), grad.shape[1]).index_add_(0, occurrence, grad_rows)
    return *backward(grad_x.to(grad.dtype)), grad_psw if need_psw else None


def _of_kept(grad: Tensor, stack: _dhe.Stack, options, bags: Bags, need_psw: bool, need_rows: bool, kept):
    """The same with what the forward pass has kept."""
    distinct, place = kept.distinct, kept.row_of_entry
    count = len(distinct)
    rows, backward = _native_chain(distinct, stack, options, need_rows, kept.activations)
    if bags.padding_idx >= 0:  # goes to one row more
        place = torch.where(place < 0, count, place)
    if rows is None:
        of_rows = bags.with_last_offset()._replace(indices=place)
        if bags.padding_idx >= 0:
            of_rows = of_rows._replace(padding_idx=count)
        _, grad_x = _backward.row_gradients(grad, count + 1, of_rows)
        return *backward(grad_x), None
    rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))[place]
    grad_rows, grad_psw = _backward.pool_backward(grad, rows, bags)
    grad_x = grad_rows.new_zeros(count + 1, grad.shape[1]).index_add_(0, place, grad_rows)[:count]
    return *backward(grad_x), grad_psw if need_psw else None


def _native_chain(ids: Tensor, stack: _dhe.Stack, options, need_rows: bool, kept: Tensor | None = None):
    """The IDs' vectors, if needed, and a function from their gradient to the parameters'.

    ``kept``: the activations; without them the kernel makes them again, block by block.
    """
    _, weights, biases = stack
    # Beside kept activations only its coefficients are read.
    handle = packed_decoder(*stack, *options, thorough=kept is None)
    rows = None
    if need_rows:
        rows = decode(handle, ids) if kept is None else _last_values(kept, len(ids), handle.dim)

    def backward(grad_rows):
        grads = [
            [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
            for tensors in (weights, biases)
        ]
        detached = [w.detach() for w in weights]
        _C.dhe_backward(handle, detached, ids.long(), plain(grad_rows), *grads, torch.get_num_threads(), kept)
        return grads

    return rows, backward


def _last_values(kept: Tensor, count: int, dim: int) -> Tensor:
    """The vectors ``[count, dim]`` among kept activations: the last blocks hold them."""
    blocks = -(-dim // _C.block_columns)
    values = kept[-blocks:, :count, : _C.block_columns]
    return values.transpose(0, 1).reshape(count, -1)[:, :dim]


def _plain_chain(ids: Tensor, stack: _dhe.Stack, options, need_rows: bool):
    """As `_native_chain`, in plain torch: other dtypes, and CUDA."""
    coefficients, weights, biases = stack
    family, activation, last_activation = options
    last = len(weights) - 1
    inputs, sums = [], []
    x = _encode(coefficients, ids, family, weights[0].dtype)
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        inputs.append(x)
        sums.append(torch.addmm(bias, x, weight.t()))
        x = reference.activate(sums[-1], last_activation if layer == last else activation)

    def backward(grad_x):
        grad_weights, grad_biases = [], []
        for layer in range(last, -1, -1):
            name = last_activation if layer == last else activation
            grad_sum = reference.activation_gradient(grad_x, sums[layer], name)
            grad_weights.append(grad_sum.t() @ inputs[layer])
            grad_biases.append(grad_sum.sum(0))
            if layer:
                grad_x = grad_sum @ weights[layer]
        return grad_weights[::-1], grad_biases[::-1]

    return x, backward


def _encode(coefficients: Tensor, indices: Tensor, family: str, dtype: torch.dtype) -> Tensor:
    if indices.is_cpu:
        out = torch.empty(len(indices), coefficients.shape[1], dtype=torch.float32)
        _C.hash_encode(plain(coefficients), plain(indices), code(FAMILIES, family, "family"), out)
    else:
        out = reference.encode(coefficients, indices, family)
    return out.to(dtype)


Op(
    "dhe_bag_backward(Tensor grad, Tensor indices, Tensor offsets, Tensor coefficients, Tensor[] weights, "
    "Tensor[] biases, str family, str activation, str last_activation, int mode, "
    "Tensor? per_sample_weights, bool include_last_offset, int padding_idx, bool need_per_sample_weights) "
    "-> (Tensor[], Tensor[], Tensor)",
    call=lambda grad, *of: Gradients(grad, _dhe._one(*of[:-1]), of[-1]),
    check=_check,
    fake=_fake,
    reference=_reference,
    see_through=True,
)
Op(
    "dhe_bag_multi_backward(Tensor grad, Tensor indices, Tensor offsets, Tensor[] coefficients, "
    "Tensor[] weights, Tensor[] biases, int[] layers, str family, str activation, str last_activation, "
    "int mode, Tensor? per_sample_weights, int[] features, int num_features, "
    "bool need_per_sample_weights) -> (Tensor[], Tensor[], Tensor)",
    call=lambda grad, *of: Gradients(grad, _dhe._many(*of[:-1]), of[-1]),
    check=_check,
    fake=_fake,
    reference=_reference,
)
