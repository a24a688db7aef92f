"""``torch.ops.mprec.dhe_bag`` and ``dhe_bag_multi``: schemas, implementations, gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mprec import reference
from mprec._native import _C
from mprec.hashing import coefficient_rows
from mprec.names import ACTIVATIONS, FAMILIES, code
from mprec.ops import _backward, _csr
from mprec.ops._common import (
    check_bags,
    check_ids,
    check_per_sample_weights,
    check_same_device,
    check_weights,
    contiguous,
    ids,
    library,
    native,
    needs_grad,
    num_bags,
    passed_only,
)
from mprec.ops._decoders import decoder

library.define(
    "dhe_bag(Tensor indices, Tensor offsets, Tensor coefficients, Tensor[] weights, Tensor[] biases, str "
    "family, "
    "str activation, str last_activation, int mode=0, Tensor? per_sample_weights=None, "
    "bool include_last_offset=False, int padding_idx=-1) -> Tensor"
)
library.define(
    "dhe_bag_backward(Tensor grad, Tensor indices, Tensor offsets, Tensor coefficients, Tensor[] weights, "
    "Tensor[] biases, str family, str activation, str last_activation, int mode, Tensor? per_sample_weights, "
    "bool include_last_offset, int padding_idx, bool need_per_sample_weights) -> (Tensor[], Tensor[], Tensor)"
)
library.define(
    "dhe_bag_multi(Tensor indices, Tensor offsets, Tensor[] coefficients, Tensor[] weights, Tensor[] biases, "
    "int[] layers, str family, str activation, str last_activation, int mode=0, Tensor? "
    "per_sample_weights=None, "
    "int[]? features=None, int? num_features=None) -> Tensor"
)
library.define(
    "dhe_bag_multi_backward(Tensor grad, Tensor indices, Tensor offsets, Tensor[] coefficients, Tensor[] "
    "weights, "
    "Tensor[] biases, int[] layers, str family, str activation, str last_activation, int mode, "
    "Tensor? per_sample_weights, int[] features, int num_features, bool need_per_sample_weights) "
    "-> (Tensor[], Tensor[], Tensor)"
)


def check_decoder(
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    family: str,
    activation: str,
    last_activation: str,
    name: str = "",
) -> None:
    """``ValueError`` or ``DtypeError`` if these do not make a decoder. ``name`` precedes arguments' names."""
    rows = coefficient_rows(family)
    code(ACTIVATIONS, activation, f"{name}activation")
    code(ACTIVATIONS, last_activation, f"{name}last_activation")
    if coefficients.dtype != torch.int32:
        raise TypeError(f"{name}coefficients: expected int32, got {coefficients.dtype}")
    if coefficients.dim() != 2 or len(coefficients) != rows or not coefficients.shape[1]:
        raise ValueError(
            f"{name}coefficients: expected [{rows}, k] for family {family!r}, got {list(coefficients.shape)}"
        )
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"{name}weights, biases: expected one of each per layer, at least one layer, "
            f"got {len(weights)} and {len(biases)}"
        )
    inputs = coefficients.shape[1]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check_weights(weight, f"{name}weights[{layer}]")
        if weight.dtype != weights[0].dtype or bias.dtype != weights[0].dtype:
            raise TypeError(
                f"{name}layer {layer}: expected {weights[0].dtype} as weights[0], "
                f"got weight {weight.dtype}, bias {bias.dtype}"
            )
        if weight.dim() != 2 or weight.shape[1] != inputs or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{name}layer {layer}: expected weight [out, {inputs}] and bias [out], "
                f"got {list(weight.shape)} and {list(bias.shape)}"
            )
        inputs = weight.shape[0]


def _split(layers: Sequence[int], values: Sequence[Tensor]) -> list[list[Tensor]]:
    """The flat tensors of all decoders, by decoder."""
    ends = [sum(layers[: t + 1]) for t in range(len(layers))]
    return [list(values[end - count : end]) for end, count in zip(ends, layers, strict=True)]


def _forward_rows(indices, coefficients, weights, biases, family, activation, last_activation):
    """Vectors of each ID without the native fused kernel: the GPU's kernel, or plain torch."""
    if indices.is_cuda and native(weights[0]):
        from mprec.triton_kernels import dhe  # imports triton: only where it is needed

        return dhe.dhe_forward(indices, coefficients, weights, biases, family, activation, last_activation)
    dtype = weights[0].dtype if indices.is_cuda else torch.float64
    return reference.dhe(
        indices, coefficients, weights, biases, family, activation, last_activation, dtype=dtype
    )


# -------------------------------------------------------------------------------------------- one decoder


def run_dhe_bag(handle, indices, offsets, mode, per_sample_weights, include_last_offset, padding_idx):
    """The native kernel, for arguments that are checked: one packed decoder on the CPU."""
    out = torch.empty(num_bags(offsets, include_last_offset), handle.dim)
    _C.dhe_bag(
        handle,
        indices,
        offsets,
        per_sample_weights,
        mode,
        include_last_offset,
        padding_idx,
        out,
        torch.get_num_threads(),
    )
    return out


def _dhe_bag(
    indices: Tensor,
    offsets: Tensor,
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    family: str,
    activation: str,
    last_activation: str,
    mode: int = 0,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> Tensor:
    check_decoder(coefficients, weights, biases, family, activation, last_activation)
    check_same_device(
        indices=indices,
        offsets=offsets,
        coefficients=coefficients,
        weights=weights,
        biases=biases,
        per_sample_weights=per_sample_weights,
    )
    indices, offsets = ids(indices, "indices"), ids(offsets, "offsets")
    check_per_sample_weights(per_sample_weights, weights[0], indices)
    per_sample_weights = contiguous(per_sample_weights)
    if indices.is_cpu and native(weights[0]):
        handle = decoder(coefficients, weights, biases, family, activation, last_activation)
        return run_dhe_bag(
            handle, indices, offsets, mode, per_sample_weights, include_last_offset, padding_idx
        )
    check_bags(offsets, len(indices), include_last_offset)
    keep = None if padding_idx < 0 else indices != padding_idx
    check_ids(indices if keep is None else indices[keep], None)
    rows = _forward_rows(indices, coefficients, weights, biases, family, activation, last_activation)
    out = reference.pool(rows, offsets, mode, per_sample_weights, include_last_offset, keep)
    return out.to(weights[0].dtype)


def _dhe_bag_fake(
    indices,
    offsets,
    coefficients,
    weights,
    biases,
    family,
    activation,
    last_activation,
    mode=0,
    per_sample_weights=None,
    include_last_offset=False,
    padding_idx=-1,
):
    return weights[-1].new_empty(offsets.shape[0] - include_last_offset, weights[-1].shape[0])


def _encode(coefficients: Tensor, indices: Tensor, family: str, dtype: torch.dtype) -> Tensor:
    if indices.is_cpu:
        out = torch.empty(len(indices), coefficients.shape[1])
        _C.hash_encode(contiguous(coefficients), contiguous(indices), code(FAMILIES, family, "family"), out)
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
    keep = None if padding_idx < 0 else indices != padding_idx
    distinct, occurrence = torch.unique(indices, return_inverse=True)
    stack = (coefficients, weights, biases, family, activation, last_activation)
    chain = _native_chain if indices.is_cpu and native(*weights, *biases) else _plain_chain
    rows, backward = chain(distinct, *stack, need_rows=need_per_sample_weights or mode == 2)
    grad_rows, grad_psw = _backward.pool_backward(
        grad,
        None if rows is None else rows[occurrence],
        offsets,
        len(indices),
        mode,
        per_sample_weights,
        include_last_offset,
        keep,
        need_per_sample_weights,
    )
    grad_x = grad.new_zeros(len(distinct), grad.shape[1]).index_add_(0, occurrence, grad_rows)
    grad_weights, grad_biases = backward(grad_x)
    return grad_weights, grad_biases, grad.new_empty(0) if grad_psw is None else grad_psw


def _native_chain(ids, coefficients, weights, biases, family, activation, last_activation, need_rows):
    """The IDs' vectors, if needed, and a function from their gradient to the parameters'. In the kernel:
    encodings and activations are made again block by block, never stored."""
    rows = None
    if need_rows:
        handle = decoder(coefficients, weights, biases, family, activation, last_activation)
        rows = run_dhe_bag(handle, ids, torch.arange(len(ids)), 0, None, False, -1)

    def backward(grad_rows):
        stack = [[t.detach() for t in tensors] for tensors in (weights, biases)]
        grads = [[torch.empty_like(t, memory_format=torch.contiguous_format) for t in s] for s in stack]
        codes = (
            code(FAMILIES, family, "family"),
            code(ACTIVATIONS, activation, "activation"),
            code(ACTIVATIONS, last_activation, "last_activation"),
        )
        _C.dhe_backward(
            coefficients, *stack, *codes, ids.long(), contiguous(grad_rows), *grads, torch.get_num_threads()
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
    grad_psw = grad.new_empty(indices.shape if need_per_sample_weights else 0)
    return [torch.empty_like(w) for w in weights], [torch.empty_like(b) for b in biases], grad_psw


def _setup(ctx, inputs, output):
    indices, offsets, coefficients, weights, biases, *options, mode, psw, include_last, padding_idx = inputs
    ctx.save_for_backward(indices, offsets, coefficients, *weights, *biases, psw)
    ctx.options = options, mode, include_last, padding_idx


def _backward_of_dhe_bag(ctx, grad):
    indices, offsets, coefficients, *parameters, psw = ctx.saved_tensors
    options, mode, include_last, padding_idx = ctx.options
    half = len(parameters) // 2
    weights, biases = parameters[:half], parameters[half:]
    need_psw = needs_grad(ctx, 9)
    grad_weights, grad_biases, grad_psw = torch.ops.mprec.dhe_bag_backward(
        grad,
        indices,
        offsets,
        coefficients,
        weights,
        biases,
        *options,
        mode,
        psw,
        include_last,
        padding_idx,
        need_psw,
    )
    grad_psw = grad_psw if need_psw else None
    return passed_only(
        ctx, None, None, None, grad_weights, grad_biases, None, None, None, None, grad_psw, None, None
    )


# ---------------------------------------------------------------------------------- one decoder per feature


def run_dhe_bag_multi(
    handles,
    indices,
    offsets,
    mode,
    per_sample_weights,
    out,
    out_columns,
    features=None,
    num_features=None,
    threads=None,
    dedupe=None,
):
    """The native kernel, for arguments that are checked: packed decoders, into columns of ``out``."""
    if features is not None:
        csr = _csr.Csr(indices, offsets, per_sample_weights)
        indices, offsets, per_sample_weights = _csr.select(csr, features, num_features)
    _C.dhe_bag_multi(
        handles,
        indices,
        offsets,
        per_sample_weights,
        mode,
        -1,
        out,
        out_columns,
        threads or torch.get_num_threads(),
        dedupe,
    )
    return out


def _dhe_bag_multi(
    indices: Tensor,
    offsets: Tensor,
    coefficients: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layers: Sequence[int],
    family: str,
    activation: str,
    last_activation: str,
    mode: int = 0,
    per_sample_weights: Tensor | None = None,
    features: Sequence[int] | None = None,
    num_features: int | None = None,
) -> Tensor:
    if not len(coefficients) == len(layers) or not sum(layers) == len(weights) == len(biases):
        raise ValueError(
            f"layers: {list(layers)} do not describe {len(coefficients)} coefficients, "
            f"{len(weights)} weights and {len(biases)} biases"
        )
    stacks = list(zip(coefficients, _split(layers, weights), _split(layers, biases), strict=True))
    for t, (hashes, ws, bs) in enumerate(stacks):
        check_decoder(hashes, ws, bs, family, activation, last_activation, f"decoder {t}: ")
    check_same_device(
        indices=indices,
        offsets=offsets,
        coefficients=coefficients,
        weights=weights,
        biases=biases,
        per_sample_weights=per_sample_weights,
    )
    indices, offsets = ids(indices, "indices"), ids(offsets, "offsets")
    check_per_sample_weights(per_sample_weights, weights[0], indices)
    per_sample_weights = contiguous(per_sample_weights)
    num_features = len(layers) if num_features is None else num_features
    batch = _csr.batch_size(offsets, num_features)
    if indices.is_cpu and native(*weights):
        handles = [decoder(*stack, family, activation, last_activation) for stack in stacks]
        out = torch.empty(batch, sum(handle.dim for handle in handles))
        return run_dhe_bag_multi(
            handles, indices, offsets, mode, per_sample_weights, out, None, features, num_features
        )
    check_bags(offsets, len(indices), True)
    csr = _csr.Csr(indices, offsets, per_sample_weights)
    features = range(num_features) if features is None else features
    parts = []
    for stack, (begin, end, starts) in zip(
        stacks, _csr.feature_slices(csr, features, num_features), strict=True
    ):
        check_ids(indices[begin:end], None)
        rows = _forward_rows(indices[begin:end], *stack, family, activation, last_activation)
        psw = None if per_sample_weights is None else per_sample_weights[begin:end]
        parts.append(reference.pool(rows, starts, mode, psw, True).to(weights[0].dtype))
    return torch.cat(parts, dim=1)


def _last_weights(weights, layers):
    return [stack[-1] for stack in _split(layers, weights)]


def _dhe_bag_multi_fake(
    indices,
    offsets,
    coefficients,
    weights,
    biases,
    layers,
    family,
    activation,
    last_activation,
    mode=0,
    per_sample_weights=None,
    features=None,
    num_features=None,
):
    batch = (offsets.shape[0] - 1) // (len(layers) if num_features is None else num_features)
    return weights[0].new_empty(batch, sum(weight.shape[0] for weight in _last_weights(weights, layers)))


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
    csr = _csr.Csr(indices, offsets, per_sample_weights)
    grad_psw = grad.new_zeros(indices.shape if need_per_sample_weights else 0)
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
            grad_psw[begin:end] = part_psw
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
    grad_psw = grad.new_empty(indices.shape if need_per_sample_weights else 0)
    return [torch.empty_like(w) for w in weights], [torch.empty_like(b) for b in biases], grad_psw


def _setup_multi(ctx, inputs, output):
    indices, offsets, coefficients, weights, biases, layers, *options, mode, psw, features, num = inputs
    ctx.save_for_backward(indices, offsets, *coefficients, *weights, *biases, psw)
    ctx.layers, ctx.options, ctx.mode = list(layers), options, mode
    ctx.features = list(range(len(layers))) if features is None else list(features)
    ctx.num_features = len(layers) if num is None else num


def _backward_of_multi(ctx, grad):
    indices, offsets, *tensors, psw = ctx.saved_tensors
    count, total = len(ctx.layers), sum(ctx.layers)
    coefficients, weights, biases = tensors[:count], tensors[count : count + total], tensors[count + total :]
    need_psw = needs_grad(ctx, 10)
    grad_weights, grad_biases, grad_psw = torch.ops.mprec.dhe_bag_multi_backward(
        grad,
        indices,
        offsets,
        coefficients,
        weights,
        biases,
        ctx.layers,
        *ctx.options,
        ctx.mode,
        psw,
        ctx.features,
        ctx.num_features,
        need_psw,
    )
    grad_psw = grad_psw if need_psw else None
    no_hashes = [None] * count
    grads = (None, None, no_hashes, grad_weights, grad_biases, None, None, None, None, None, grad_psw)
    return passed_only(ctx, *grads, None, None)


for _name, _forward, _forward_fake, _gradient, _gradient_fake, _backward_formula, _context in (
    (
        "dhe_bag",
        _dhe_bag,
        _dhe_bag_fake,
        _dhe_bag_backward,
        _dhe_bag_backward_fake,
        _backward_of_dhe_bag,
        _setup,
    ),
    (
        "dhe_bag_multi",
        _dhe_bag_multi,
        _dhe_bag_multi_fake,
        _dhe_bag_multi_backward,
        _dhe_bag_multi_backward_fake,
        _backward_of_multi,
        _setup_multi,
    ),
):
    library.impl(_name, _forward, "CompositeExplicitAutograd")
    library.impl(f"{_name}_backward", _gradient, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mprec::{_name}", _forward_fake, lib=library)
    torch.library.register_fake(f"mprec::{_name}_backward", _gradient_fake, lib=library)
    torch.library.register_autograd(f"mprec::{_name}", _backward_formula, setup_context=_context, lib=library)
