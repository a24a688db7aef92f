"""A table with pooling, on mprec's kernels."""

import torch
from torch import Tensor

from mprec import huge_pages as pages
from mprec import ops
from mprec.layers import read_by_collections


@read_by_collections
class EmbeddingBag(torch.nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag`` on mprec's kernels: the same constructor, state_dict, repr and exceptions.

    A swap is one line, and checkpoints go both ways. Differences are those of
    :func:`mprec.ops.embedding_bag`: weights per sample also with ``mode="mean"``, and errors where torch
    drops data.

    Args:
        huge_pages: put a new table into huge pages (see :mod:`mprec.huge_pages`), which makes look-ups out of
            cache faster; by default tables on the CPU from 8 MiB on. The repr says how much has them.

    The other arguments are torch's.

    Shape: ``input`` ``[n]`` with ``offsets`` ``[B]``, or ``[B, L]``; output ``[B, embedding_dim]``.

    Example::

        >>> bag = mprec.nn.EmbeddingBag(10, 3, mode="sum")
        >>> bag(torch.tensor([1, 2, 4, 5, 4]), torch.tensor([0, 2])).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        huge_pages: bool | None = None,
    ) -> None:
        fresh = _weight is None
        if fresh:
            _weight = table_storage(num_embeddings, embedding_dim, device, dtype, huge_pages)
        super().__init__(
            num_embeddings,
            embedding_dim,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            _weight,
            include_last_offset,
            padding_idx,
            device,
            dtype,
        )
        if fresh and _weight is not None:
            self.reset_parameters()  # torch leaves a given weight as it is

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.weight.is_cpu and self.weight.nbytes >= pages.LARGE:
            text += f", huge_pages={pages.resident(self.weight.detach()) >> 20} MiB"
        return text

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As torch's; ``out`` takes the result, if given (not with gradients)."""
        if torch.jit.is_scripting():
            return self._scripted(input, offsets, per_sample_weights)
        return ops.embedding_bag(
            input,
            self.weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
            out=out,
        )

    def _scripted(self, input: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None) -> Tensor:
        """The same in TorchScript, whose functions call operators alone."""
        include_last_offset, padding_idx, max_norm = self.include_last_offset, self.padding_idx, self.max_norm
        if input.dim() == 2:
            if offsets is not None:
                raise ValueError("if input is 2D, then offsets has to be None: each row of input is a bag")
            offsets = torch.arange(input.size(0) + 1, device=input.device) * input.size(1)
            include_last_offset = True
            input = input.reshape(-1)
            if per_sample_weights is not None:
                per_sample_weights = per_sample_weights.reshape(-1)
        if offsets is None:
            raise ValueError("offsets has to be a 1D Tensor but got None")
        if max_norm is not None:
            torch.embedding_renorm_(self.weight.detach(), input, max_norm, self.norm_type)
        mode = 0 if self.mode == "sum" else 1 if self.mode == "mean" else 2
        return torch.ops.mprec.embedding_bag(
            self.weight,
            input,
            offsets,
            mode,
            per_sample_weights,
            include_last_offset,
            -1 if padding_idx is None else padding_idx,
            self.scale_grad_by_freq,
            self.sparse,
        )


def table_storage(rows, dim, device, dtype, huge_pages) -> Tensor | None:
    """Memory for a new table in huge pages, or ``None``: then torch allocates."""
    if huge_pages is False or rows <= 0 or dim <= 0 or torch.empty(0, device=device).device.type != "cpu":
        return None
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if huge_pages is None and (rows * dim * dtype.itemsize < pages.LARGE or not pages.supported()):
        return None
    try:
        return pages.empty(rows, dim, dtype=dtype)
    except (OSError, OverflowError):
        return None  # torch says what it could not allocate
