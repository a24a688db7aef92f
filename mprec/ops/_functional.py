"""The public functions: torch's conventions outside, the operators' inside."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from mprec import reference
from mprec._native import _C
from mprec.bags import Bags, check_features, check_ndim, new
from mprec.hashing import coefficient_rows
from mprec.names import FAMILIES, MODES, code
from mprec.ops._checks import check_id_list, check_same_device
from mprec.ops._common import can_skip_dispatcher, padding_from_start, rows_as_bags, write_to
from mprec.ops._decoders import packable, packed_decoder
from mprec.ops.pooling import pool_decoders, pool_tables, seen_by_compilers, try_tables
from mprec.tensors import as_ids, plain


def _mode_code(mode: str, per_sample_weights: Tensor | None) -> int:
    number = MODES.get(mode) if isinstance(mode, str) else None
    if number is None:
        raise ValueError(f"mode has to be one of sum, mean or max, got {mode!r}")
    if number == 2 and per_sample_weights is not None:
        raise NotImplementedError(
            "per_sample_weights: only supported for mode='sum' and mode='mean', got mode='max'"
        )
    return number


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``torch.nn.functional.embedding_bag``: sums, means or maxima of bags of rows of ``weight``.

    Arguments, results and exceptions are torch's, with these differences:

    * ``per_sample_weights`` go with ``mode="mean"`` too: ``sum(w_i x_i) / count``;
    * indices that no bag holds (no offsets at all, or a last offset below the number of indices) are an
      error, where torch drops them or crashes;
    * ``scale_grad_by_freq`` divides by each ID's own frequency (torch 2.13's CPU kernel takes another's);
    * every ID is checked, on the CPU, before anything is read or (``max_norm``) written.

    Args:
        input: IDs of any integer type, ``[n]`` (bags by ``offsets``), ``[B, L]`` (B bags of L), or a nested
            tensor ``[B, *]`` of the jagged layout.
        weight: the table ``[N, D]``: float32, or float64, float16, bfloat16.
        offsets: int64 or int32, ``[B]`` or, with ``include_last_offset``, ``[B + 1]``: where each bag starts.
        max_norm: rows that are looked up are first scaled down, in place, to this ``norm_type``-norm.
        scale_grad_by_freq: divide gradients by how often an ID occurs in the call (not for ``max``).
        mode: ``"sum"``, ``"mean"`` or ``"max"``. An empty bag gives zeros.
        sparse: the gradient of ``weight`` is a sparse tensor (not for ``max``).
        per_sample_weights: one factor per index, of ``input``'s shape and ``weight``'s dtype (not for
            ``max``).
        include_last_offset: ``offsets`` ends with the number of indices.
        padding_idx: entries with this ID are left out; negative counts from the end.
        out: where to write the result, and what to return: a buffer of its shape and dtype that is used
            again costs neither an allocation nor its page faults. Not with gradients. It may share memory
            with what is read; that is slower.

    Derivatives are those of torch's formula in all ways that torch has: backward passes run kernels,
    derivatives of derivatives, forward-mode AD and ``torch.func`` transforms plain torch (without
    ``scale_grad_by_freq`` and ``sparse``). ``torch.compile`` leaves a look-up with a sparse gradient to run
    eagerly.

    Returns:
        ``[B, D]`` of ``weight``'s dtype.

    Raises:
        IdOutOfRangeError: an ID is negative or not below N.
        InvalidOffsetsError: offsets do not start at 0, fall, or do not end at the number of indices.
        DtypeError, DeviceError, ValueError, NotImplementedError: as torch's checks.
    """
    if (
        offsets is not None
        and max_norm is None
        and (number := MODES.get(mode) if type(mode) is str else None) is not None
        and not (number == 2 and (sparse or scale_grad_by_freq or per_sample_weights is not None))
        and (per_sample_weights is None or per_sample_weights.dtype is weight.dtype)
        and can_skip_dispatcher(input, weight, offsets, per_sample_weights, out)
    ):
        pooled = _C.try_embedding_bag(
            weight,
            input,
            offsets,
            per_sample_weights,
            number,
            include_last_offset,
            -1 if padding_idx is None else padding_from_start(padding_idx, len(weight)),
            out,
            torch.get_num_threads(),
        )
        if pooled is not None:
            return pooled
    if has_torch_function_variadic(input, weight, offsets, per_sample_weights):
        return handle_torch_function(
            embedding_bag,
            (input, weight, offsets, per_sample_weights),
            input,
            weight,
            offsets=offsets,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            mode=mode,
            sparse=sparse,
            per_sample_weights=per_sample_weights,
            include_last_offset=include_last_offset,
            padding_idx=padding_idx,
            out=out,
        )
    if weight.dtype is torch.int64 and input.is_floating_point():
        warnings.warn("embedding_bag(weight, input): swap the arguments, as torch wants them", stacklevel=2)
        weight, input = input, weight
    if per_sample_weights is not None and not input.is_nested and input.shape != per_sample_weights.shape:
        raise ValueError(
            f"per_sample_weights: expected the shape of input, {tuple(input.shape)}, "
            f"got {tuple(per_sample_weights.shape)}"
        )
    if weight.dim() != 2:
        raise ValueError(f"weight has to be a 2D Tensor, but got Tensor of dimension {weight.dim()}")
    if input.is_nested or input.dim() == 2:
        if offsets is not None:
            raise ValueError("if input is 2D, then offsets has to be None: each row of input is a bag")
        input, offsets, per_sample_weights = rows_as_bags(input, per_sample_weights)
        include_last_offset = True
    elif input.dim() != 1:
        raise ValueError(f"input has to be 1D or 2D Tensor, but got Tensor of dimension {input.dim()}")
    elif offsets is None:
        raise ValueError("offsets has to be a 1D Tensor but got None")
    elif offsets.dim() != 1:
        raise ValueError(f"offsets has to be a 1D Tensor, but got Tensor of dimension {offsets.dim()}")
    if mode == "max" and scale_grad_by_freq:
        raise ValueError("max mode does not support scaling the gradient by the frequency")
    if mode == "max" and sparse:
        raise ValueError("max mode does not support sparse weights")
    number = _mode_code(mode, per_sample_weights)
    padding = -1 if padding_idx is None else padding_from_start(padding_idx, weight.shape[0])
    check_same_device(weight=weight, input=input, offsets=offsets, per_sample_weights=per_sample_weights)
    if max_norm is not None:
        _renormalise(weight, as_ids(input, "input"), max_norm, norm_type)
    operator = seen_by_compilers(torch.ops.mprec.embedding_bag, sparse and weight.requires_grad)
    pooled = operator(
        weight,
        input,
        offsets,
        number,
        per_sample_weights,
        include_last_offset,
        padding,
        scale_grad_by_freq,
        sparse,
    )
    return write_to(out, pooled)


@torch.no_grad()
def _renormalise(weight: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> None:
    if not torch.compiler.is_compiling() and indices.is_cpu:
        check_id_list(indices, len(weight), "input")
    torch.embedding_renorm_(weight.detach(), plain(indices), max_norm, norm_type)


def embedding_bag_multi(
    weights: Sequence[Tensor],
    indices: Tensor,
    offsets: Tensor,
    mode: str = "sum",
    per_sample_weights: Tensor | None = None,
    *,
    features: Sequence[int] | None = None,
    num_features: int | None = None,
    sparse: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Bags of many tables in one call, in the layout of FBGEMM and TorchRec.

    Bag b of feature f is ``indices[offsets[f * B + b] : offsets[f * B + b + 1]]``.

    Args:
        weights: T tables ``[N_t, D_t]`` of one dtype; dimensions may differ.
        indices: integers ``[n]``, feature after feature.
        offsets: integers ``[F * B + 1]``, from 0 to n.
        mode: ``"sum"``, ``"mean"`` or ``"max"``; an empty bag gives zeros.
        per_sample_weights: one factor per index (not for ``max``), of the tables' dtype or, with 16-bit
            tables, float32; the mean is ``sum(w_i x_i) / count``.
        features: which feature each table serves; default: table t serves feature t.
        num_features: F; default: T.
        sparse: gradients of the tables are sparse tensors.
        out: where to write the result, of its shape and dtype, as for :func:`embedding_bag`.

    Returns:
        ``[B, sum D_t]``, tables side by side.

    Raises:
        IdOutOfRangeError, InvalidOffsetsError, DtypeError, DeviceError, ValueError, NotImplementedError.
    """
    number = _mode_code(mode, per_sample_weights)
    if not weights:
        raise ValueError("weights: expected at least one table")
    check_features(features, num_features, len(weights))
    check_ndim(indices, "indices")
    check_ndim(offsets, "offsets")
    if sparse and number == 2:
        raise ValueError("max mode does not support sparse weights")
    for t, weight in enumerate(weights):
        check_ndim(weight, f"weights[{t}]", 2)
    features = None if features is None else list(features)
    count = len(weights) if num_features is None else num_features
    bags = new(Bags, (indices, offsets, number, per_sample_weights, features, count, True, -1))
    if (
        can_skip_dispatcher(indices, offsets, per_sample_weights, out, *weights)
        and len({w.dtype for w in weights}) == 1
    ):
        pooled = try_tables(weights, bags, out, None, None)
        if pooled is not None:
            return pooled
    return write_to(out, pool_tables(weights, bags, sparse))


def dhe_bag(
    indices: Tensor,
    offsets: Tensor,
    coefficients: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    family: str = "universal",
    activation: str = "relu",
    last_activation: str = "sigmoid",
    mode: str = "sum",
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Bags of deep hash embeddings: each ID is hashed k ways, decoded by an MLP, and pooled.

    Gradients of the decoder are summed by threads: their last bits depend on how many there are, and on
    nothing else.

    Args:
        indices: int64 or int32 ``[n]``, any ID >= 0.
        offsets: int64 or int32 ``[B]``, or ``[B + 1]`` with ``include_last_offset``.
        coefficients: int32 ``[rows, k]`` of :func:`mprec.hashing.coefficients`.
        weights, biases: the decoder's layers, ``[out, in]`` and ``[out]`` as in ``torch.nn.Linear``.
        family: hash family, see :mod:`mprec.hashing`.
        activation: after all layers but the last: ``"none"``, ``"relu"``, ``"sigmoid"`` or ``"mish"``.
        last_activation: after the last layer.
        mode, per_sample_weights, include_last_offset: as in :func:`embedding_bag`.
        padding_idx: entries with this ID are left out.

    Returns:
        ``[B, D]`` of the weights' dtype; D is the last layer's width.

    Raises:
        IdOutOfRangeError: an ID is negative.
        InvalidOffsetsError, DtypeError, DeviceError, TypeError, ValueError, NotImplementedError.
    """
    number = _mode_code(mode, per_sample_weights)
    check_ndim(indices, "indices")
    check_ndim(offsets, "offsets")
    padding = -1 if padding_idx is None else padding_idx
    if (
        weights
        and (per_sample_weights is None or per_sample_weights.dtype is weights[0].dtype)
        and can_skip_dispatcher(indices, offsets, coefficients, per_sample_weights, *weights, *biases)
        and packable(coefficients, weights, biases)
    ):
        pooled = _C.try_dhe_bag(
            packed_decoder(coefficients, weights, biases, family, activation, last_activation),
            indices,
            offsets,
            per_sample_weights,
            number,
            include_last_offset,
            padding,
            None,
            torch.get_num_threads(),
        )
        if pooled is not None:
            return pooled
    check_same_device(
        coefficients=coefficients,
        weights=weights,
        biases=biases,
        indices=indices,
        offsets=offsets,
        per_sample_weights=per_sample_weights,
    )
    return torch.ops.mprec.dhe_bag(
        indices,
        offsets,
        coefficients,
        list(weights),
        list(biases),
        family,
        activation,
        last_activation,
        number,
        per_sample_weights,
        include_last_offset,
        padding,
    )


def dhe_bag_multi(
    indices: Tensor,
    offsets: Tensor,
    coefficients: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layers: Sequence[int],
    family: str = "universal",
    activation: str = "relu",
    last_activation: str = "sigmoid",
    mode: str = "sum",
    per_sample_weights: Tensor | None = None,
    *,
    features: Sequence[int] | None = None,
    num_features: int | None = None,
) -> Tensor:
    """Deep hash embeddings of many features in one call; layout as in :func:`embedding_bag_multi`.

    ``coefficients`` has one tensor per decoder; ``weights`` and ``biases`` are flat, ``layers[t]`` of each
    for decoder t. All share family and activations; shapes may differ. Returns ``[B, sum D_t]``.
    """
    number = _mode_code(mode, per_sample_weights)
    if not layers:
        raise ValueError("layers: expected at least one decoder")
    check_features(features, num_features, len(layers))
    check_ndim(indices, "indices")
    check_ndim(offsets, "offsets")
    features = None if features is None else list(features)
    count = len(layers) if num_features is None else num_features
    bags = Bags(indices, offsets, number, per_sample_weights, features, count)
    options = family, activation, last_activation
    return pool_decoders(coefficients, weights, biases, layers, options, bags)


def hash_encode(coefficients: Tensor, indices: Tensor, family: str = "universal") -> Tensor:
    """The encoder alone: float32 ``[n, k]`` of IDs ``[n]``. Not differentiable (IDs are integers).

    Raises:
        IdOutOfRangeError: an ID is negative. DtypeError, DeviceError, ValueError.
    """
    rows = coefficient_rows(family)
    if coefficients.dim() != 2 or len(coefficients) != rows or coefficients.dtype != torch.int32:
        raise ValueError(
            f"coefficients: expected int32 [{rows}, k] for family {family!r}, "
            f"got {coefficients.dtype} {list(coefficients.shape)}"
        )
    check_ndim(indices, "indices")
    check_same_device(coefficients=coefficients, indices=indices)
    indices = as_ids(indices, "indices")
    if not can_skip_dispatcher(coefficients, indices):
        return reference.encode(coefficients, indices, family)
    out = torch.empty(len(indices), coefficients.shape[1], dtype=torch.float32)
    _C.hash_encode(plain(coefficients), indices, code(FAMILIES, family, "family"), out)
    return out
