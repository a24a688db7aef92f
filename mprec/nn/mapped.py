"""Tables whose rows go through a learnt map in training, and are plain rows afterwards.

A row ``v`` of feature f stands for ``W_f v + b_f``. The map changes nothing about what a table can express
(any table is one, with ``W = I`` and ``b = 0``), but much about how it is learnt: a gradient that moves
``W_f`` moves all rows of the feature together, the rare ones too, and one that moves a row is scaled by what
the feature's other rows have found to matter. Afterwards the map is folded into the rows, so a served or
saved model is a model of tables: the same bytes, look-ups and keys.

The map is linear, so it is applied after pooling, once a bag instead of once an ID: a sum over a bag of n
rows is ``W_f (sum of v) + n b_f``, a mean ``W_f (mean of v) + b_f``, or zero if the bag is empty. With
weights per sample the factor of ``b_f`` is what pooling makes of a row of one. A maximum does not commute
with a map and is refused.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mprec.layers import recompute, refuse_more, run_as_modules, share_hooks
from mprec.names import MODES
from mprec.nn.collection import EmbeddingBagCollection
from mprec.nn.keyed import embed_alone
from mprec.ops._common import write_to
from mprec.representations import PARTS, TABLE

__all__ = ["MappedEmbeddingBagCollection", "folded", "pooled_ones"]


class MappedEmbeddingBagCollection(EmbeddingBagCollection):
    """An :class:`EmbeddingBagCollection` in training, each table with a learnt map and bias.

    Takes the same calls as ``collection`` and stands in for it; tables and decoders are its own modules, not
    copies. Optimizers see the tables as before and ``maps.{name}.weight|bias`` beside them::

        model.embeddings = MappedEmbeddingBagCollection(model.embeddings)
        ...  # train
        model.embeddings = model.embeddings.fold()

    Args:
        collection: its features with tables pool by sum or mean.
        fresh: its tables are untrained: maps start at random, as ``nn.Linear`` does. For trained tables that
            would undo what they have learnt.

    Attributes:
        maps: ``maps.{name}``, an ``nn.Linear`` of the feature's ``embedding_dim``: the identity and no bias
            at first, so that nothing changes until something is learnt, unless ``fresh``.

    Raises:
        ValueError: a feature with a table pools by maximum.
    """

    def __init__(self, collection: EmbeddingBagCollection, fresh: bool = False) -> None:
        collection = collection.fold()
        super().__init__(collection.features, collection.sparse, device="meta", options=collection.options)
        for part in PARTS:
            self._modules[part.container] = collection._modules[part.container]
        self.maps = nn.ModuleDict()
        self._blocks: list[int] = []  # widths of the output's blocks: the parts of each feature
        self._by_dim: dict[int, list[tuple[str, int, int]]] = {}  # dim -> (name, feature, block) of tables
        for position, f in enumerate(self.features):
            for part in f.parts:
                self._blocks.append(f.embedding_dim)
                if part is not TABLE:
                    continue
                if f.mode == "max":
                    raise ValueError(f"feature {f.name!r}: a map does not commute with mode 'max'")
                weight = self.tables._modules[f.name].weight
                self.maps._modules[f.name] = _map_for(weight, fresh)
                self._by_dim.setdefault(f.embedding_dim, []).append((f.name, position, len(self._blocks) - 1))
        self.train(collection.training)

    def forward(
        self,
        indices: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        if offsets is None:
            return embed_alone(self, indices, per_sample_weights, out=out)
        pooled = super().forward(indices, offsets, per_sample_weights)
        ones = pooled_ones(offsets, per_sample_weights, [f.mode for f in self.features], pooled.dtype)
        blocks = list(pooled.split(self._blocks, dim=1))
        for tables in self._by_dim.values():
            names, positions, columns = zip(*tables, strict=True)
            weights, biases = zip(*map(self._map, names), strict=True)
            weight = torch.stack(weights).transpose(1, 2)  # [G, D, D]
            bias = torch.stack(biases)[:, None]  # [G, 1, D]
            rows = torch.stack([blocks[column] for column in columns])  # [G, B, D]
            mapped = torch.baddbmm(ones[list(positions), :, None] * bias, rows, weight)
            for column, block in zip(columns, mapped, strict=True):
                blocks[column] = block
        return write_to(out, torch.cat(blocks, dim=1))

    def _map(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight ``[D, D]`` and bias ``[D]`` of a feature's map."""
        linear = self.maps._modules[name]
        if run_as_modules([linear]):
            raise TypeError(
                f"maps: feature {name!r}: expected an nn.Linear with a bias and without hooks, because it is "
                f"applied after pooling and never called, got {type(linear).__name__} with less or more"
            )
        recompute(linear)
        return linear.weight, linear.bias

    @torch.no_grad()
    def fold(self) -> EmbeddingBagCollection:
        """The same function of the IDs, to rounding, with plain tables; decoders are shared with this one.

        Its tables are new tensors: training may go on. Hooks of this one are run by the folded one.
        """
        plain = EmbeddingBagCollection(self.features, self.sparse, device="meta", options=self.options)
        for part in PARTS:
            if part is not TABLE:
                plain._modules[part.container] = self._modules[part.container]
        for name in self.maps._modules:
            refuse_more(self.tables._modules[name], f"tables: feature {name!r}")
            rows = nn.functional.linear(self.tables._modules[name].weight, *self._map(name))
            plain.tables._modules[name].weight = nn.Parameter(rows)
        share_hooks(self, plain)
        return plain.train(self.training)


def _map_for(weight: Tensor, fresh: bool) -> nn.Linear:
    """The map of rows like ``weight`` ``[N, D]``."""
    dim, like = weight.shape[1], {"device": weight.device, "dtype": weight.dtype}
    if fresh:
        return nn.Linear(dim, dim, **like)
    linear = nn.Linear(dim, dim, device="meta")  # draws no random numbers
    linear.weight = nn.Parameter(torch.eye(dim, **like))
    linear.bias = nn.Parameter(torch.zeros(dim, **like))
    return linear


def pooled_ones(
    offsets: Tensor, per_sample_weights: Tensor | None, modes: list[str], dtype: torch.dtype
) -> Tensor:
    """What pooling makes of rows of one: ``[F, B]``, the factor of a bias that every row has in common.

    ``offsets`` ``[F * B + 1]`` and ``per_sample_weights`` ``[n]`` are a batch's; ``modes`` are the features',
    ``"sum"`` or ``"mean"``. A mean is over the number of IDs, also where they are weighted.
    """
    lengths = offsets.diff().unflatten(0, (len(modes), -1))
    counts = lengths.to(dtype)
    if per_sample_weights is None:
        total = counts
    else:
        bags = torch.repeat_interleave(lengths.flatten(), output_size=per_sample_weights.shape[0])
        zeros = per_sample_weights.new_zeros(lengths.numel(), dtype=dtype)
        total = zeros.index_add(0, bags, per_sample_weights.to(dtype)).view_as(counts)
    if "mean" not in modes:
        return total
    mean = torch.tensor([MODES[mode] == MODES["mean"] for mode in modes], device=offsets.device)[:, None]
    return torch.where(mean, total / counts.clamp(min=1), total)


def folded(model: nn.Module) -> nn.Module:
    """The model with every :class:`MappedEmbeddingBagCollection` in it folded: itself if there is none, else
    a twin that shares all other modules and parameters. What to save, quantise and serve.
    """
    if isinstance(model, MappedEmbeddingBagCollection):
        return model.fold()
    children = {name: child and folded(child) for name, child in model._modules.items()}
    if all(children[name] is child for name, child in model._modules.items()):
        return model
    twin = copy.copy(model)
    twin._modules = children
    return twin
