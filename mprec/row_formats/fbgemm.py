"""FBGEMM's fused rows: whole numbers with a scale and a bias behind them, by torch's own operators."""

import torch
from torch import Tensor

from mprec.row_formats.base import RowFormat

__all__ = ["Int4Rows", "Int8Rows"]


class Int8Rows(RowFormat):
    """D bytes, then scale and bias as float32."""

    def encode(self, weight: Tensor) -> Tensor:
        return torch.ops.quantized.embedding_bag_byte_prepack(weight)

    def decode(self, rows: Tensor) -> Tensor:
        return torch.ops.quantized.embedding_bag_byte_unpack(rows)


class Int4Rows(RowFormat):
    """D / 2 bytes, the even column in the low half, then scale and bias as float16."""

    def encode(self, weight: Tensor) -> Tensor:
        self.check_dim(weight.shape[1])
        return torch.ops.quantized.embedding_bag_4bit_prepack(weight)

    def decode(self, rows: Tensor) -> Tensor:
        return torch.ops.quantized.embedding_bag_4bit_unpack(rows)
