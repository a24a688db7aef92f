"""Kernels of ``dhe_bag`` and its kin, and their gradients, on CUDA (and ROCm) tensors; see ``tables``."""

import torch
from torch import Tensor

from mprec import reference
from mprec.bags import Bags
from mprec.kernels import kernel
from mprec.names import MODES
from mprec.tensors import plain

from .dhe import decode_grouped, layer_grouped
from .dhe_gradient import layer_gradients
from .embedding_bag import pool_grouped
from .grouped import device_table
from .launch_arguments import KERNEL_DTYPES, aligned, columns_of, rounds
from .row_cache import RowCache, cached_dhe_forward


def _is_float(call) -> bool:
    dtypes = {weight.dtype for _, weights, _ in call.stacks for weight in weights}
    return len(dtypes) == 1 and dtypes <= set(KERNEL_DTYPES)


@kernel("dhe_bag", "dhe_bag_multi", device="cuda", supports=_is_float)
@kernel("quantized_dhe_bag_multi", device="cuda")
def dhe_bag(call) -> Tensor:
    """Decode every ID, a launch per shape of decoder, then pool all features in one. Of weights in float8
    sums are in float32."""
    stacks, bags, dims = call.stacks, call.bags.with_last_offset(), call.dims
    columns, features = columns_of(dims), bags.served(len(stacks))
    device = bags.indices.device
    # float32, so that bags of half-precision vectors are summed before they are rounded
    vectors = torch.empty(len(bags.indices), -(-max(dims) // 4) * 4, dtype=torch.float32, device=device)
    out = stacks[0][2][0].new_empty(bags.batch, sum(dims))  # biases: float32 where weights are in float8
    for parts in rounds(features):
        for members in _of_equal_shape(parts, stacks):
            served = [features[t] for t in members]
            decode_grouped(
                bags.indices, bags.offsets, bags.batch, served, *_stacks(stacks, members), *call.options,
                vectors,
            )  # fmt: skip
        served = [features[t] for t in parts]
        _pool(
            vectors,
            [dims[t] for t in parts],
            bags._replace(features=served),
            out,
            [columns[t] for t in parts],
        )
    return out


def _pool(vectors: Tensor, dims: list[int], bags: Bags, out: Tensor, columns: list[int]) -> None:
    pool_grouped(
        vectors, dims, bags.indices, bags.offsets, bags.batch, bags.served(len(dims)), bags.mode,
        bags.per_sample_weights, bags.padding_idx, out, columns,
    )  # fmt: skip


def _of_equal_shape(parts, stacks) -> list[list[int]]:
    groups: dict[tuple, list[int]] = {}
    for t in parts:
        groups.setdefault(tuple(tuple(map(int, w.shape)) for w in stacks[t][1]), []).append(t)
    return list(groups.values())


def _stacks(stacks, members):
    """Coefficients of these, weights of each, biases of each, as the kernels take them."""
    return (
        [aligned(stacks[t][0]) for t in members],
        [[aligned(w) for w in stacks[t][1]] for t in members],
        [[aligned(b) for b in stacks[t][2]] for t in members],
    )


@kernel("cached_dhe_bag", device="cuda")
def cached_dhe_bag(call) -> Tensor:
    """IDs in the cache are read from it, the others decoded; the host never learns how many there were."""
    bags = call.bags.with_last_offset()
    (coefficients,), (weights,), (biases,) = _stacks(call.stacks, [0])
    cache = RowCache(*call.cache)
    vectors = cached_dhe_forward(cache, bags.indices, coefficients, weights, biases, *call.options)
    out = vectors.new_empty(bags.batch, vectors.shape[1])
    _pool(vectors, [vectors.shape[1]], bags, out, [0])
    return out


# ------------------------------------------------------------------------------------------------ gradients


@kernel(
    "dhe_bag_backward",
    "dhe_bag_multi_backward",
    device="cuda",
    supports=lambda call: call.of.bags.mode != MODES["max"] and _is_float(call.of),
)
def dhe_bag_gradient(call) -> tuple[list[Tensor], list[Tensor], Tensor]:
    stacks, bags, grad = call.of.stacks, call.of.bags.with_last_offset(), plain(call.grad)
    features, dims = bags.served(len(stacks)), call.of.dims
    columns, found = columns_of(dims), [([], []) for _ in stacks]
    grad_psw = grad.new_zeros(bags.indices.shape if call.need_weights else 0)
    bag, share = _places(bags, grad.dtype)
    psw = bags.per_sample_weights
    factor = share if psw is None else share * psw.to(grad.dtype)
    for parts in rounds(features):
        for members in _of_equal_shape(parts, stacks):
            of_members = bags._replace(features=[features[t] for t in members])
            rows = _taken(grad, bag, of_members, [columns[t] for t in members], dims[members[0]])
            grads, vectors = _decoder_gradients(
                of_members, _stacks(stacks, members), call.of.options, rows * factor.unsqueeze(1),
                call.need_weights,
            )  # fmt: skip
            for of_weights, of_biases in grads:
                for t, w, b in zip(members, of_weights.unbind(0), of_biases.unbind(0), strict=True):
                    found[t][0].append(w)
                    found[t][1].append(b)
            if call.need_weights:
                grad_psw += torch.where(_served(bag, of_members), (rows * vectors).sum(1) * share, 0)
    weights, biases = ([g for of_stack in found for g in of_stack[kind]] for kind in (0, 1))
    return weights, biases, grad_psw.to(call.like().dtype)


def _places(bags: Bags, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each ID's bag, and its share of that bag's gradient (0: no bag took the ID)."""
    indices, count = bags.indices, bags.batch * bags.num_features
    at = torch.arange(len(indices), device=indices.device, dtype=bags.offsets.dtype)
    bag = torch.searchsorted(bags.offsets, at, right=True) - 1
    taken = (bag >= 0) & (bag < count) & (indices >= 0)
    if bags.padding_idx >= 0:
        taken &= indices != bags.padding_idx
    bag, share = bag.clamp(0, max(count - 1, 0)), taken.to(torch.float32)
    if bags.mode == MODES["mean"]:
        # sums of ones are exact in any order
        sizes = torch.zeros(max(count, 1), device=indices.device).index_add_(0, bag, share)
        share = share / sizes.index_select(0, bag).clamp(min=1)
    return bag, share.to(dtype)


def _taken(grad: Tensor, bag: Tensor, bags: Bags, columns: list[int], dim: int) -> Tensor:
    """The gradient of each ID's pooled vector, [n, dim]; of a feature it begins at its column of ``grad``."""
    if bags.num_features == 1:
        if grad.shape[1] != dim:  # several decoders of one feature
            grad = grad[:, columns[0] : columns[0] + dim]
        return grad.index_select(0, bag) if len(grad) else grad.new_zeros(len(bag), dim)
    first, batch = [0] * bags.num_features, max(bags.batch, 1)
    for feature, column in zip(bags.features, columns, strict=True):
        first[feature] = column
    column = device_table([first], grad.device)[0][bag // batch]
    where = (bag % batch) * grad.shape[1] + column
    return grad.flatten()[where[:, None] + torch.arange(dim, device=grad.device)]


def _served(bag: Tensor, bags: Bags) -> Tensor:
    """Which IDs belong to the features, bool [n]."""
    if bags.num_features == 1:
        return torch.ones_like(bag, dtype=torch.bool)
    flags = [int(feature in bags.features) for feature in range(bags.num_features)]
    return device_table([flags], bag.device)[0][bag // max(bags.batch, 1)] > 0


def _decoder_gradients(bags: Bags, stacks, options, grad_rows: Tensor, need_rows: bool):
    """Gradients of decoders of equal shape for the gradient [n, D] of IDs' vectors; encodings are made again.

    What stands in rows of other features' IDs means nothing and reaches nothing. Returns per layer
    (dW [features, N, K], db [features, N]), and the vectors [n, D] if they are needed, else None.
    """
    coefficients, weights, biases = stacks
    family, activation, last_activation = options
    at = bags.offsets, bags.batch, bags.features
    last = len(weights[0]) - 1
    names = [last_activation if layer == last else activation for layer in range(last + 1)]
    inputs, sums = [bags.indices], []
    for layer in range(last + 1):
        ws, bs = [w[layer] for w in weights], [b[layer] for b in biases]
        out = grad_rows.new_empty(len(bags.indices), ws[0].shape[0])
        if layer == 0:
            first = [coefficients, [[w] for w in ws], [[b] for b in bs]]
            decode_grouped(bags.indices, *at, *first, family, "none", "none", out)
        else:
            layer_grouped(inputs[layer], *at, ws, bs, out)
        sums.append(out)
        if layer < last or need_rows:
            inputs.append(reference.activate(out, names[layer]))
    grads = []
    for layer in range(last, -1, -1):
        dz = plain(reference.activation_gradient(grad_rows, sums[layer], names[layer]))
        hashes = coefficients if layer == 0 else None
        grads.append(layer_gradients(inputs[layer], hashes, dz, *at, family))
        if layer:
            grad_rows = torch.empty_like(inputs[layer])
            layer_grouped(dz, *at, [w[layer] for w in weights], None, grad_rows)
    return grads[::-1], inputs[-1] if need_rows else None
