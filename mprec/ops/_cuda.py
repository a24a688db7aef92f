"""The operators on CUDA (and ROCm) tensors: Triton kernels, without waiting for the device.

Offsets and IDs are not checked before the launch, since that would wait: kernels clamp offsets, leave out
IDs out of range and count them, and a later call raises (``mprec.triton_kernels.faults``). What the kernels
lack (float64, gradients of the maximum, ...) goes the way of any other device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mprec import reference
from mprec.names import MODES
from mprec.ops import _backward, _csr, _dhe, _dhe_gradient, _tables
from mprec.ops._common import (
    check_per_sample_weights,
    check_same_device,
    check_weights,
    contiguous,
    ids,
    library,
    num_bags,
)

_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and on a 16-byte boundary as kernels expect of whole tensors."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _with_last_offset(offsets: Tensor, count: int, include_last_offset: bool) -> Tensor:
    return offsets if include_last_offset else torch.nn.functional.pad(offsets, (0, 1), value=count)


def _columns(dims: Sequence[int]) -> list[int]:
    return [sum(dims[:t]) for t in range(len(dims))]


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    mode: int = 0,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    check_same_device(weight=weight, indices=indices, offsets=offsets, per_sample_weights=per_sample_weights)
    check_weights(weight, "weight")
    indices, offsets = ids(indices, "indices"), ids(offsets, "offsets")
    check_per_sample_weights(per_sample_weights, weight, indices)
    if weight.dtype not in _KERNEL_DTYPES:
        return _tables._embedding_bag(
            weight, indices, offsets, mode, per_sample_weights, include_last_offset, padding_idx
        )
    from mprec.triton_kernels.embedding_bag import embedding_bag_grouped

    batch = num_bags(offsets, include_last_offset)
    out = weight.new_empty(batch, weight.shape[1])
    embedding_bag_grouped(
        [_aligned(weight)],
        indices,
        _with_last_offset(offsets, len(indices), include_last_offset),
        batch,
        [0],
        mode,
        contiguous(per_sample_weights),
        padding_idx,
        out,
        [0],
    )
    return out


def embedding_bag_multi(
    weights: Sequence[Tensor],
    indices: Tensor,
    offsets: Tensor,
    mode: int = 0,
    per_sample_weights: Tensor | None = None,
    features: Sequence[int] | None = None,
    num_features: int | None = None,
    sparse: bool = False,
) -> Tensor:
    check_same_device(
        weights=weights, indices=indices, offsets=offsets, per_sample_weights=per_sample_weights
    )
    for t, weight in enumerate(weights):
        check_weights(weight, f"weights[{t}]")
        if weight.dtype != weights[0].dtype:
            raise TypeError(f"weights[{t}]: expected {weights[0].dtype} as weights[0], got {weight.dtype}")
    indices, offsets = ids(indices, "indices"), ids(offsets, "offsets")
    check_per_sample_weights(per_sample_weights, weights[0], indices)
    if weights[0].dtype not in _KERNEL_DTYPES:
        return _tables._embedding_bag_multi(
            weights, indices, offsets, mode, per_sample_weights, features, num_features
        )
    from mprec.triton_kernels.embedding_bag import embedding_bag_grouped

    batch = _csr.batch_size(offsets, len(weights) if num_features is None else num_features)
    dims = [weight.shape[1] for weight in weights]
    out = weights[0].new_empty(batch, sum(dims))
    embedding_bag_grouped(
        [_aligned(weight) for weight in weights],
        indices,
        offsets,
        batch,
        range(len(weights)) if features is None else features,
        mode,
        contiguous(per_sample_weights),
        -1,
        out,
        _columns(dims),
    )
    return out


def dhe_bag(
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
    options = (family, activation, last_activation)
    _dhe.check_decoder(coefficients, weights, biases, *options)
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
    if weights[0].dtype not in _KERNEL_DTYPES:
        return _dhe._dhe_bag(
            indices, offsets, coefficients, weights, biases, *options, mode, per_sample_weights,
            include_last_offset, padding_idx,
        )  # fmt: skip
    batch = num_bags(offsets, include_last_offset)
    offsets = _with_last_offset(offsets, len(indices), include_last_offset)
    stacks = [(coefficients, weights, biases)]
    return _pooled(indices, offsets, batch, [0], stacks, options, mode, per_sample_weights, padding_idx)


def dhe_bag_multi(
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
    options = (family, activation, last_activation)
    if not len(coefficients) == len(layers) or not sum(layers) == len(weights) == len(biases):
        raise ValueError(
            f"layers: {list(layers)} do not describe {len(coefficients)} coefficients, "
            f"{len(weights)} weights and {len(biases)} biases"
        )
    split = _dhe._split
    stacks = list(zip(coefficients, split(layers, weights), split(layers, biases), strict=True))
    for t, stack in enumerate(stacks):
        _dhe.check_decoder(*stack, *options, f"decoder {t}: ")
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
    if weights[0].dtype not in _KERNEL_DTYPES or any(w.dtype != weights[0].dtype for w in weights):
        return _dhe._dhe_bag_multi(
            indices, offsets, coefficients, weights, biases, layers, *options, mode, per_sample_weights,
            features, num_features,
        )  # fmt: skip
    batch = _csr.batch_size(offsets, len(layers) if num_features is None else num_features)
    features = list(range(len(layers))) if features is None else list(features)
    return _pooled(indices, offsets, batch, features, stacks, options, mode, per_sample_weights, -1)


def _pooled(indices, offsets, batch, features, stacks, options, mode, per_sample_weights, padding_idx):
    """Decode every ID, a launch per shape of decoder, then pool all features in one."""
    from mprec.triton_kernels import dhe
    from mprec.triton_kernels.embedding_bag import pool_grouped

    first = stacks[0][1][0]
    dims = [ws[-1].shape[0] for _, ws, _ in stacks]
    # float32, so that bags of half-precision vectors are summed before they are rounded
    vectors = torch.empty(len(indices), -(-max(dims) // 4) * 4, dtype=torch.float32, device=first.device)
    groups: dict[tuple, list[int]] = {}
    for t, (_, ws, _) in enumerate(stacks):
        groups.setdefault(tuple(w.shape for w in ws), []).append(t)
    for members in groups.values():
        dhe.decode_grouped(
            indices,
            offsets,
            batch,
            [features[t] for t in members],
            [_aligned(stacks[t][0]) for t in members],
            [[_aligned(w) for w in stacks[t][1]] for t in members],
            [[_aligned(b) for b in stacks[t][2]] for t in members],
            *options,
            vectors,
        )
    out = first.new_empty(batch, sum(dims))
    psw = contiguous(per_sample_weights)
    columns = _columns(dims)
    pool_grouped(vectors, dims, indices, offsets, batch, features, mode, psw, padding_idx, out, columns)
    return out


# ------------------------------------------------------------------------------------------------ gradients


def embedding_bag_backward(
    grad,
    weight,
    indices,
    offsets,
    mode,
    per_sample_weights,
    include_last_offset,
    padding_idx,
    scale_grad_by_freq,
    sparse,
    need_weight,
    need_per_sample_weights,
):
    dense_sum = mode != MODES["max"] and not (scale_grad_by_freq or sparse or need_per_sample_weights)
    if not dense_sum or weight.dtype not in _KERNEL_DTYPES:
        return _tables._embedding_bag_backward(
            grad, weight, indices, offsets, mode, per_sample_weights, include_last_offset, padding_idx,
            scale_grad_by_freq, sparse, need_weight, need_per_sample_weights,
        )  # fmt: skip
    if not need_weight:
        return grad.new_empty(0), grad.new_empty(0)
    offsets = _with_last_offset(offsets, len(indices), include_last_offset)
    (gradient,) = _table_gradients(
        grad, [weight], indices, offsets, mode, per_sample_weights, [0], 1, padding_idx
    )
    return gradient, grad.new_empty(0)


def embedding_bag_multi_backward(
    grad,
    weights,
    indices,
    offsets,
    mode,
    per_sample_weights,
    features,
    num_features,
    sparse,
    need_per_sample_weights,
):
    dense_sum = mode != MODES["max"] and not (sparse or need_per_sample_weights)
    if not dense_sum or weights[0].dtype not in _KERNEL_DTYPES:
        return _tables._embedding_bag_multi_backward(
            grad, weights, indices, offsets, mode, per_sample_weights, features, num_features, sparse,
            need_per_sample_weights,
        )  # fmt: skip
    gradients = _table_gradients(
        grad, weights, indices, offsets, mode, per_sample_weights, features, num_features, -1
    )
    return gradients, grad.new_empty(0)


def _table_gradients(
    grad, weights, indices, offsets, mode, per_sample_weights, features, num_features, padding_idx
):
    from mprec.triton_kernels import gradient

    batch = _csr.batch_size(offsets, num_features)
    segments = gradient.sort_entries(
        [len(weight) for weight in weights], indices, offsets, batch, features, num_features, mode,
        per_sample_weights, padding_idx,
    )  # fmt: skip
    columns = _columns([weight.shape[1] for weight in weights])
    return gradient.weight_gradients(weights, segments, contiguous(grad), columns)


def dhe_bag_backward(
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
    """The first layer's sums and gradient come from kernels that hash; the encodings are never in memory."""
    if mode == MODES["max"] or need_per_sample_weights or weights[0].dtype not in _KERNEL_DTYPES:
        return _dhe_gradient._dhe_bag_backward(
            grad, indices, offsets, coefficients, weights, biases, family, activation, last_activation, mode,
            per_sample_weights, include_last_offset, padding_idx, need_per_sample_weights,
        )  # fmt: skip
    from mprec.triton_kernels import dhe
    from mprec.triton_kernels.dhe_gradient import first_layer_gradient

    keep = None if padding_idx < 0 else indices != padding_idx
    grad_x, _ = _backward.pool_backward(
        grad, None, offsets, len(indices), mode, per_sample_weights, include_last_offset, keep, False
    )
    last = len(weights) - 1
    names = [last_activation if layer == last else activation for layer in range(len(weights))]
    sums = [dhe.dhe_forward(indices, coefficients, weights[:1], biases[:1], family, "none", "none")]
    inputs: list[Tensor | None] = [None]
    for layer in range(1, len(weights)):
        inputs.append(reference.activate(sums[-1], names[layer - 1]))
        sums.append(torch.addmm(biases[layer], inputs[-1], weights[layer].t()))
    grad_weights, grad_biases = [], []
    for layer in range(last, -1, -1):
        grad_sum = _dhe_gradient._activation_gradient(grad_x, sums[layer], names[layer])
        if layer:
            grad_weights.append(grad_sum.t() @ inputs[layer])
            grad_x = grad_sum @ weights[layer]
        else:
            grad_weights.append(first_layer_gradient(indices, coefficients, grad_sum, family))
        grad_biases.append(grad_sum.sum(0))
    return grad_weights[::-1], grad_biases[::-1], grad.new_empty(0)


def dhe_bag_multi_backward(
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
    """Feature by feature; the only operator here that waits for the device, to know the features' sizes."""
    csr = _csr.Csr(indices, offsets, per_sample_weights)
    split_weights, split_biases = _dhe._split(layers, weights), _dhe._split(layers, biases)
    grad_psw = grad.new_zeros(indices.shape if need_per_sample_weights else 0)
    parts = grad.split([ws[-1].shape[0] for ws in split_weights], dim=1)
    grad_weights, grad_biases = [], []
    slices = _csr.feature_slices(csr, features, num_features)
    for t, (begin, end, starts) in enumerate(slices):
        psw = None if per_sample_weights is None else per_sample_weights[begin:end]
        of_weights, of_biases, of_psw = dhe_bag_backward(
            parts[t], indices[begin:end], starts, coefficients[t], split_weights[t], split_biases[t], family,
            activation, last_activation, mode, psw, True, -1, need_per_sample_weights,
        )  # fmt: skip
        grad_weights += of_weights
        grad_biases += of_biases
        if need_per_sample_weights:
            grad_psw[begin:end] = of_psw
    return grad_weights, grad_biases, grad_psw


for _operator in (
    embedding_bag,
    embedding_bag_backward,
    embedding_bag_multi,
    embedding_bag_multi_backward,
    dhe_bag,
    dhe_bag_backward,
    dhe_bag_multi,
    dhe_bag_multi_backward,
):
    library.impl(_operator.__name__, _operator, "CUDA")
