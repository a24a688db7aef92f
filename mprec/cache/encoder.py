"""The encoder stage: rows of hot IDs before the decoder."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mprec._native import _C
from mprec.cache.budget import Counts, hottest, split_budget
from mprec.cache.codebook import Codebook
from mprec.names import MODES
from mprec.nn import DeepHashEmbeddingBag, EmbeddingBagCollection
from mprec.nn.deep_hash import check_bound
from mprec.ops._common import direct
from mprec.ops._decoders import decoder

__all__ = [
    "CacheStats",
    "CachedDeepHashEmbeddingBag",
    "CachedEmbeddingBagCollection",
    "RowStats",
    "materialize",
]

_COUNTERS = ("calls", "coded", "decoded", "lookup_ns", "decode_ns")
_CHUNK = 1 << 14  # IDs decoded at a time when a cache is filled


@dataclass(frozen=True)
class RowStats:
    """One feature's cache. ``hits`` and ``misses`` count IDs asked for, repeated ones each time."""

    hits: int
    misses: int
    admissions: int  #: rows stored
    evictions: int  #: of those, in place of another
    rejections: int  #: rows turned away: seen too rarely
    rows: int  #: held now
    capacity: int  #: in rows
    nbytes: int  #: everything counted

    @property
    def hit_rate(self) -> float:
        """Share of IDs found; NaN before the first."""
        return self.hits / total if (total := self.hits + self.misses) else float("nan")


@dataclass(frozen=True)
class CacheStats:
    """All features of a cache, and where its time went."""

    features: Mapping[str, RowStats]
    calls: int = 0
    coded: int = 0  #: misses answered by a codebook
    decoded: int = 0  #: IDs that went through a decoder
    lookup_s: float = 0.0
    decode_s: float = 0.0  #: decoding, and storing what was decoded

    @property
    def nbytes(self) -> int:
        return sum(feature.nbytes for feature in self.features.values())

    @property
    def hit_rate(self) -> float:
        hits = sum(feature.hits for feature in self.features.values())
        total = hits + sum(feature.misses for feature in self.features.values())
        return hits / total if total else float("nan")


class _Rows:
    """The row caches of some decoders that one native call reads.

    The caches belong to a generation of weights. When a watched weight has changed, the next call forgets all
    rows (in constant time) and packs the decoders anew; rows that another thread still computes with the old
    weights stay invisible to the new generation.
    """

    def __init__(
        self,
        modules: Mapping[str, DeepHashEmbeddingBag],
        budgets: Mapping[str, int],
        positions: Sequence[int],
        columns: Sequence[int],
        num_features: int,
        admit: bool,
        watch: bool,
        codebooks: Mapping[str, Codebook],
    ) -> None:
        self.modules = modules
        self.admit = admit
        self._codebooks = codebooks
        self.caches = {
            name: _C.RowCache(module.embedding_dim, budgets[name]) if budgets.get(name) else None
            for name, module in modules.items()
        }
        self._layout = list(positions), list(columns), num_features
        self._watches = watch
        self._lock = threading.Lock()
        self._native: _C.CachedDecoders | None = None  # while it is made
        self._past = dict.fromkeys(_COUNTERS, 0)
        self._bind(None)  # codebooks are those of the weights as they are now

    def forward(self, indices, offsets, per_sample_weights, mode, include_last_offset, padding_idx, out):
        arguments = (
            indices,
            offsets,
            per_sample_weights,
            mode,
            include_last_offset,
            padding_idx,
            out,
            self.admit,
            torch.get_num_threads(),
        )
        native = self._native
        while not native.forward(*arguments):
            native = self._bind(native)
        return out

    def _bind(self, stale) -> "_C.CachedDecoders":
        """Packs the decoders as they are now, under a new generation."""
        with self._lock:
            if self._native is not stale:
                return self._native  # another thread did
            # The watch first: a change while the decoders are packed must not be missed.
            watch = _C.WeightWatch(_places(self.modules.values())) if self._watches else None
            handles = []
            with torch.no_grad():
                for module in self.modules.values():
                    kind = module.config
                    handles.append(
                        decoder(*module.stack(), kind.family, kind.activation, kind.last_activation)
                    )
            for cache in self.caches.values():
                if cache is not None:
                    cache.invalidate()
            if stale is not None:
                for key, value in stale.stats().items():
                    self._past[key] += value
            if stale is not None:
                self._codebooks = {}  # of past weights
            books = [self._codebooks.get(name) for name in self.modules]
            self._native = _C.CachedDecoders(
                handles,
                list(self.caches.values()),
                *self._layout,
                watch,
                [None if book is None else (book.codes, book.centroids) for book in books],
            )
            self._handles = dict(zip(self.modules, handles, strict=True))
            return self._native

    def invalidate(self) -> None:
        self._bind(self._native)

    def fill(self, name: str, ids: Tensor) -> int:
        """Decodes and stores IDs, the hottest first, while there is room; returns how many are held."""
        cache = self.caches[name]
        if cache is None:
            return 0
        handle, generation = self._handles[name], cache.generation
        ids = ids[: cache.capacity].to(torch.int64).contiguous()
        for part in ids.split(_CHUNK):
            rows = torch.empty(len(part), cache.dim)
            starts = torch.arange(len(part))
            _C.dhe_bag(handle, part, starts, None, 0, False, -1, rows, torch.get_num_threads())
            cache.fill(part, rows, generation)
        return len(cache)

    def held(self, name: str) -> Tensor:
        cache = self.caches[name]
        out = torch.empty(0 if cache is None else cache.capacity, dtype=torch.int64)
        return out if cache is None else out[: cache.ids(out)]

    def stats(self) -> dict[str, RowStats]:
        return {
            name: RowStats(**cache.stats(), rows=len(cache), capacity=cache.capacity, nbytes=cache.nbytes)
            for name, cache in self.caches.items()
            if cache is not None
        }

    def times(self) -> dict[str, int]:
        now = self._native.stats()
        return {key: past + now[key] for key, past in self._past.items()}


def _book(codebook: Codebook | None) -> dict[str, Codebook]:
    return {} if codebook is None else {"": codebook}


def _places(modules) -> list[tuple[dict, str]]:
    """Where modules keep what their decoders are made of."""
    places = []
    for module in modules:
        places.append((module._buffers, "coefficients"))
        for layer in module.decoder:
            places += [(layer._parameters, "weight"), (layer._parameters, "bias")]
    return places


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


class _Cached:
    """What both cached modules offer; ``_rows`` are their parts."""

    _rows: list[_Rows]

    def invalidate(self) -> None:
        """Forget all rows, in constant time. Changed weights do this by themselves, except changes through
        NumPy views, and any change if ``watch=False``."""
        for rows in self._rows:
            rows.invalidate()

    def refresh(self) -> int:
        """Decode the rows held now with the weights as they are now; returns how many are held then."""
        held = [(rows, name, rows.held(name)) for rows in self._rows for name in rows.modules]
        self.invalidate()
        return sum(rows.fill(name, ids) for rows, name, ids in held)

    def _fill(self, counts: Mapping[str, Counts]) -> dict[str, int]:
        names = {name: rows for rows in self._rows for name in rows.modules}
        for name in counts:
            if name not in names:
                raise ValueError(f"counts: no deep hash embedding {name!r}; there are {', '.join(names)}")
        return {
            name: names[name].fill(name, hottest(counted, f"counts[{name!r}]").ids)
            for name, counted in counts.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all row caches, everything counted."""
        return sum(c.nbytes for rows in self._rows for c in rows.caches.values() if c is not None)

    def stats(self) -> CacheStats:
        """Counters since the start or :meth:`reset_stats`."""
        features: dict[str, RowStats] = {}
        times = dict.fromkeys(_COUNTERS, 0)
        for rows in self._rows:
            features |= rows.stats()
            for key, value in rows.times().items():
                times[key] += value
        return CacheStats(
            features,
            times["calls"],
            times["coded"],
            times["decoded"],
            times["lookup_ns"] / 1e9,
            times["decode_ns"] / 1e9,
        )

    def reset_stats(self) -> None:
        """Set the counters of hits, misses, admissions, evictions and rejections to 0."""
        for rows in self._rows:
            for cache in rows.caches.values():
                if cache is not None:
                    cache.reset_stats()


class CachedDeepHashEmbeddingBag(_Cached, DeepHashEmbeddingBag):
    """A :class:`mprec.nn.DeepHashEmbeddingBag` with rows of hot IDs before its decoder.

    Shares the parameters of ``bag`` and stands in for it: same calls, same state_dict, same results (in the
    last bits: the decoder adds in another order for a handful of IDs than for many). The cache serves calls
    without gradients, on the CPU, in float32; others run as in ``bag``. Safe for concurrent calls.

    Args:
        bag: the module to speed up.
        nbytes: the cache's memory in bytes, everything counted; see ``mprec._C.RowCache.bytes_for``.
        admit: let IDs that are looked up often enough replace others. Otherwise only :meth:`fill` stores
            rows.
        watch: compare version counters and addresses of the weights at each call (about 0.2 microseconds
            a tensor), so that no row outlives the weights it was made with. Without, call
            :meth:`invalidate` after changing them.
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
        self._rows = [_Rows({"": self}, {"": nbytes}, [0], [0], 1, admit, watch, _book(codebook))]

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        if offsets is not None and not torch.is_grad_enabled() and direct(input, offsets, per_sample_weights):
            if self.num_embeddings is not None:
                check_bound(input, self.num_embeddings)
            try:
                out = torch.empty(offsets.shape[0] - self.include_last_offset, self.embedding_dim)
                padding = -1 if self.padding_idx is None else self.padding_idx
                return self._rows[0].forward(
                    input,
                    offsets,
                    per_sample_weights,
                    MODES[self.mode],
                    self.include_last_offset,
                    padding,
                    out,
                )
            except (TypeError, ValueError, RuntimeError):
                pass  # the module takes it, or says what is wrong
        return super().forward(input, offsets, per_sample_weights)

    def fill(self, counts: Counts) -> int:
        """Decode and store the most frequent IDs, as many as there is room for; returns how many are held."""
        return self._fill({"": counts})[""]


class CachedEmbeddingBagCollection(_Cached, EmbeddingBagCollection):
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

    Raises:
        ValueError: no deep hash embedding to cache, unknown feature names, budgets too small for a row, or
            weights that are not float32 on the CPU.
    """

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
        super().__init__(collection.features, collection.sparse, device="meta")
        self.tables, self.dhe = collection.tables, collection.dhe
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
            _Rows(
                {name: self.dhe._modules[name] for name in group.names},
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

    def _run_decoders(self, group, indices, offsets, per_sample_weights, out, options) -> None:
        rows = self._rows_of[group.names[0]]
        rows.forward(indices, offsets, per_sample_weights, group.mode_code, True, -1, out)


@torch.no_grad()
def materialize(
    collection: EmbeddingBagCollection, names: Sequence[str] | None = None
) -> EmbeddingBagCollection:
    """The same function of IDs with tables in place of decoders: exact, and as large as the vocabularies.

    A *dhe* feature becomes a table of its decoded rows; a *hybrid* one a table of twice the width.

    Args:
        names: the features to turn into tables; default: all that have a decoder.

    Raises:
        ValueError: an unknown name.
    """
    hashed = [f.name for f in collection.features if f.has_dhe]
    chosen = set(hashed if names is None else names)
    if unknown := sorted(chosen - set(hashed)):
        raise ValueError(f"names: no deep hash embedding {unknown[0]!r}; there are {', '.join(hashed)}")
    features = [
        replace(f, representation="table", dhe=None, embedding_dim=f.output_dim) if f.name in chosen else f
        for f in collection.features
    ]
    made = EmbeddingBagCollection(features, collection.sparse, device="meta")
    tables: dict[str, Any] = {}
    for f in collection.features:
        if f.name in chosen:
            parts = [collection.dhe._modules[f.name].materialize(f.num_embeddings)]
            if f.has_table:
                parts.insert(0, collection.tables._modules[f.name].weight)
            tables[f"tables.{f.name}.weight"] = torch.cat(parts, dim=1)
    shared = {k: v for k, v in collection.state_dict().items() if k.split(".")[1] not in chosen}
    made.load_state_dict({**shared, **tables}, assign=True)
    return made.requires_grad_(False)
