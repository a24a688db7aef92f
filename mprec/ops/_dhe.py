"""Bags of deep hash embeddings: ``torch.ops.mprec.dhe_bag`` and ``dhe_bag_multi``;
``quantized_dhe_bag_multi``, whose weights are in float8; ``packed_dhe_bag_multi``, whose decoders are packed
in few bytes; and ``cached_dhe_bag``, behind a fixed table of hot IDs' vectors.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mprec import reference
from mprec._native import _C
from mprec.bags import Bags, check_ndim
from mprec.kernels import kernel
from mprec.ops import _autograd
from mprec.ops._checks import check_same_device
from mprec.ops._common import all_float32
from mprec.ops._decoders import check_decoder, drop_changed, packable, packed_decoder
from mprec.ops._table import OPS, Op, by_kernels, flatten
from mprec.tracing import traced

#: Coefficients, weights and biases of one decoder. Where weights are in float8: affines ``[2, out]`` of each
#: layer in place of biases, the scales of its outputs and their biases.
Stack = tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]


#: Bytes of activations that a forward pass of training keeps, at most: of more the backward pass makes them
#: again.
MOST_KEPT = 64 << 20


class Kept(NamedTuple):
    """What a forward pass on the CPU keeps of one decoder, until its backward pass has run.

    ``activations`` float32, as ``_C.dhe_bag_keeping`` gives them, of the ``distinct`` IDs int64 ``[m]``;
    ``row_of_entry`` int32 ``[n]``: which of these an entry has, -1 for padding.
    """

    activations: Tensor
    distinct: Tensor
    row_of_entry: Tensor


class Cache(NamedTuple):
    """``keys`` int64 ``[slots]`` (-1: empty) and ``rows`` ``[slots, D]`` are an open-addressing table as
    ``mprec.triton_kernels.row_cache.build`` makes it. IDs in it take their row, the others are decoded."""

    keys: Tensor
    rows: Tensor
    probes: int


class Decoders(NamedTuple):
    """The call: ``options`` are the hash family, the activation, and that of the last layer.

    ``precisions``: what decoders are packed in on the CPU, of each; None: float32.
    """

    stacks: Sequence[Stack]
    options: tuple[str, str, str]
    bags: Bags
    scaled: bool = False
    cache: Cache | None = None
    precisions: Sequence[str] | None = None

    @property
    def device(self) -> str:
        return self.bags.indices.device.type

    @property
    def dims(self) -> list[int]:
        return [weights[-1].shape[0] for _, weights, _ in self.stacks]

    @property
    def dtype(self) -> torch.dtype:
        """Of the result and of per-sample weights."""
        return torch.float32 if self.scaled else self.stacks[0][1][0].dtype


# ----------------------------------------------------------------------------------------------- arguments


def _one(indices, offsets, coefficients, weights, biases, family, activation, last_activation, mode, psw,
         include_last_offset, padding_idx) -> Decoders:  # fmt: skip
    bags = Bags(indices, offsets, mode, psw, None, 1, include_last_offset, padding_idx)
    return Decoders([(coefficients, weights, biases)], (family, activation, last_activation), bags)


def _cached(keys, rows, probes, *one) -> Decoders:
    return _one(*one)._replace(cache=Cache(keys, rows, probes))


def _many(indices, offsets, coefficients, weights, biases, layers, family, activation, last_activation, mode,
          psw, features, num_features, scaled=False) -> Decoders:  # fmt: skip
    if not layers or not len(coefficients) == len(layers) or not sum(layers) == len(weights) == len(biases):
        raise ValueError(
            f"layers: {list(layers)} do not describe {len(coefficients)} coefficients, "
            f"{len(weights)} weights and {len(biases)} {'affines' if scaled else 'biases'}"
        )
    stacks, end = [], 0
    for hashes, count in zip(coefficients, layers, strict=True):
        begin, end = end, end + count
        stacks.append((hashes, weights[begin:end], biases[begin:end]))
    num_features = len(layers) if num_features is None else num_features
    bags = Bags(indices, offsets, mode, psw, features, num_features)
    return Decoders(stacks, (family, activation, last_activation), bags, scaled)


def _packed(*arguments) -> Decoders:
    *stacks, precisions, mode, psw, features, num_features = arguments
    return _many(*stacks, mode, psw, features, num_features)._replace(precisions=precisions)


def _check(call: Decoders) -> Decoders:
    bags, count = call.bags, len(call.stacks)
    for t, stack in enumerate(call.stacks):
        check_decoder(*stack, *call.options, f"decoder {t}: " if count > 1 else "", call.scaled)
    cache = call.cache
    check_same_device(
        indices=bags.indices,
        offsets=bags.offsets,
        coefficients=[hashes for hashes, _, _ in call.stacks],
        weights=[weight for _, weights, _ in call.stacks for weight in weights],
        biases=[bias for _, _, biases in call.stacks for bias in biases],
        per_sample_weights=bags.per_sample_weights,
        **({} if cache is None else {"keys": cache.keys, "rows": cache.rows}),
    )
    if cache is not None:
        _check_cache(cache, call.dims[0])
    return call._replace(bags=bags.checked(count, call.dtype, or_float32=True))


def _check_cache(cache: Cache, dim: int) -> None:
    keys, rows, probes = cache
    check_ndim(keys, "keys")
    if keys.dtype != torch.int64:
        raise TypeError(f"keys: expected int64, got {keys.dtype}")
    if not len(keys) or len(keys) & (len(keys) - 1):
        raise ValueError(f"keys: expected a power of two of them, got {len(keys)}")
    if rows.shape != (len(keys), dim):
        raise ValueError(f"rows: expected [{len(keys)}, {dim}], got {list(rows.shape)}")
    if probes < 1:
        raise ValueError(f"probes: expected at least 1, got {probes}")


# ------------------------------------------------------------------------------------------------- forward


def _fake(call: Decoders) -> Tensor:
    return call.stacks[0][2][0].new_empty(call.bags.batch, sum(call.dims))  # biases: float32 where scaled


@kernel(
    "dhe_bag",
    "dhe_bag_multi",
    "packed_dhe_bag_multi",
    device="cpu",
    supports=lambda call: all(all_float32(*weights) for _, weights, _ in call.stacks),
)
def _native(call: Decoders) -> Tensor:
    bags, threads = call.bags.with_float_weights(), torch.get_num_threads()
    precisions = call.precisions or ["float32"] * len(call.stacks)
    handles = [
        packed_decoder(*stack, *call.options, p) for stack, p in zip(call.stacks, precisions, strict=True)
    ]
    if bags.num_features == len(handles) == 1:  # any offsets, and padding
        return _C.dhe_bag(
            handles[0], bags.indices, bags.offsets, bags.per_sample_weights, bags.mode,
            bags.include_last_offset, bags.padding_idx, None, threads,
        )  # fmt: skip
    return _C.dhe_bag_multi(
        handles, bags.indices, bags.offsets, bags.per_sample_weights, bags.mode, -1, None, None, threads,
        features=bags.features, num_features=bags.num_features,
    )  # fmt: skip


def _plain(call: Decoders, dtype: torch.dtype) -> Tensor:
    """In plain torch, computed in ``dtype``."""
    bags = call.bags
    bags.check_offsets()
    if not _autograd.is_batched(bags.indices):
        bags.check_ids([None] * len(call.stacks))
    pooled = []
    for stack, (_, _, part) in zip(call.stacks, bags.parts(len(call.stacks)), strict=True):
        rows = reference.dhe(part.indices, *stack, *call.options, dtype=dtype)
        if call.cache is not None:
            rows = _with_cached(rows, part.indices, call.cache)
        pooled.append(
            reference.pool(
                rows, part.offsets, part.mode, part.per_sample_weights, part.include_last_offset,
                part.positions_kept(),
            )
        )  # fmt: skip
    return (pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)).to(call.dtype)


def _with_cached(rows: Tensor, ids: Tensor, cache: Cache) -> Tensor:
    in_order, slot = cache.keys.sort()
    at = torch.searchsorted(in_order, ids.long()).clamp(max=len(in_order) - 1)
    hit = in_order[at] == ids
    return torch.where(hit[:, None], cache.rows[slot[at]].to(rows.dtype), rows)


def _reference(call: Decoders) -> Tensor:
    return _plain(call, torch.float64 if call.device == "cpu" else call.dtype)


def _formula(call: Decoders) -> Tensor:
    if _autograd.is_batched(call.bags.offsets):
        raise NotImplementedError("offsets: torch.func.vmap cannot map over them; map over input [B, L]")
    return _plain(call, torch.float64 if call.dtype == torch.float64 else torch.float32)


# -------------------------------------------------------------------------------------------- the operators


def _keep(op: Op, arguments) -> tuple[Tensor, list[Tensor]] | None:
    """The result, and as tensors a :class:`Kept`."""
    call = op.call(*arguments)
    bags, (stack,) = call.bags, call.stacks
    coefficients, weights, biases = stack
    seen = bags.indices, bags.offsets, bags.per_sample_weights, coefficients, *weights, *biases
    if not packable(*stack) or not op.is_unseen(call, *seen):
        return None
    call = op.check(call)
    bags, n = call.bags, len(call.bags.indices)
    handle = packed_decoder(*stack, *call.options)
    shape = handle.kept_shape(n)
    if 4 * math.prod(shape) > MOST_KEPT:
        return None
    kept = torch.empty(shape, dtype=torch.float32)
    distinct, row_of_entry = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int32)
    out, count = _C.dhe_bag_keeping(
        handle, bags.indices, bags.offsets, bags.per_sample_weights, bags.mode, bags.include_last_offset,
        bags.padding_idx, kept, distinct, row_of_entry, torch.get_num_threads(),
    )  # fmt: skip
    return out, [kept, distinct[:count], row_of_entry] if count else []


def _gradient(op: Op, arguments, grad: Tensor, wanted, *kept: Tensor) -> dict:
    need_psw = "per_sample_weights" in wanted
    backward = OPS[f"{op.name}_backward"]
    if kept and backward.is_unseen(op.call(*arguments), grad, *flatten(arguments)[1]):
        found = backward.serve(backward.call(grad, *arguments, need_psw)._replace(kept=Kept(*kept)))
    elif op is DHE_BAG:
        found = torch.ops.mprec.dhe_bag_backward(grad, *arguments, need_psw)
    else:
        *others, _, _ = arguments
        call = op.call(*arguments)
        features = call.bags.served(len(call.stacks)), call.bags.num_features
        found = torch.ops.mprec.dhe_bag_multi_backward(grad, *others, *features, need_psw)
    return dict(zip(("weights", "biases", "per_sample_weights"), found, strict=True))


def _differentiate(op: Op, keyset, *arguments):
    if not traced():  # all bytes of weights are compared before a forward pass of training
        for stack in op.call(*arguments).stacks:
            drop_changed(*stack)
    return by_kernels(op, keyset, *arguments)


DHE_BAG = Op(
    "dhe_bag(Tensor indices, Tensor offsets, Tensor coefficients, Tensor[] weights, Tensor[] biases, "
    "str family, str activation, str last_activation, int mode=0, Tensor? per_sample_weights=None, "
    "bool include_last_offset=False, int padding_idx=-1) -> Tensor",
    call=_one,
    check=_check,
    fake=_fake,
    reference=_reference,
    formula=_formula,
    gradient=_gradient,
    differentiate=_differentiate,
    keep=_keep,
    see_through=True,
)
DHE_BAG_MULTI = Op(
    "dhe_bag_multi(Tensor indices, Tensor offsets, Tensor[] coefficients, Tensor[] weights, "
    "Tensor[] biases, int[] layers, str family, str activation, str last_activation, int mode=0, "
    "Tensor? per_sample_weights=None, int[]? features=None, int? num_features=None) -> Tensor",
    call=_many,
    check=_check,
    fake=_fake,
    reference=_reference,
    formula=_formula,
    gradient=_gradient,
    differentiate=_differentiate,
)
# On a CPU the formula, in float64: CPUs have no float8 products.
Op(
    "quantized_dhe_bag_multi(Tensor indices, Tensor offsets, Tensor[] coefficients, Tensor[] weights, "
    "Tensor[] affines, int[] layers, str family, str activation, str last_activation, int mode=0, "
    "Tensor? per_sample_weights=None, int[]? features=None, int? num_features=None) -> Tensor",
    call=lambda *arguments: _many(*arguments, scaled=True),
    check=_check,
    fake=_fake,
    reference=_reference,
)
# Without gradients. The native cache of mprec.cache serves the CPU; here, a CPU only has the plain meaning.
Op(
    "cached_dhe_bag(Tensor keys, Tensor rows, int probes, Tensor indices, Tensor offsets, "
    "Tensor coefficients, Tensor[] weights, Tensor[] biases, str family, str activation, "
    "str last_activation, int mode=0, Tensor? per_sample_weights=None, bool include_last_offset=False, "
    "int padding_idx=-1) -> Tensor",
    call=_cached,
    check=_check,
    fake=_fake,
    reference=_reference,
)
# For serving under compilers; called eagerly, modules go past operators.
Op(
    "packed_dhe_bag_multi(Tensor indices, Tensor offsets, Tensor[] coefficients, Tensor[] weights, "
    "Tensor[] biases, int[] layers, str family, str activation, str last_activation, str[] precisions, "
    "int mode=0, Tensor? per_sample_weights=None, int[]? features=None, int? num_features=None) -> Tensor",
    call=_packed,
    check=_check,
    fake=_fake,
)
