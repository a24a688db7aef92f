"""IDs that training never saw, answered with their feature's mean."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mprec.nn.collection import EmbeddingBagCollection
from mprec.nn.keyed import embed_alone
from mprec.ops._checks import check_id_list
from mprec.tensors import as_ids
from mprec.tracing import eager


class MeanForUnseen(nn.Module):
    """A collection in which an ID that was not seen in training has its feature's mean vector.

    An untrained row of a table, or what a decoder makes of a hash it was never trained on, is noise to the
    rest of the model; the mean of the IDs that were seen is its best guess. IDs beyond the vocabulary count
    as unseen, also for tables. Wraps any collection (quantised and cached ones too) and stands in for it, in
    evaluation and serving::

        model.embeddings = MeanForUnseen(model.embeddings, {"user": train_user_ids, ...})

    An unseen ID is looked up as one seen ID of its feature, and the difference of the mean to that one's
    vector is added to its bag: so a feature's unseen IDs cost one decoded ID in all.

    Made on the meta device (or moved there), it waits for a state_dict, which holds what was seen.

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
        cpu = {"device": "cpu"}  # whatever torch.device is in force
        for name, feature in features.items():
            size, proxy = 0, -1
            if name in seen:
                ids = torch.as_tensor(seen[name], **cpu).to(torch.int64).flatten().unique()
                if feature.mode == "max":
                    raise ValueError(f"seen: feature {name!r} is pooled by maximum")
                if not len(ids):
                    raise ValueError(f"seen: feature {name!r} has no seen ID")
                check_id_list(ids, feature.num_embeddings, f"seen[{name!r}]")
                size, proxy = feature.num_embeddings, int(ids[0])
                mask = torch.zeros(size, dtype=torch.bool, **cpu)
                masks.append(mask.index_fill_(0, ids, True))
            sizes.append(size)
            proxies.append(proxy)
        sizes = torch.tensor(sizes, **cpu)
        # One bitmap for all features; feature f's starts at starts[f].
        nothing = torch.zeros(0, dtype=torch.bool, **cpu)
        self.register_buffer("known", torch.cat(masks) if masks else nothing)
        self.register_buffer("starts", sizes.cumsum(0) - sizes)
        self.register_buffer("sizes", sizes)
        self.register_buffer("averaged", self._averaged(), persistent=False)
        self.register_buffer("proxies", torch.tensor(proxies, **cpu))
        self.register_buffer("corrections", torch.zeros(len(features), sum(collection.output_dims), **cpu))
        self.to(next(collection.buffers(), next(collection.parameters(), self.known)).device)
        if not self.known.is_meta:
            self.refresh()

    def _averaged(self) -> Tensor:
        """Which features pool by the mean."""
        return torch.tensor([f.mode == "mean" for f in self.collection.features], device="cpu")

    def _apply(self, fn, recurse=True):
        was_meta = self.averaged.is_meta
        super()._apply(fn, recurse)
        if was_meta and not self.averaged.is_meta:  # to_empty: no state_dict has it
            self.averaged.copy_(self._averaged())
        return self

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

    def forward(
        self, indices: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """As the collection's: ``indices`` ``[n]``, offsets ``[F * B + 1]`` to ``[B, sum(output_dims)]``."""
        if offsets is None:
            return embed_alone(self, indices, per_sample_weights)
        watched = indices.is_meta or not eager()  # a compiler cannot look at values
        if not watched:
            indices, offsets = as_ids(indices, "indices"), as_ids(offsets, "offsets")
        if not self.known.numel() or not self._is_batch(indices, offsets, watched):
            return self.collection(indices, offsets, per_sample_weights)
        count, bags = len(self.features), offsets.shape[0] - 1
        lengths = offsets.diff()
        every = torch.arange(bags, device=indices.device)
        bag = torch.repeat_interleave(every, lengths, output_size=indices.shape[0])
        feature = bag // (bags // count)
        sizes = self.sizes[feature]
        inside = (indices >= 0) & (indices < sizes)
        place = torch.where(inside, indices + self.starts[feature], 0)
        unseen = (sizes > 0) & (indices >= 0) & ~(inside & self.known[place])
        if not watched and not bool(unseen.any()):
            return self.collection(indices, offsets, per_sample_weights)
        indices = torch.where(unseen, self.proxies[feature].to(indices.dtype), indices)
        out = self.collection(indices, offsets, per_sample_weights)

        # How much of each bag is unseen, [F, B]: so much of the difference of the mean to the proxy it gets.
        share = unseen.to(self.corrections.dtype)
        if per_sample_weights is not None:
            share = share * per_sample_weights.to(share.dtype)
        share = share.new_zeros(bags).index_add(0, bag, share).view(count, -1)
        of_bag = lengths.view(count, -1).clamp(min=1)
        share = torch.where(self.averaged[:, None], share / of_bag, share)
        return out + (share.T @ self.corrections).to(out.dtype)

    def _is_batch(self, indices: Tensor, offsets: Tensor, watched: bool) -> bool:
        """Whether the indices belong to features; if not, the collection will object, or has nothing to do.
        ``watched``: only by shapes and types; operators check the rest when they run."""
        count, bags = len(self.features), offsets.shape[0] - 1 if offsets.dim() == 1 else -1
        if indices.dim() != 1 or bags < 0 or bags % count:
            return False
        if indices.is_floating_point() or offsets.is_floating_point():
            return False
        if watched:
            return True
        if not bags or not len(indices):
            return False
        lengths = offsets.diff()
        return int(lengths.min()) >= 0 and int(lengths.sum()) == len(indices)

    def extra_repr(self) -> str:
        parts = []
        for f, feature in enumerate(() if self.known.is_meta else self.features):
            if self.sizes[f]:
                first = int(self.starts[f])
                seen = int(self.known[first : first + feature.num_embeddings].sum())
                parts.append(f"{feature.name}: {seen:,} of {feature.num_embeddings:,} IDs seen")
        return "; ".join(parts)
