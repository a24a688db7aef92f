"""Rows of float8 numbers with one scale."""

import torch
from torch import Tensor

from mprec.row_formats.base import RowFormat

__all__ = ["Float8Rows"]


class Float8Rows(RowFormat):
    """D bytes of float8 (e4m3), then a scale as float32. The row's largest magnitude becomes 448, the largest
    number of the type.

    The error of a number is at most 1/16 of it, from 2**-6 / 448 of the row's largest magnitude on.
    """

    def encode(self, weight: Tensor) -> Tensor:
        """Raises ``ValueError`` for numbers that are not finite: the format has no infinity."""
        if weight.is_meta:  # rows to come from a state_dict
            return weight.new_empty(len(weight), self.row_bytes(weight.shape[1]), dtype=torch.uint8)
        if not bool(weight.isfinite().all()):
            raise ValueError("precision: float8 is for finite numbers; a row of the table holds others")
        largest = torch.finfo(torch.float8_e4m3fn).max
        scale = weight.abs().amax(1, keepdim=True) / largest
        scale = torch.where(scale > 0, scale, 1)
        numbers = (weight / scale).clamp(-largest, largest).to(torch.float8_e4m3fn)
        return torch.cat([numbers.view(torch.uint8), scale.view(torch.uint8)], dim=1)

    def decode(self, rows: Tensor) -> Tensor:
        numbers = rows[:, :-4].contiguous().view(torch.float8_e4m3fn).to(torch.float32)
        return numbers * rows[:, -4:].contiguous().view(torch.float32)
