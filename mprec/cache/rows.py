"""Row caches before decoders: what both cached modules are made of."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mprec._native import CachedDecoders, RowCache, WeightWatch
from mprec.bags import Bags
from mprec.cache.budget import Counts, hottest
from mprec.cache.codebook import Codebook
from mprec.layers import does_more
from mprec.nn import DeepHashEmbeddingBag
from mprec.ops._decoders import Decoder, clear_decoders, packable, packed_decoder, places_of, places_of_member
from mprec.ops.pooling import decode, try_cached

__all__ = ["CacheStats", "Cached", "RowStats", "Rows"]

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


class Rows:
    """The row caches of some decoders that one native call reads.

    The caches belong to a generation of weights. When a watched weight has changed, the next call forgets all
    rows (in constant time) and packs the decoders anew; rows that another thread still computes with the old
    weights stay invisible to the new generation.
    """

    def __init__(
        self,
        members: dict[str, DeepHashEmbeddingBag],
        names: Sequence[str],
        budgets: Mapping[str, int],
        positions: Sequence[int],
        columns: Sequence[int],
        num_features: int,
        admit: bool,
        watch: bool,
        codebooks: Mapping[str, Codebook],
    ) -> None:
        self._members, self._names = members, tuple(names)
        self.admit = admit
        self._codebooks = codebooks
        self._budgets = dict(budgets)
        self._layout = list(positions), list(columns), num_features
        self._watches = watch
        self._reset()
        self._bind(None)  # codebooks are those of the weights as they are now

    @property
    def modules(self) -> dict[str, DeepHashEmbeddingBag]:
        """By feature, as they are now."""
        return {name: self._members[name] for name in self._names}

    def _reset(self) -> None:
        self.caches: dict[str, RowCache | None] = {}
        self._lock = threading.Lock()
        self._native: CachedDecoders | None = None  # until it is made
        self._handles: dict[str, Decoder] = {}
        self._past = dict.fromkeys(_COUNTERS, 0)

    def __getstate__(self) -> dict:
        """Without rows: a copy begins with empty caches of the same sizes."""
        made = ("caches", "_lock", "_native", "_handles", "_past")
        state = {name: value for name, value in self.__dict__.items() if name not in made}
        if self._native is not None and self._native.stale(1 << 20):
            state["_codebooks"] = {}  # of past weights
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()  # bound at the first call: the modules may not be complete yet

    def forward(
        self, bags: Bags, bound: int | None, out: Tensor | None, threads: int | None = None
    ) -> Tensor | None:
        """The pooled vectors in ``out``, or a new tensor; ``bound``: IDs are to be below, or None.

        None for what native code does not take."""
        native = self._native
        while native is not None or (native := self._bind(None)) is not None:
            result = try_cached(native, bags, bound, out, self.admit, threads)
            if result is not False:
                return result
            native = self._bind(native)
        return None

    @property
    def native(self) -> CachedDecoders | None:
        """The decoders behind their caches, as they were last bound."""
        return self._native

    def bound(self) -> CachedDecoders | None:
        """The same, bound again if a watched weight has changed. None as :meth:`forward` says."""
        native = self._native
        return self._bind(native) if native is None or native.stale(1 << 20) else native

    def places(self) -> list[tuple[dict, str]]:
        """Where :attr:`native` and what belongs to it stand: not the weights, which it watches itself."""
        return [(self.__dict__, "_native"), (self.__dict__, "admit")]

    def _bind(self, stale) -> CachedDecoders | None:
        """Packs the decoders as they are now, under a new generation. None if they cannot be watched or
        packed now: layers that are parametrised or pruned, say."""
        with self._lock:
            if self._native is not stale:
                return self._native  # another thread did
            # The watch first: a change while the decoders are packed must not be missed.
            modules = self.modules
            # Those that do more than their weights say have no rows to keep: they are called. Hooks of a
            # module that has this cache itself, under no name, run around this.
            called = any((name and does_more(m)) or m.runs_layers() for name, m in modules.items())
            watch = WeightWatch.of(self._places()) if self._watches and not called else None
            stacks = [] if called else [module.stack() for module in modules.values()]
            if stale is not None:
                for key, value in stale.stats().items():
                    self._past[key] += value
                self._codebooks = {}  # of past weights
            if called or (self._watches and watch is None) or not all(packable(*stack) for stack in stacks):
                self._native = None
                return None
            handles = []
            with torch.no_grad():
                for module, stack in zip(modules.values(), stacks, strict=True):
                    kind = module.config
                    handles.append(
                        packed_decoder(
                            *stack, kind.family, kind.activation, kind.last_activation, thorough=True
                        )
                    )
            if not self.caches:
                self.caches = {
                    name: RowCache(module.embedding_dim, self._budgets[name])
                    if self._budgets.get(name)
                    else None
                    for name, module in modules.items()
                }
            for cache in self.caches.values():
                if cache is not None:
                    cache.invalidate()
            books = [self._codebooks.get(name) for name in modules]
            self._native = CachedDecoders(
                handles,
                list(self.caches.values()),
                *self._layout,
                watch,
                [None if book is None else (book.codes, book.centroids) for book in books],
            )
            self._handles = dict(zip(modules, handles, strict=True))
            return self._native

    def _places(self) -> list[tuple[dict, str | None]]:
        places: list[tuple[dict, str | None]] = []
        for name, module in self.modules.items():
            places.append((self._members, name))
            places += places_of_member(module) if name else places_of(module)
        return places

    def invalidate(self) -> None:
        """After :func:`clear_decoders`."""
        self._bind(self._native)

    def fill(self, name: str, ids: Tensor) -> int:
        """Decodes and stores IDs, the hottest first, while there is room; returns how many are held."""
        if self._native is None and self._bind(None) is None:
            return 0
        cache = self.caches[name]
        if cache is None:
            return 0
        handle, generation = self._handles[name], cache.generation
        ids = ids[: cache.capacity].to(torch.int64).contiguous()
        for part in ids.split(_CHUNK):
            rows = torch.empty(len(part), cache.dim, dtype=torch.float32)
            decode(handle, part, rows)
            cache.fill(part, rows, generation)
        return len(cache)

    def held(self, name: str) -> Tensor:
        cache = self.caches.get(name)
        out = torch.empty(0 if cache is None else cache.capacity, dtype=torch.int64)
        return out if cache is None else out[: cache.ids(out)]

    def stats(self) -> dict[str, RowStats]:
        return {
            name: RowStats(**cache.stats(), rows=len(cache), capacity=cache.capacity, nbytes=cache.nbytes)
            for name, cache in self.caches.items()
            if cache is not None
        }

    def times(self) -> dict[str, int]:
        now = {} if self._native is None else self._native.stats()
        return {key: past + now.get(key, 0) for key, past in self._past.items()}


class Cached:
    """What both cached modules offer; ``_rows`` are their parts."""

    _rows: list[Rows]

    def invalidate(self) -> None:
        """Forget all rows, in constant time. Changed weights do this by themselves, unless ``watch=False``;
        but writes through ``.data``, NumPy or DLPack, which raise no version counter, may go unnoticed until
        some 2048 IDs have been looked up: call this after such."""
        clear_decoders()  # once: what is bound after that is current
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
