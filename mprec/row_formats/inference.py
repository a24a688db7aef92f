"""Rows of FBGEMM's inference tables (``IntNBitTableBatchedEmbeddingBagsCodegen``), read and written.

Such a row has a scale and a bias as float16, then the codes, then zeros up to a multiple of the alignment. A
row of mprec (and of ``torch.ops.quantized``) has the codes first, then scale and bias, float32 in int8 and
float16 in int4. The codes are the same bytes in both, the even column of int4 in the low half. A number is
``scale * code + bias``.
"""

import torch
from torch import Tensor

from mprec.row_formats.base import RowFormat
from mprec.row_formats.fbgemm import Int4Rows, Int8Rows

__all__ = ["check_rows", "from_inference_rows", "inference_row_bytes", "to_inference_rows"]

_FORMATS: dict[str, RowFormat] = {"int8": Int8Rows("int8"), "int4": Int4Rows("int4")}
#: The type of scale and bias behind the codes of a row of mprec.
_BEHIND = {"int8": torch.float32, "int4": torch.float16}
_FRONT = 4  # bytes: scale and bias in float16


def inference_row_bytes(dim: int, precision: str, alignment: int = 16) -> int:
    """Bytes of a row of ``dim`` numbers in the inference layout.

    Args:
        dim: numbers in a row; even in int4.
        precision: ``"int8"`` or ``"int4"``.
        alignment: FBGEMM's ``row_alignment``: 16 on GPUs, 1 on CPUs.

    Raises:
        ValueError: another precision, or numbers that are none of a row's.
    """
    codes = _codes(dim, precision)
    if alignment < 1:
        raise ValueError(f"alignment: expected at least 1, got {alignment}")
    return -(-(_FRONT + codes) // alignment) * alignment


def to_inference_rows(rows: Tensor, dim: int, precision: str, alignment: int = 16) -> Tensor:
    """Rows of mprec in the inference layout.

    int4 rows keep every bit. int8 rows keep their codes, and scale and bias are rounded to float16, as FBGEMM
    does it: a number moves by at most ``(abs(bias) + 255 * scale) / 2048``, and by a little more where the
    scale is below 6.1e-5.

    Args:
        rows: uint8 ``[N, bytes]`` as ``mprec.row_formats.ROW_FORMATS[precision].encode`` makes them.
        dim, precision, alignment: as for :func:`inference_row_bytes`.

    Returns:
        uint8 ``[N, inference_row_bytes(dim, precision, alignment)]``; padding is zero.

    Raises:
        ValueError: rows of another size, among them rows that are in the inference layout already; a scale or
            a bias that is not finite, or that float16 cannot hold: above 65504, or a scale that would be 0.
        TypeError: rows that are no uint8 tensor.
    """
    codes = _codes(dim, precision)
    wide = inference_row_bytes(dim, precision, alignment)
    _check(rows, _FORMATS[precision].row_bytes(dim), "row-wise", wide, "inference", dim, precision)
    affine = _aligned(rows[:, codes:]).view(_BEHIND[precision])
    _check_affine(affine, "row-wise", "inference")
    half = affine.to(torch.float16)
    lost = ~half.isfinite() | ((half == 0) & (affine != 0) & torch.tensor([True, False], device=rows.device))
    if bool(lost.any()):
        row, which = map(int, lost.nonzero()[0])
        raise ValueError(
            f"rows[{row}]: the inference layout has scale and bias in float16, which cannot hold the "
            f"{('scale', 'bias')[which]} {float(affine[row, which]):g}"
        )
    result = rows.new_zeros(len(rows), wide)
    result[:, :_FRONT] = half.view(torch.uint8)
    result[:, _FRONT : _FRONT + codes] = rows[:, :codes]
    return result


def from_inference_rows(rows: Tensor, dim: int, precision: str, alignment: int = 16) -> Tensor:
    """Rows in the inference layout as rows of mprec, every number kept.

    Args:
        rows: uint8 ``[N, inference_row_bytes(dim, precision, alignment)]``. What the padding holds does not
            matter.
        dim, precision, alignment: as for :func:`inference_row_bytes`.

    Returns:
        uint8 ``[N, bytes]``, as ``mprec.row_formats.ROW_FORMATS[precision].decode`` and quantised collections
        take them.

    Raises:
        ValueError: rows of another size, among them rows that are row-wise already. Where both layouts have
            rows of one size (int4 without padding, int8 where ``dim % 16 == 8``) only what the rows hold can
            tell: a scale or a bias that is not finite, or a scale below what rounding makes of 0.
        TypeError: rows that are no uint8 tensor.
    """
    codes = _codes(dim, precision)
    wide = inference_row_bytes(dim, precision, alignment)
    _check(rows, wide, "inference", _FORMATS[precision].row_bytes(dim), "row-wise", dim, precision)
    half = _aligned(rows[:, :_FRONT]).view(torch.float16)
    _check_affine(half, "inference", "row-wise")
    affine = half.to(_BEHIND[precision]).view(torch.uint8)
    return torch.cat([rows[:, _FRONT : _FRONT + codes], affine], dim=1)


def check_rows(rows: Tensor, dim: int, precision: str) -> None:
    """``ValueError`` if uint8 rows ``[N, bytes]`` cannot be those of mprec, such as rows in the inference
    layout, which may be of the same size; nothing is known of other precisions than int8 and int4."""
    if precision not in _FORMATS or rows.is_meta:
        return
    _check(rows, _FORMATS[precision].row_bytes(dim), "row-wise", -1, "inference", dim, precision)
    affine = _aligned(rows[:, _codes(dim, precision) :]).view(_BEHIND[precision])
    _check_affine(affine, "row-wise", "inference")


def _aligned(columns: Tensor) -> Tensor:
    """A copy, whose memory can be viewed as wider numbers."""
    return columns.clone(memory_format=torch.contiguous_format)


def _codes(dim: int, precision: str) -> int:
    """Bytes of a row's codes."""
    if precision not in _FORMATS:
        raise ValueError(f"precision: expected one of {', '.join(_FORMATS)}, got {precision!r}")
    if dim < 1:
        raise ValueError(f"dim: expected at least 1, got {dim}")
    return _FORMATS[precision].row_bytes(dim) - _FORMATS[precision].overhead


def _check(rows: Tensor, size: int, layout: str, other: int, other_layout: str, dim: int, precision: str):
    """``TypeError`` or ``ValueError`` unless ``rows`` are rows of ``size`` bytes."""
    if not isinstance(rows, Tensor) or rows.dtype != torch.uint8:
        raise TypeError(f"rows: expected a uint8 tensor, got {getattr(rows, 'dtype', type(rows).__name__)}")
    if rows.dim() != 2:
        raise ValueError(f"rows: expected [N, {size}], got {list(rows.shape)}")
    if rows.shape[1] != size:
        hint = f"; {other} bytes are those of the {other_layout} layout" if rows.shape[1] == other else ""
        raise ValueError(
            f"rows: {dim} numbers in {precision} have {size} bytes in the {layout} layout, got "
            f"{rows.shape[1]}{hint}"
        )


def _check_affine(affine: Tensor, layout: str, other_layout: str) -> None:
    """``ValueError`` unless each row's scale and bias ``[N, 2]`` can be those of a table."""
    # A bias that was rounded up in float16 may lie above all numbers of its row: by half a unit, 15 steps.
    lowest = -(affine[:, 1].abs() / 2048).clamp(min=2.0**-24)
    wrong = ~affine.isfinite().all(1) | (affine[:, 0] < lowest)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        scale, bias = affine[row].tolist()
        raise ValueError(
            f"rows[{row}]: scale {scale:g} and bias {bias:g} are none of the {layout} layout's: are these "
            f"rows in the {other_layout} layout?"
        )
