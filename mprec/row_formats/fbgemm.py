"""FBGEMM's fused rows: whole numbers with a scale and a bias behind them, by torch's own operators."""

import torch
from torch import Tensor

from mprec.row_formats.base import RowFormat

__all__ = ["Int4Rows", "Int8Rows"]


def check_range(weight: Tensor, name: str, bits: int, scale: torch.dtype) -> None:
    """``ValueError`` for numbers that ``bits`` per number, with a scale and a bias of type ``scale``, would
    turn into others without a word."""
    if not weight.numel() or weight.is_meta:
        return
    if not bool(weight.isfinite().all()):
        raise ValueError(f"precision: {name} is for finite numbers; a row of the table holds others")
    low, high = weight.amin(1), weight.amax(1)
    largest = torch.finfo(scale).max
    step = (high.double() - low.double()) / (2**bits - 1)
    if float(low.abs().max()) > largest or float(step.max()) > largest:
        raise ValueError(
            f"precision: {name} holds the least number of a row and the step between two codes up to "
            f"{largest:g}, got {float(low.abs().max()):g} and {float(step.max()):g}"
        )


class Int8Rows(RowFormat):
    """D bytes, then scale and bias as float32."""

    def encode(self, weight: Tensor) -> Tensor:
        check_range(weight, self.name, self.bits, torch.float32)
        return torch.ops.quantized.embedding_bag_byte_prepack(weight)

    def decode(self, rows: Tensor) -> Tensor:
        return torch.ops.quantized.embedding_bag_byte_unpack(rows)


class Int4Rows(RowFormat):
    """D / 2 bytes, the even column in the low half, then scale and bias as float16."""

    def encode(self, weight: Tensor) -> Tensor:
        self.check_dim(weight.shape[1])
        check_range(weight, self.name, self.bits, torch.float16)
        if weight.is_meta:  # torch says nothing of its shape
            return weight.new_empty(len(weight), self.row_bytes(weight.shape[1]), dtype=torch.uint8)
        return torch.ops.quantized.embedding_bag_4bit_prepack(weight)

    def decode(self, rows: Tensor) -> Tensor:
        return torch.ops.quantized.embedding_bag_4bit_unpack(rows)
