"""Pooling of :class:`mprec.bags.Bags`, for this library's modules.

``try_*`` are one native call each, for what needs no gradient and what nobody watches
(:func:`mprec.tracing.eager`). They look at devices, dtypes and shapes themselves, and give None for what
they do not take. The functions beside them, which go through torch's dispatcher, then serve the call or say
what is wrong with it.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from mprec._native import _C
from mprec.bags import Bags
from mprec.ops._checks import check_same_device


def try_tables(
    tables: Sequence[Tensor],
    bags: Bags,
    out: Tensor | None,
    columns: Sequence[int] | None,
    threads: int | None,
) -> Tensor | None:
    """Pooled rows, of table t from column ``columns[t]`` of ``out`` on.

    Without ``columns`` they stand side by side; without ``out`` the result is a new tensor.
    """
    indices, offsets, mode, weights, features, num_features, _, padding_idx = bags
    return _C.try_embedding_bag_multi(
        tables, indices, offsets, weights, mode, padding_idx, out, columns,
        threads or torch.get_num_threads(), None, None, features, num_features,
    )  # fmt: skip


def try_table_group(
    group: "_C.TableGroup", modules: dict, bags: Bags, out: Tensor | None, threads: int | None
) -> Tensor | None:
    """The same of tables where modules keep them, by the features, mode and columns of the group.

    ``bags`` are of all features. What was replaced, moved or changed since the last call is seen.
    """
    indices, offsets, _, weights, _, _, _, _ = bags
    return _C.try_pool_tables(
        group, modules, indices, offsets, weights, out, threads or torch.get_num_threads()
    )


def try_decoders(
    decoders: Sequence["_C.Decoder"],
    bags: Bags,
    out: Tensor | None,
    columns: Sequence[int] | None,
    threads: int | None,
    dedupe: bool | None,
) -> Tensor | None:
    """The same of packed decoders' vectors."""
    indices, offsets, mode, weights, features, num_features, _, padding_idx = bags
    return _C.try_dhe_bag_multi(
        decoders, indices, offsets, weights, mode, padding_idx, out, columns,
        threads or torch.get_num_threads(), dedupe, features, num_features,
    )  # fmt: skip


def try_cached(
    decoders: "_C.CachedDecoders",
    bags: Bags,
    bound: int | None,
    out: Tensor | None,
    admit: bool,
    threads: int | None,
) -> Tensor | bool | None:
    """The same of decoders behind caches of rows; False if their weights have changed since they were packed.

    IDs are to be below ``bound``, if one is given; ``admit``: IDs may enter the caches.
    """
    indices, offsets, mode, weights, _, _, include_last_offset, padding_idx = bags
    return _C.cached_dhe_bag(
        decoders, indices, offsets, weights, mode, include_last_offset, padding_idx, bound, out, admit,
        threads or torch.get_num_threads(),
    )  # fmt: skip


def codebook_rows(codes: Tensor, centroids: Tensor, ids: Tensor) -> Tensor:
    """Row ``ids[i]`` of a codebook, float32 ``[n, D]``; ``IdOutOfRangeError`` if there is none such."""
    out = torch.empty(len(ids), centroids.shape[1], dtype=torch.float32)
    _C.codebook_rows(codes, centroids, ids, out)
    return out


def run_program(program: "_C.PathProgram", dense: Tensor, indices: Tensor, offsets: Tensor) -> Tensor | None:
    """Click probabilities by a whole path.

    None if its weights have changed since they were packed, and for tensors in a form that it does not take.
    """
    return _C.try_run_program(program, dense, indices, offsets, torch.get_num_threads())


def decode(decoder: "_C.Decoder", ids: Tensor, out: Tensor | None = None) -> Tensor:
    """The vector of each ID, ``[n, D]`` of float32, of a packed decoder."""
    each = torch.arange(len(ids))
    return _C.dhe_bag(decoder, ids, each, None, 0, False, -1, out, torch.get_num_threads())


def pool_tables(weights: Sequence[Tensor], bags: Bags, sparse: bool = False) -> Tensor:
    """Pooled rows of tables, side by side ``[B, sum D]``; see :func:`mprec.ops.embedding_bag_multi`."""
    indices, offsets, mode, psw, features, num_features, _, _ = bags
    check_same_device(weights=weights, indices=indices, offsets=offsets, per_sample_weights=psw)
    operator = seen_by_compilers(
        torch.ops.mprec.embedding_bag_multi, sparse and any(weight.requires_grad for weight in weights)
    )
    return operator(list(weights), indices, offsets, mode, psw, features, num_features, sparse)


def pool_quantised(rows: Sequence[Tensor], bits: Sequence[int], bags: Bags) -> Tensor:
    """Pooled rows of several formats, in float32; ``bits[t]`` is the code of a format of uint8."""
    indices, offsets, mode, psw, features, num_features, _, _ = bags
    return torch.ops.mprec.quantized_embedding_bag_multi(
        rows, bits, indices, offsets, mode, psw, features, num_features
    )


def pool_decoders(
    coefficients: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layers: Sequence[int],
    options: tuple[str, str, str],
    bags: Bags,
    scaled: bool = False,
) -> Tensor:
    """Pooled vectors of decoders; see :func:`mprec.ops.dhe_bag_multi`. ``scaled``: weights in float8, with
    affines in place of biases."""
    indices, offsets, mode, psw, features, num_features, _, _ = bags
    check_same_device(
        coefficients=coefficients, weights=weights, biases=biases, indices=indices, offsets=offsets,
        per_sample_weights=psw,
    )  # fmt: skip
    operator = torch.ops.mprec.quantized_dhe_bag_multi if scaled else torch.ops.mprec.dhe_bag_multi
    stacks = list(coefficients), list(weights), list(biases), list(layers)
    return operator(indices, offsets, *stacks, *options, mode, psw, features, num_features)


def pool_packed(
    coefficients: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layers: Sequence[int],
    options: tuple[str, str, str],
    precisions: Sequence[str],
    bags: Bags,
) -> Tensor:
    """As :func:`pool_decoders`, of decoders packed in these precisions, on the CPU."""
    indices, offsets, mode, psw, features, num_features, _, _ = bags
    weights, biases = [w.detach() for w in weights], [b.detach() for b in biases]
    return torch.ops.mprec.packed_dhe_bag_multi(
        indices, offsets, coefficients, weights, biases, layers, *options, precisions, mode, psw, features,
        num_features,
    )  # fmt: skip


def seen_by_compilers(operator, sparse_gradient: bool):
    """The operator; out of sight of a compiler if its gradient is sparse, which compilers cannot trace."""
    traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if sparse_gradient and traced and torch.is_grad_enabled():
        return functools.partial(_uncompiled, operator)
    return operator


@torch.compiler.disable
def _uncompiled(operator, *arguments):
    return operator(*arguments)
