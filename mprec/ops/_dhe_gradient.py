"""Gradients of ``torch.ops.mprec.dhe_bag`` and ``dhe_bag_multi``."""

import torch
from torch import Tensor

from mprec import reference
from mprec._native import _C
from mprec.names import FAMILIES, code
from mprec.ops import _autograd, _backward, _csr, _dhe
from mprec.ops._common import ids as plain_ids
from mprec.ops._common import library, native, plain
from mprec.ops._decoders import decoder, drop_changed
from mprec.ops._dhe import _last_weights, _split
from mprec.tracing import traced

library.define(
    "dhe_bag_backward(Tensor grad, Tensor indices, Tensor offsets, Tensor coefficients, Tensor[] weights, "
    "Tensor[] biases, str family, str activation, str last_activation, int mode, Tensor? per_sample_weights, "
    "bool include_last_offset, int padding_idx, bool need_per_sample_weights) -> (Tensor[], Tensor[], Tensor)"
)
library.define(
    "dhe_bag_multi_backward(Tensor grad, Tensor indices, Tensor offsets, Tensor[] coefficients, Tensor[] "
    "weights, "
    "Tensor[] biases, int[] layers, str family, str activation, str last_activation, int mode, "
    "Tensor? per_sample_weights, int[] features, int num_features, bool need_per_sample_weights) "
    "-> (Tensor[], Tensor[], Tensor)"
)


def _encode(coefficients: Tensor, indices: Tensor, family: str, dtype: torch.dtype) -> Tensor:
    if indices.is_cpu:
        out = torch.empty(len(indices), coefficients.shape[1], dtype=torch.float32)
        _C.hash_encode(plain(coefficients), plain(indices), code(FAMILIES, family, "family"), out)
    else:
        out = reference.encode(coefficients, indices, family)
    return out.to(dtype)


def _dhe_bag_backward(
    grad,
    indices,
    offsets,
    coefficients,
    weights,
    biases,
    family,
    activation,
    last_activation,
    mode,
    per_sample_weights,
    include_last_offset,
    padding_idx,
    need_per_sample_weights,
):
    """Each distinct ID is decoded once, and takes the summed gradient of its occurrences."""
    indices, offsets = plain_ids(indices, "indices"), plain_ids(offsets, "offsets")
    keep = None if padding_idx < 0 else indices != padding_idx
    distinct, occurrence = torch.unique(indices, return_inverse=True)
    stack = (coefficients, weights, biases, family, activation, last_activation)
    chain = _native_chain if indices.is_cpu and native(*weights, *biases) else _plain_chain
    rows, backward = chain(distinct, *stack, need_rows=need_per_sample_weights or mode == 2)
    grad_rows, grad_psw = _backward.pool_backward(
        _backward.wide(grad),
        None if rows is None else _backward.wide(rows[occurrence]),
        offsets,
        len(indices),
        mode,
        _backward.wide(per_sample_weights),
        include_last_offset,
        keep,
        need_per_sample_weights,
    )
    grad_x = grad_rows.new_zeros(len(distinct), grad.shape[1]).index_add_(0, occurrence, grad_rows)
    grad_weights, grad_biases = backward(grad_x.to(grad.dtype))
    like = grad if per_sample_weights is None else per_sample_weights
    return grad_weights, grad_biases, like.new_empty(0) if grad_psw is None else grad_psw.to(like.dtype)


def _native_chain(ids, coefficients, weights, biases, family, activation, last_activation, need_rows):
    """The IDs' vectors, if needed, and a function from their gradient to the parameters'. In the kernel:
    encodings and activations are made again block by block, never stored."""
    handle = decoder(coefficients, weights, biases, family, activation, last_activation, thorough=True)
    threads = torch.get_num_threads()
    rows = (
        _C.dhe_bag(handle, ids, torch.arange(len(ids)), None, 0, False, -1, None, threads)
        if need_rows
        else None
    )

    def backward(grad_rows):
        grads = [
            [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
            for tensors in (weights, biases)
        ]
        _C.dhe_backward(
            handle,
            [w.detach() for w in weights],
            ids.long(),
            plain(grad_rows),
            *grads,
            threads,
        )
        return grads

    return rows, backward


def _plain_chain(ids, coefficients, weights, biases, family, activation, last_activation, need_rows):
    """As `_native_chain`, in plain torch: other dtypes, and CUDA."""
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
            grad_sum = _activation_gradient(grad_x, sums[layer], name)
            grad_weights.append(grad_sum.t() @ inputs[layer])
            grad_biases.append(grad_sum.sum(0))
            if layer:
                grad_x = grad_sum @ weights[layer]
        return grad_weights[::-1], grad_biases[::-1]

    return x, backward


def _activation_gradient(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, x, 0)
    if activation == "sigmoid":
        return torch.ops.aten.sigmoid_backward(grad, x.sigmoid())
    if activation == "mish":
        return torch.ops.aten.mish_backward(grad, x)
    return grad


def _dhe_bag_backward_fake(
    grad,
    indices,
    offsets,
    coefficients,
    weights,
    biases,
    family,
    activation,
    last_activation,
    mode,
    per_sample_weights,
    include_last_offset,
    padding_idx,
    need_per_sample_weights,
):
    like = grad if per_sample_weights is None else per_sample_weights
    grad_psw = like.new_empty(indices.shape if need_per_sample_weights else 0)
    return [torch.empty_like(w) for w in weights], [torch.empty_like(b) for b in biases], grad_psw


def _dhe_bag_multi_backward(
    grad,
    indices,
    offsets,
    coefficients,
    weights,
    biases,
    layers,
    family,
    activation,
    last_activation,
    mode,
    per_sample_weights,
    features,
    num_features,
    need_per_sample_weights,
):
    indices, offsets = plain_ids(indices, "indices"), plain_ids(offsets, "offsets")
    csr = _csr.Csr(indices, offsets, per_sample_weights)
    like = grad if per_sample_weights is None else per_sample_weights
    grad_psw = like.new_zeros(indices.shape if need_per_sample_weights else 0)
    grad_weights, grad_biases = [], []
    columns = grad.split([weight.shape[0] for weight in _last_weights(weights, layers)], dim=1)
    for hashes, ws, bs, part, (begin, end, starts) in zip(
        coefficients,
        _split(layers, weights),
        _split(layers, biases),
        columns,
        _csr.feature_slices(csr, features, num_features),
        strict=True,
    ):
        psw = None if per_sample_weights is None else per_sample_weights[begin:end]
        part_weights, part_biases, part_psw = _dhe_bag_backward(
            part,
            indices[begin:end],
            starts,
            hashes,
            ws,
            bs,
            family,
            activation,
            last_activation,
            mode,
            psw,
            True,
            -1,
            need_per_sample_weights,
        )
        grad_weights += part_weights
        grad_biases += part_biases
        if need_per_sample_weights:
            grad_psw[begin:end] += part_psw  # a feature may serve several decoders
    return grad_weights, grad_biases, grad_psw


def _dhe_bag_multi_backward_fake(
    grad,
    indices,
    offsets,
    coefficients,
    weights,
    biases,
    layers,
    family,
    activation,
    last_activation,
    mode,
    per_sample_weights,
    features,
    num_features,
    need_per_sample_weights,
):
    like = grad if per_sample_weights is None else per_sample_weights
    grad_psw = like.new_empty(indices.shape if need_per_sample_weights else 0)
    return [torch.empty_like(w) for w in weights], [torch.empty_like(b) for b in biases], grad_psw


class _DheBags(torch.autograd.Function):
    """Either operator: its result and gradients by kernels, a gradient's own by formula."""

    @staticmethod
    def forward(
        ctx, op, keyset, options, layers, mode, rest, indices, offsets, psw, coefficients, *parameters
    ):
        half = len(parameters) // 2
        tensors = _arguments(layers, coefficients, parameters[:half], parameters[half:])
        ctx.call = layers, options, mode, rest, len(coefficients)
        if not traced():
            count = [half] if layers is None else layers
            halves = parameters[:half], parameters[half:]
            stacks = zip(coefficients, *(_split(count, part) for part in halves), strict=True)
            for stack in stacks:
                drop_changed(*stack)
        ctx.save_for_backward(indices, offsets, psw, *coefficients, *parameters)
        return _autograd.below(op, keyset, indices, offsets, *tensors, *options, mode, psw, *rest)

    @staticmethod
    def backward(ctx, grad):
        indices, offsets, psw, *tensors = ctx.saved_tensors
        layers, options, mode, rest, count = ctx.call
        coefficients, parameters = tensors[:count], tensors[count:]
        half = len(parameters) // 2
        arguments = _arguments(layers, coefficients, parameters[:half], parameters[half:])
        need_psw = ctx.needs_input_grad[8]
        if _autograd.differentiate_again(grad, psw, *parameters):
            formula = _dhe.formula if layers is None else _dhe.multi_formula
            with torch.enable_grad():
                out = formula(indices, offsets, *arguments, *options, mode, psw, *rest)
            grad_psw, *grads = _autograd.gradients_of(out, [psw, *parameters], grad)
        else:
            if layers is None:
                backward = torch.ops.mprec.dhe_bag_backward
            else:
                backward = torch.ops.mprec.dhe_bag_multi_backward
                features, num_features = rest
                features = list(range(len(layers))) if features is None else list(features)
                rest = features, len(layers) if num_features is None else num_features
            grad_weights, grad_biases, grad_psw = backward(
                grad, indices, offsets, *arguments, *options, mode, psw, *rest, need_psw
            )
            grads = [*grad_weights, *grad_biases]
        grad_psw = grad_psw if need_psw else None
        return None, None, None, None, None, None, None, None, grad_psw, None, *grads


def _arguments(layers, coefficients, weights, biases):
    if layers is None:
        return coefficients[0], list(weights), list(biases)
    return list(coefficients), list(weights), list(biases), list(layers)


def _differentiable(op, keyset, indices, offsets, coefficients, weights, biases, *options_and_rest):
    *options, mode, psw, include_last, padding_idx = options_and_rest
    return _DheBags.apply(
        op, keyset, options, None, mode, (include_last, padding_idx), indices, offsets, psw, [coefficients],
        *weights, *biases,
    )  # fmt: skip


def _differentiable_multi(op, keyset, indices, offsets, coefficients, weights, biases, layers, *others):
    *options, mode, psw, features, num_features = others
    return _DheBags.apply(
        op, keyset, options, layers, mode, (features, num_features), indices, offsets, psw, coefficients,
        *weights, *biases,
    )  # fmt: skip


for _name, _gradient, _gradient_fake, _wrap, _formula in (
    ("dhe_bag", _dhe_bag_backward, _dhe_bag_backward_fake, _differentiable, _dhe.formula),
    (
        "dhe_bag_multi",
        _dhe_bag_multi_backward,
        _dhe_bag_multi_backward_fake,
        _differentiable_multi,
        _dhe.multi_formula,
    ),
):
    library.impl(f"{_name}_backward", _gradient, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mprec::{_name}_backward", _gradient_fake, lib=library)
    _autograd.register(_name, _wrap, _formula)
