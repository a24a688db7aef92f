"""What a format of tables' rows is."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from mprec._native import row_formats

__all__ = ["PlainRows", "RowFormat"]

_NATIVE: dict[str, dict[str, Any]] = {entry["name"]: entry for entry in row_formats()}


class RowFormat(ABC):
    """One format. Its sizes are those of the native struct of the same name (``row_formats()``).

    Attributes:
        name: what users write, such as ``"int8"``.
        quantised: rows are uint8 ``[N, bytes]``, each with its own scale; else numbers ``[N, D]`` of that
            type.
        bits: of a number.
        code: what the argument ``bits`` of operators says of quantised rows.
        overhead: bytes of a row beside its numbers.
        multiple: what divides the numbers in a row.
    """

    def __init__(self, name: str) -> None:
        native = _NATIVE[name]
        self.name = name
        self.quantised: bool = native["quantised"]
        self.bits: int = native["bits"]
        self.code: int = native["code"]
        self.overhead: int = native["overhead"]
        self.multiple: int = native["multiple"]

    def check_dim(self, dim: int) -> None:
        """``ValueError`` if rows cannot have ``dim`` numbers."""
        if dim % self.multiple:
            raise ValueError(f"precision: {self.name} packs pairs, got rows of an odd {dim} numbers")

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row of ``dim`` numbers. ``ValueError`` if there is none."""
        self.check_dim(dim)
        return dim * self.bits // 8 + self.overhead

    def dim(self, columns: int) -> int:
        """Numbers in a row of so many columns of its tensor (bytes of a quantised row); not positive if there
        is no such row."""
        return (columns - self.overhead) * 8 // self.bits if self.quantised else columns

    @abstractmethod
    def encode(self, weight: Tensor) -> Tensor:
        """The rows that stand for float32 ``weight`` ``[N, D]``: a copy."""

    @abstractmethod
    def decode(self, rows: Tensor) -> Tensor:
        """The numbers that rows stand for: float32 ``[N, D]``."""


class PlainRows(RowFormat):
    """Numbers of a type of torch."""

    def encode(self, weight: Tensor) -> Tensor:
        """Raises ``ValueError`` if finite numbers would become infinite."""
        rows = weight.to(getattr(torch, self.name), copy=True)
        if not rows.is_meta and not bool((rows.isfinite() | ~weight.isfinite()).all()):
            largest = torch.finfo(rows.dtype).max
            raise ValueError(
                f"precision: {self.name} holds numbers up to {largest:g}, got {float(weight.abs().max())}"
            )
        return rows

    def decode(self, rows: Tensor) -> Tensor:
        return rows.to(torch.float32)
