"""``dhe_bag`` and ``dhe_bag_multi`` and their gradients on CUDA (and ROCm) tensors; see ``_cuda``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mprec import reference
from mprec.names import MODES
from mprec.ops import _cached_dhe, _csr, _dhe, _dhe_gradient
from mprec.ops._checks import check_same_device, num_bags
from mprec.ops._common import ids, plain
from mprec.ops._cuda_common import KERNEL_DTYPES, aligned, columns_of, rounds, with_last_offset
from mprec.ops._decoders import check_decoder


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
    check_decoder(coefficients, weights, biases, *options)
    check_same_device(
        indices=indices,
        offsets=offsets,
        coefficients=coefficients,
        weights=weights,
        biases=biases,
        per_sample_weights=per_sample_weights,
    )
    indices, offsets = _dhe.checked(
        indices, offsets, weights[0].dtype, mode, per_sample_weights, include_last_offset
    )
    if weights[0].dtype not in KERNEL_DTYPES:
        return _dhe._dhe_bag(
            indices, offsets, coefficients, weights, biases, *options, mode, per_sample_weights,
            include_last_offset, padding_idx,
        )  # fmt: skip
    batch = num_bags(offsets, include_last_offset)
    offsets = with_last_offset(offsets, len(indices), include_last_offset)
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
    stacks = _dhe.stacks_of(coefficients, weights, biases, layers, options)
    check_same_device(
        indices=indices,
        offsets=offsets,
        coefficients=coefficients,
        weights=weights,
        biases=biases,
        per_sample_weights=per_sample_weights,
    )
    indices, offsets, num_features = _dhe.checked_multi(
        indices, offsets, weights[0].dtype, mode, per_sample_weights, features, num_features, len(layers)
    )
    if weights[0].dtype not in KERNEL_DTYPES or any(w.dtype != weights[0].dtype for w in weights):
        return _dhe._dhe_bag_multi(
            indices, offsets, coefficients, weights, biases, layers, *options, mode, per_sample_weights,
            features, num_features,
        )  # fmt: skip
    batch = _csr.batch_size(offsets, num_features)
    features = list(range(len(layers))) if features is None else list(features)
    return _pooled(indices, offsets, batch, features, stacks, options, mode, per_sample_weights, -1)


def quantized_dhe_bag_multi(
    indices, offsets, coefficients, weights, affines, layers, family, activation, last_activation, mode=0,
    per_sample_weights=None, features=None, num_features=None,
):  # fmt: skip
    """Weights in float8, sums in float32."""
    options = (family, activation, last_activation)
    stacks = _dhe.stacks_of(coefficients, weights, affines, layers, options, scaled=True)
    check_same_device(
        indices=indices,
        offsets=offsets,
        coefficients=coefficients,
        weights=weights,
        affines=affines,
        per_sample_weights=per_sample_weights,
    )
    indices, offsets, num_features = _dhe.checked_multi(
        indices, offsets, torch.float32, mode, per_sample_weights, features, num_features, len(layers)
    )
    batch = _csr.batch_size(offsets, num_features)
    features = list(range(len(layers))) if features is None else list(features)
    return _pooled(indices, offsets, batch, features, stacks, options, mode, per_sample_weights, -1)


def _pooled(indices, offsets, batch, features, stacks, options, mode, per_sample_weights, padding_idx):
    """Decode every ID, a launch per shape of decoder, then pool all features in one."""
    from mprec.triton_kernels import dhe
    from mprec.triton_kernels.embedding_bag import pool_grouped

    first = stacks[0][1][0]
    dims = [ws[-1].shape[0] for _, ws, _ in stacks]
    columns, psw = columns_of(dims), plain(per_sample_weights)
    # float32, so that bags of half-precision vectors are summed before they are rounded
    vectors = torch.empty(len(indices), -(-max(dims) // 4) * 4, dtype=torch.float32, device=first.device)
    out = stacks[0][2][0].new_empty(batch, sum(dims))  # biases: float32 where weights are in float8
    for parts in rounds(features):
        for members in _of_equal_shape(parts, stacks):
            served = [features[t] for t in members]
            dhe.decode_grouped(indices, offsets, batch, served, *_stacks(stacks, members), *options, vectors)
        pool_grouped(
            vectors, [dims[t] for t in parts], indices, offsets, batch, [features[t] for t in parts], mode,
            psw, padding_idx, out, [columns[t] for t in parts],
        )  # fmt: skip
    return out


def _of_equal_shape(parts, stacks) -> list[list[int]]:
    groups: dict[tuple, list[int]] = {}
    for t in parts:
        groups.setdefault(tuple(tuple(map(int, w.shape)) for w in stacks[t][1]), []).append(t)
    return list(groups.values())


def _stacks(stacks, members):
    """(coefficients, weights, biases) of these, as the kernels take them."""
    return (
        [aligned(stacks[t][0]) for t in members],
        [[aligned(w) for w in stacks[t][1]] for t in members],
        [[aligned(b) for b in stacks[t][2]] for t in members],
    )


def cached_dhe_bag(
    keys, rows, probes, indices, offsets, coefficients, weights, biases, family, activation, last_activation,
    mode=0, per_sample_weights=None, include_last_offset=False, padding_idx=-1,
):  # fmt: skip
    """IDs in the cache are read from it, the others decoded; the host never learns how many there were."""
    indices, offsets = _cached_dhe.checked(
        keys, rows, probes, indices, offsets, coefficients, weights, biases, family, activation,
        last_activation, mode, per_sample_weights, include_last_offset,
    )  # fmt: skip
    from mprec.triton_kernels.embedding_bag import pool_grouped
    from mprec.triton_kernels.row_cache import RowCache, cached_dhe_forward

    batch = num_bags(offsets, include_last_offset)
    offsets = with_last_offset(offsets, len(indices), include_last_offset)
    vectors = cached_dhe_forward(
        RowCache(keys, rows, probes), indices, aligned(coefficients), [aligned(w) for w in weights],
        [aligned(b) for b in biases], family, activation, last_activation,
    )  # fmt: skip
    out, psw = vectors.new_empty(batch, vectors.shape[1]), plain(per_sample_weights)
    pool_grouped(vectors, [vectors.shape[1]], indices, offsets, batch, [0], mode, psw, padding_idx, out, [0])
    return out


# ------------------------------------------------------------------------------------------------ gradients


def backward_serves(mode: int, weights: Sequence[Tensor]) -> bool:
    """Whether the kernels here compute the gradient; all but those of maxima and of other dtypes."""
    return mode != MODES["max"] and all(w.dtype is weights[0].dtype in KERNEL_DTYPES for w in weights)


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
    options = (family, activation, last_activation)
    if not backward_serves(mode, weights):
        return _dhe_gradient._dhe_bag_backward(
            grad, indices, offsets, coefficients, weights, biases, *options, mode, per_sample_weights,
            include_last_offset, padding_idx, need_per_sample_weights,
        )  # fmt: skip
    indices, offsets = ids(indices, "indices"), ids(offsets, "offsets")
    batch = num_bags(offsets, include_last_offset)
    offsets = with_last_offset(offsets, len(indices), include_last_offset)
    (grads,), grad_psw = _gradients(
        grad, indices, offsets, batch, [0], 1,
        [(coefficients, weights, biases)], options, mode, per_sample_weights, padding_idx,
        need_per_sample_weights,
    )  # fmt: skip
    return *grads, grad_psw


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
    options = (family, activation, last_activation)
    if not backward_serves(mode, weights):
        return _dhe_gradient._dhe_bag_multi_backward(
            grad, indices, offsets, coefficients, weights, biases, layers, *options, mode,
            per_sample_weights, features, num_features, need_per_sample_weights,
        )  # fmt: skip
    split = _dhe._split
    stacks = list(zip(coefficients, split(layers, weights), split(layers, biases), strict=True))
    grads, grad_psw = _gradients(
        grad, ids(indices, "indices"), ids(offsets, "offsets"), _csr.batch_size(offsets, num_features),
        features, num_features, stacks, options, mode, per_sample_weights, -1, need_per_sample_weights,
    )  # fmt: skip
    return [w for ws, _ in grads for w in ws], [b for _, bs in grads for b in bs], grad_psw


def _gradients(
    grad, indices, offsets, batch, features, num_features, stacks, options, mode, per_sample_weights,
    padding_idx, need_per_sample_weights,
):  # fmt: skip
    """Per decoder (weights' gradients, biases' gradients), and that of the per-sample weights [n or 0]."""
    grad = plain(grad)
    dims = [ws[-1].shape[0] for _, ws, _ in stacks]
    columns, found = columns_of(dims), [([], []) for _ in stacks]
    grad_psw = grad.new_zeros(indices.shape if need_per_sample_weights else 0)
    bag, share = _places(indices, offsets, batch * num_features, mode, padding_idx, grad.dtype)
    factor = share if per_sample_weights is None else share * per_sample_weights.to(grad.dtype)
    for parts in rounds(features):
        for members in _of_equal_shape(parts, stacks):
            rows = _taken(grad, bag, batch, [(features[t], columns[t]) for t in members], num_features,
                          dims[members[0]])  # fmt: skip
            grads, vectors = _decoder_gradients(
                indices, offsets, batch, [features[t] for t in members], *_stacks(stacks, members), *options,
                rows * factor.unsqueeze(1), need_per_sample_weights,
            )  # fmt: skip
            for of_weights, of_biases in grads:
                for t, w, b in zip(members, of_weights.unbind(0), of_biases.unbind(0), strict=True):
                    found[t][0].append(w)
                    found[t][1].append(b)
            if need_per_sample_weights:
                served = _served(bag, batch, [features[t] for t in members], num_features)
                grad_psw += torch.where(served, (rows * vectors).sum(1) * share, 0)
    return found, grad_psw if per_sample_weights is None else grad_psw.to(per_sample_weights.dtype)


def _places(indices, offsets, bags, mode, padding_idx, dtype):
    """Each ID's bag, and its share of that bag's gradient (0: no bag took the ID)."""
    at = torch.arange(len(indices), device=indices.device, dtype=offsets.dtype)
    bag = torch.searchsorted(offsets, at, right=True) - 1
    taken = (bag >= 0) & (bag < bags) & (indices >= 0)
    if padding_idx >= 0:
        taken &= indices != padding_idx
    bag, share = bag.clamp(0, max(bags - 1, 0)), taken.to(torch.float32)
    if mode == MODES["mean"]:
        # sums of ones are exact in any order
        sizes = torch.zeros(max(bags, 1), device=indices.device).index_add_(0, bag, share)
        share = share / sizes.index_select(0, bag).clamp(min=1)
    return bag, share.to(dtype)


def _taken(grad, bag, batch, places, num_features, dim):
    """The gradient of each ID's pooled vector, [n, dim]; `places` tells features' columns in grad [B, .]."""
    if num_features == 1:
        return grad.index_select(0, bag) if len(grad) else grad.new_zeros(len(bag), dim)
    from mprec.triton_kernels.grouped import device_table

    first = [0] * num_features
    for feature, column in places:
        first[feature] = column
    column = device_table([first], grad.device)[0][bag // max(batch, 1)]
    where = (bag % max(batch, 1)) * grad.shape[1] + column
    return grad.flatten()[where[:, None] + torch.arange(dim, device=grad.device)]


def _served(bag, batch, members, num_features):
    """Which IDs belong to these features, bool [n]."""
    from mprec.triton_kernels.grouped import device_table

    if num_features == 1:
        return torch.ones_like(bag, dtype=torch.bool)
    flags = [int(feature in members) for feature in range(num_features)]
    return device_table([flags], bag.device)[0][bag // max(batch, 1)] > 0


def _decoder_gradients(
    indices, offsets, batch, features, coefficients, weights, biases, family, activation, last_activation,
    grad_rows, need_rows,
):  # fmt: skip
    """Gradients of decoders of equal shape for the gradient [n, D] of IDs' vectors; encodings are made again.

    What stands in rows of other features' IDs means nothing and reaches nothing. Returns per layer
    (dW [features, N, K], db [features, N]), and the vectors [n, D] if they are needed, else None.
    """
    from mprec.triton_kernels.dhe import decode_grouped, layer_grouped
    from mprec.triton_kernels.dhe_gradient import layer_gradients

    last = len(weights[0]) - 1
    names = [last_activation if layer == last else activation for layer in range(last + 1)]
    inputs, sums = [indices], []
    for layer in range(last + 1):
        ws, bs = [w[layer] for w in weights], [b[layer] for b in biases]
        out = grad_rows.new_empty(len(indices), ws[0].shape[0])
        if layer == 0:
            first = [coefficients, [[w] for w in ws], [[b] for b in bs]]
            decode_grouped(indices, offsets, batch, features, *first, family, "none", "none", out)
        else:
            layer_grouped(inputs[layer], offsets, batch, features, ws, bs, out)
        sums.append(out)
        if layer < last or need_rows:
            inputs.append(reference.activate(out, names[layer]))
    grads = []
    for layer in range(last, -1, -1):
        dz = plain(_dhe_gradient._activation_gradient(grad_rows, sums[layer], names[layer]))
        hashes = coefficients if layer == 0 else None
        grads.append(layer_gradients(inputs[layer], hashes, dz, offsets, batch, features, family))
        if layer:
            grad_rows = torch.empty_like(inputs[layer])
            layer_grouped(dz, offsets, batch, features, [w[layer] for w in weights], None, grad_rows)
    return grads[::-1], inputs[-1] if need_rows else None
