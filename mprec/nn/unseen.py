"""IDs that training never saw, answered with their feature's mean."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mprec.nn.collection import EmbeddingBagCollection
from mprec.nn.keyed import embed_keyed
from mprec.ops._checks import check_id_list


class MeanForUnseen(nn.Module):
    """A collection in which an ID that was not seen in training has its feature's mean vector.

    An untrained row of a table, or what a decoder makes of a hash it was never trained on, is noise to the
    rest of the model; the mean of the IDs that were seen is its best guess. IDs beyond the vocabulary count
    as unseen, also for tables. Wraps any collection (quantised and cached ones too) and stands in for it, in
    evaluation and serving::

        model.embeddings = MeanForUnseen(model.embeddings, {"user": train_user_ids, ...})

    An unseen ID is looked up as one seen ID of its feature, and the difference of the mean to that one's
    vector is added to its bag: so a feature's unseen IDs cost one decoded ID in all.

    Args:
        collection: serves the calls; shared, not copied.
        seen: for each feature to treat so, the IDs that training saw (int64 or int32, repeats allowed).
            Others stay as they are.

    Raises:
        ValueError: an unknown feature, no seen ID, or pooling by maximum (which has no such sum).
        IdOutOfRangeError: a seen ID is not one of the feature's.
    """

    known: Tensor
    starts: Tensor
    averaged: Tensor
    sizes: Tensor
    proxies: Tensor
    corrections: Tensor

    def __init__(self, collection: EmbeddingBagCollection, seen: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.collection = collection
        features = {f.name: f for f in collection.features}
        if unknown := sorted(set(seen) - set(features)):
            raise ValueError(f"seen: no feature {unknown[0]!r}; there are {', '.join(features)}")
        sizes, proxies, masks = [], [], []
        for name, feature in features.items():
            size, proxy = 0, -1
            if name in seen:
                ids = torch.as_tensor(seen[name]).to(torch.int64).flatten().unique()
                if feature.mode == "max":
                    raise ValueError(f"seen: feature {name!r} is pooled by maximum")
                if not len(ids):
                    raise ValueError(f"seen: feature {name!r} has no seen ID")
                check_id_list(ids, feature.num_embeddings, f"seen[{name!r}]")
                size, proxy = feature.num_embeddings, int(ids[0])
                mask = torch.zeros(size, dtype=torch.bool)
                masks.append(mask.index_fill_(0, ids, True))
            sizes.append(size)
            proxies.append(proxy)
        sizes = torch.tensor(sizes)
        # One bitmap for all features; feature f's starts at starts[f].
        self.register_buffer("known", torch.cat(masks) if masks else torch.zeros(0, dtype=torch.bool))
        self.register_buffer("starts", sizes.cumsum(0) - sizes)
        self.register_buffer("sizes", sizes)
        averaged = [feature.mode == "mean" for feature in collection.features]
        self.register_buffer("averaged", torch.tensor(averaged), persistent=False)
        self.register_buffer("proxies", torch.tensor(proxies))
        self.register_buffer("corrections", torch.zeros(len(features), sum(collection.output_dims)))
        self.to(next(collection.buffers(), next(collection.parameters(), self.known)).device)
        self.refresh()

    @property
    def features(self):
        return self.collection.features

    @property
    def output_dims(self) -> list[int]:
        return self.collection.output_dims

    @torch.no_grad()
    def refresh(self, chunk: int = 16384) -> None:
        """Compute the means again, after the collection's weights have changed."""
        self.corrections.zero_()
        count, columns = len(self.features), 0
        for f, feature in enumerate(self.features):
            begin, end = columns, columns + feature.output_dim
            columns = end
            if self.proxies[f] < 0:
                continue
            first = int(self.starts[f])
            ids = self.known[first : first + feature.num_embeddings].nonzero()[:, 0]
            total = torch.zeros(feature.output_dim, dtype=torch.float64, device=ids.device)
            for part in ids.split(chunk):
                total += self._vectors(f, part, count)[:, begin:end].sum(0, dtype=torch.float64)
            proxy = self._vectors(f, self.proxies[f : f + 1], count)[0, begin:end]
            self.corrections[f, begin:end] = (total / len(ids) - proxy).to(self.corrections.dtype)

    def _vectors(self, feature: int, ids: Tensor, count: int) -> Tensor:
        """The collection's output for bags of one ID of one feature, the other features' bags empty."""
        offsets = torch.zeros(count * len(ids) + 1, dtype=torch.int64, device=ids.device)
        offsets[feature * len(ids) : (feature + 1) * len(ids)] = torch.arange(len(ids), device=ids.device)
        offsets[(feature + 1) * len(ids) :] = len(ids)
        return self.collection(ids, offsets)

    @torch.compiler.disable
    def forward(
        self, indices: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """As the collection's: ``indices`` ``[n]``, offsets ``[F * B + 1]`` to ``[B, sum(output_dims)]``."""
        if offsets is None:
            return embed_keyed(self, indices)
        feature = self._feature_of_each(indices, offsets)
        if feature is None:  # nothing to do, or something that the collection will object to
            return self.collection(indices, offsets, per_sample_weights)
        sizes = self.sizes[feature]
        inside = (indices >= 0) & (indices < sizes)
        place = torch.where(inside, indices + self.starts[feature], 0)
        unseen = ((sizes > 0) & (indices >= 0) & ~(inside & self.known[place])).nonzero()[:, 0]
        if not len(unseen):
            return self.collection(indices, offsets, per_sample_weights)
        feature = feature[unseen]
        indices = indices.clone()
        indices[unseen] = self.proxies[feature].to(indices.dtype)
        out = self.collection(indices, offsets, per_sample_weights)

        bag = torch.searchsorted(offsets, unseen.to(offsets.dtype), right=True) - 1
        share = out.new_ones(len(unseen))
        if per_sample_weights is not None:
            share = share * per_sample_weights[unseen].to(share.dtype)
        share = torch.where(self.averaged[feature], share / (offsets[bag + 1] - offsets[bag]), share)
        batch = (offsets.shape[0] - 1) // len(self.features)
        return out.index_add(0, bag % batch, self.corrections[feature].to(out.dtype) * share[:, None])

    def _feature_of_each(self, indices: Tensor, offsets: Tensor) -> Tensor | None:
        """The feature of each index, ``[n]``; None for a batch without indices or that is not valid."""
        count, bags = len(self.features), offsets.shape[0] - 1 if offsets.dim() == 1 else -1
        if indices.dim() != 1 or not len(indices) or bags < 1 or bags % count or not len(self.known):
            return None
        if indices.is_floating_point() or offsets.is_floating_point():
            return None
        lengths = offsets[:: bags // count].diff()
        if int(lengths.min()) < 0 or int(lengths.sum()) != len(indices):
            return None
        return torch.repeat_interleave(torch.arange(count, device=indices.device), lengths)

    def extra_repr(self) -> str:
        parts = []
        for f, feature in enumerate(self.features):
            if self.sizes[f]:
                first = int(self.starts[f])
                seen = int(self.known[first : first + feature.num_embeddings].sum())
                parts.append(f"{feature.name}: {seen:,} of {feature.num_embeddings:,} IDs seen")
        return "; ".join(parts)
