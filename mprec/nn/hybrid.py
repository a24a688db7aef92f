"""A table and a deep hash embedding side by side."""

from torch import Tensor, cat, nn

from mprec.representations import DheConfig
from mprec.representations.deep_hash import DeepHashEmbeddingBag
from mprec.representations.embedding_bag import EmbeddingBag


class HybridEmbeddingBag(nn.Module):
    """Both representations of each ID: ``[B, 2 * embedding_dim]``, table first.

    Arguments as those of :class:`EmbeddingBag` and :class:`DeepHashEmbeddingBag`, which are its ``table`` and
    ``dhe``.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        config: DheConfig | None = None,
        mode: str = "sum",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        options = {"mode": mode, "include_last_offset": include_last_offset, "device": device, "dtype": dtype}
        self.table = EmbeddingBag(num_embeddings, embedding_dim, padding_idx=padding_idx, **options)
        self.dhe = DeepHashEmbeddingBag(embedding_dim, config, padding_idx=self.table.padding_idx, **options)

    def reset_parameters(self) -> None:
        self.table.reset_parameters()
        self.dhe.reset_parameters()

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        # The table first: it checks that IDs are below num_embeddings.
        table = self.table(input, offsets, per_sample_weights)
        return cat([table, self.dhe(input, offsets, per_sample_weights)], dim=1)
