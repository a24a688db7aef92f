"""MP-Cache's encoder stage: a cache of hot IDs' rows in front of the decoder."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mprec.bags import Bags
from mprec.cache.budget import Counts, hottest, split_budget
from mprec.cache.codebook import Codebook
from mprec.cache.rows import Cached, Rows
from mprec.nn import DeepHashEmbeddingBag, EmbeddingBagCollection
from mprec.representations import PARTS

__all__ = ["CachedDeepHashEmbeddingBag", "CachedEmbeddingBagCollection"]


def _check_cacheable(name: str, module: DeepHashEmbeddingBag) -> None:
    for tensor in (module.coefficients, *module.weights, *module.biases):
        if not tensor.is_cpu or (tensor.dtype is not torch.float32 and tensor is not module.coefficients):
            raise ValueError(
                f"{name}: the cache takes float32 decoders on the CPU, got {tensor.dtype} on {tensor.device}"
            )
        if tensor.is_inference():
            raise ValueError(
                f"{name}: weights made under torch.inference_mode carry no version counter, so a cache "
                "could not tell when they change"
            )


def _book(codebook: Codebook | None) -> dict[str, Codebook]:
    return {} if codebook is None else {"": codebook}


class CachedDeepHashEmbeddingBag(Cached, DeepHashEmbeddingBag):
    """A :class:`mprec.nn.DeepHashEmbeddingBag` with rows of hot IDs before its decoder.

    Shares the parameters of ``bag`` and stands in for it: same calls, same state_dict, same results (in the
    last bits: the decoder adds in another order for a handful of IDs than for many). The cache serves calls
    without gradients, on the CPU, in float32; others run as in ``bag``. Safe for concurrent calls.

    Args:
        bag: the module to speed up.
        nbytes: the cache's memory in bytes, everything counted; see ``RowCache.bytes_for``.
        admit: let IDs that are looked up often enough replace others. Otherwise only :meth:`fill` stores
            rows.
        watch: compare the weights' version counters, addresses and some of their bytes at each call (about
            0.2 microseconds a tensor), so that no row outlives the weights it was made with; of writes
            through ``.data``, NumPy or DLPack see :meth:`invalidate`. Without, call that after any change.
        codebook: of rows 0, 1, …: a miss among these is answered by its code instead of the decoder, with the
            codebook's error, and only :meth:`fill` stores exact rows of them. Dropped when weights change.

    Raises:
        ValueError: ``nbytes`` too small for a single row, weights not float32 on the CPU.
    """

    def __init__(
        self,
        bag: DeepHashEmbeddingBag,
        nbytes: int,
        *,
        admit: bool = True,
        watch: bool = True,
        codebook: Codebook | None = None,
    ) -> None:
        super().__init__(
            bag.embedding_dim,
            bag.config,
            bag.mode,
            bag.include_last_offset,
            bag.padding_idx,
            bag.num_embeddings,
            device="meta",
        )
        _check_cacheable("bag", bag)
        self.register_buffer("coefficients", bag.coefficients)
        self.decoder = bag.decoder
        # Under a name of its own: nn.Module would register the bag as a child.
        self._rows = [Rows({"": self}, [""], {"": nbytes}, [0], [0], 1, admit, watch, _book(codebook))]

    def _forward_direct(self, bags: Bags) -> Tensor | None:
        return self._rows[0].forward(bags, self.num_embeddings, None)

    def fill(self, counts: Counts) -> int:
        """Decode and store the most frequent IDs, as many as there is room for; returns how many are held."""
        return self._fill({"": counts})[""]


class CachedEmbeddingBagCollection(Cached, EmbeddingBagCollection):
    """A :class:`mprec.nn.EmbeddingBagCollection` with rows of hot IDs before its decoders.

    Shares the parameters of ``collection`` and stands in for it: same calls, same state_dict, same results
    but for the last bits (the decoder adds in another order for a handful of IDs than for many)::

        model.embeddings = CachedEmbeddingBagCollection(model.embeddings, nbytes=8 << 20, counts=counts)

    The cache serves calls without gradients, on the CPU, in float32; others run as in ``collection``. Tables
    are read as ever. Safe for concurrent calls.

    Args:
        collection: the module to speed up.
        nbytes: memory in bytes, everything counted: of all caches together, or of each feature's.
        counts: how often each feature's IDs were seen in training data. With them, the bytes go where they
            save most (:func:`split_budget`) and the caches start filled.
        admit, watch: as for :class:`CachedDeepHashEmbeddingBag`.
        codebooks: of some features, as ``codebook`` there: the second stage, for what misses the first.

    :func:`mprec.nn.tune_options` also measures at which batch sizes the caches pay, if it is given
    batches as they are going to come.

    Raises:
        ValueError: no deep hash embedding to cache, unknown feature names, budgets too small for a row, or
            weights that are not float32 on the CPU.
    """

    has_cache = True

    def __init__(
        self,
        collection: EmbeddingBagCollection,
        nbytes: int | Mapping[str, int],
        counts: Mapping[str, Counts] | None = None,
        *,
        admit: bool = True,
        watch: bool = True,
        codebooks: Mapping[str, Codebook] | None = None,
    ) -> None:
        collection = collection.fold()
        super().__init__(collection.features, collection.sparse, device="meta")
        for part in PARTS:
            self._modules[part.container] = collection._modules[part.container]
        hashed = {f.name: f for f in self.features if f.has_dhe}
        if not hashed:
            raise ValueError("collection: has no deep hash embedding to cache")
        for name in hashed:
            _check_cacheable(name, self.dhe._modules[name])
        codebooks = dict(codebooks or {})
        if unknown := sorted(set(codebooks) - set(hashed)):
            raise ValueError(
                f"codebooks: no deep hash embedding {unknown[0]!r}; there are {', '.join(hashed)}"
            )
        if isinstance(nbytes, Mapping):
            if unknown := sorted(set(nbytes) - set(hashed)):
                raise ValueError(
                    f"nbytes: no deep hash embedding {unknown[0]!r}; there are {', '.join(hashed)}"
                )
            budgets = dict(nbytes)
        else:
            hot = {name: hottest(c, f"counts[{name!r}]") for name, c in (counts or {}).items()}
            budgets = split_budget(
                nbytes,
                {name: f.embedding_dim for name, f in hashed.items()},
                {name: f.num_embeddings for name, f in hashed.items()},
                hot,
                {name: f.dhe.num_parameters(f.embedding_dim) for name, f in hashed.items()},
            )
            if not any(budgets.values()):
                raise ValueError(f"nbytes: {nbytes} is too little for a cache of any feature")
        self._rows = [
            Rows(
                self.dhe._modules,
                group.names,
                budgets,
                group.features,
                group.columns,
                len(self.features),
                admit,
                watch,
                codebooks,
            )
            for group in self._dhe_groups
        ]
        self._rows_of = {
            group.names[0]: rows for group, rows in zip(self._dhe_groups, self._rows, strict=True)
        }
        if counts:
            self.fill(counts)

    def fill(self, counts: Mapping[str, Counts]) -> dict[str, int]:
        """Decode and store features' most frequent IDs, as many as there is room for; returns how many each
        cache holds then. ``counts``: see :data:`mprec.cache.budget.Counts`."""
        return self._fill(counts)

    def cached_groups(self) -> list[tuple[Rows, list[int], int]]:
        """The decoders that one native call reads: their caches, the first column of each, and the pooling
        mode."""
        return [(self._rows_of[group.names[0]], group.columns, group.mode_code) for group in self._dhe_groups]

    def _run_decoders(self, group, batch: Bags, out, options) -> Tensor | None:
        if options.cache is not False:
            rows = self._rows_of[group.names[0]]
            served = rows.forward(batch._replace(mode=group.mode_code), None, out, options.threads)
            if served is not None:
                return served
        return super()._run_decoders(group, batch, out, options)
