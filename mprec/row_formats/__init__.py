"""Formats of tables' rows: a line each here, with what turns numbers into such rows and back.

Native code knows how to read them (``csrc/rows``), and how large they are: a format there and one here have
the same name.
"""

from collections.abc import Mapping

from mprec.row_formats.base import PlainRows, RowFormat
from mprec.row_formats.fbgemm import Int4Rows, Int8Rows
from mprec.row_formats.float8 import Float8Rows
from mprec.row_formats.inference import (
    check_rows,
    from_inference_rows,
    inference_row_bytes,
    to_inference_rows,
)

__all__ = [
    "ROW_FORMATS",
    "RowFormat",
    "check_rows",
    "from_inference_rows",
    "inference_row_bytes",
    "quantised_format",
    "row_format",
    "to_inference_rows",
]

_FORMATS = (
    PlainRows("float32"),
    PlainRows("float16"),
    PlainRows("bfloat16"),
    Int8Rows("int8"),
    Int4Rows("int4"),
    Float8Rows("float8"),
)

#: By the name that users write.
ROW_FORMATS: Mapping[str, RowFormat] = {found.name: found for found in _FORMATS}


def row_format(name: str, argument: str = "precision") -> RowFormat:
    """The format of this name, or a ``ValueError`` that lists them."""
    try:
        return ROW_FORMATS[name]
    except (KeyError, TypeError):
        raise ValueError(f"{argument}: expected one of {', '.join(ROW_FORMATS)}, got {name!r}") from None


def quantised_format(code: int, argument: str = "bits") -> RowFormat:
    """The quantised format of this code, or a ``ValueError`` that lists them."""
    formats = {found.code: found for found in _FORMATS if found.quantised}
    if code not in formats:
        raise ValueError(f"{argument}: expected {' or '.join(map(str, formats))}, got {code}")
    return formats[code]
