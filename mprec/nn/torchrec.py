"""Collections with TorchRec's interface, on mprec's kernels.

They take ``torchrec.EmbeddingBagConfig`` s and ``KeyedJaggedTensor`` s and have the names of TorchRec's
parameters, so they stand in for ``torchrec.EmbeddingBagCollection`` and ``torchrec.EmbeddingCollection`` in
models (``torchrec.models.dlrm.DLRM``), and checkpoints go both ways. TorchRec is not imported: anything with
those attributes and methods will do.

TorchRec's own tools look for exactly its classes. ``quantize_inference_model`` leaves these collections in
float32: load their state_dict into TorchRec's collection and quantise that one, or take
:class:`mprec.nn.QuantizedEmbeddingBagCollection`. ``DistributedModelParallel`` treats them as any other
module: every process has all of it, and gradients are averaged.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mprec import ops
from mprec.bags import Bags
from mprec.names import MODES
from mprec.nn.embedding import DeepHashEmbedding, Embedding, LowRankEmbedding
from mprec.nn.keyed import Jagged, KeyedTensor, positions, sibling
from mprec.ops.pooling import pool_tables
from mprec.representations import TABLE, DheConfig, FeatureConfig, Part
from mprec.representations.members import pool_each, some_do_more

__all__ = ["EmbeddingBagCollection", "EmbeddingCollection"]

#: What a table is made of: "table", "dhe", "low_rank", or a configuration of a deep hash embedding.
Choice = str | DheConfig
Choices = Choice | Mapping[str, Choice] | Callable[[Any], Choice]

_DTYPES = {"FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16}


class _Group(NamedTuple):
    """Outputs that one operator call makes."""

    part: Part
    mode: str
    members: list[int]  # positions among the outputs


class _Collection(nn.Module):
    """What both have in common: tables by name, each for one or more features."""

    def _set_up(self, tables: Iterable[Any], representation: Choices) -> list[FeatureConfig]:
        """Each table's configuration. Sets ``_configs``, ``_features`` and ``_tables`` of each output."""
        self._configs = list(tables)
        if not self._configs:
            raise ValueError("tables: expected at least one")
        names = [config.name for config in self._configs]
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"tables: names must differ, got {twice[0]!r} more than once")
        if isinstance(representation, Mapping) and (unknown := sorted(set(representation) - set(names))):
            raise KeyError(f"representation: no table {unknown[0]!r}; there are {', '.join(names)}")
        for config in self._configs:
            if not config.feature_names:
                config.feature_names = [config.name]  # as TorchRec does
        features = [(f, config.name) for config in self._configs for f in config.feature_names]
        tables_of = Counter(f for f, _ in features)
        self._features = [f for f, _ in features]
        self._tables = [table for _, table in features]
        #: Names of the outputs: of a feature that several tables serve, also the table's.
        self._names = [f"{f}@{table}" if tables_of[f] > 1 else f for f, table in features]
        return [_feature(config, representation) for config in self._configs]

    def _initialise(self, modules: nn.ModuleDict) -> None:
        """Rows by the configuration's ``init_fn``, or uniform in +-1/sqrt(num_embeddings)."""
        for config in self._configs:
            module = modules[config.name]
            module.reset_parameters()
            rows = getattr(module, "rows", module)  # of a table of low rank
            if not isinstance(rows, (nn.EmbeddingBag, nn.Embedding)):
                continue
            bound = config.num_embeddings**-0.5
            init = getattr(config, "init_fn", None) or partial(nn.init.uniform_, a=-bound, b=bound)
            with torch.no_grad():
                init(rows.weight)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class EmbeddingBagCollection(_Collection):
    """Pooled embeddings by name: ``torchrec.EmbeddingBagCollection`` on mprec's kernels.

    All tables of a pooling mode are one kernel call, whatever features share them; so are all decoders.

    Args:
        tables: ``torchrec.EmbeddingBagConfig`` s: ``name``, ``num_embeddings``, ``embedding_dim``,
            ``feature_names``, and where they differ from the defaults ``pooling`` (SUM or MEAN),
            ``data_type`` (FP32, FP16 or BF16) and ``init_fn``.
        is_weighted: look-ups are weighted by the batch's weights.
        device: of the tables.
        representation: what tables are made of: ``"table"``, ``"dhe"`` or ``"low_rank"`` or a
            :class:`DheConfig` for all, by the table's name (others are tables), or a function of the
            configuration.
        sparse: gradients of tables are sparse tensors.

    Attributes:
        embedding_bags: ``embedding_bags.{table}.weight``, or ``...coefficients`` and ``...decoder`` of a deep
            hash embedding, ``...rows`` and ``...projection`` of a table of low rank.

    Raises:
        ValueError, KeyError: a configuration or a choice that is not served.
    """

    def __init__(
        self,
        tables: Sequence[Any],
        is_weighted: bool = False,
        device: torch.device | str | None = None,
        *,
        representation: Choices = "table",
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self._is_weighted, self.sparse = is_weighted, sparse
        features = self._set_up(tables, representation)
        self.embedding_bags = nn.ModuleDict()
        for config, feature in zip(self._configs, features, strict=True):
            (part,) = feature.parts
            module = part.module(feature, sparse=sparse, device=device, dtype=_dtype(config))
            # Past ModuleDict, which refuses the names of its own methods.
            self.embedding_bags._modules[config.name] = module
        by_table = {feature.name: feature for feature in features}
        outputs = [by_table[table] for table in self._tables]
        self._dims = [feature.embedding_dim for feature in outputs]
        groups: dict[tuple, list[int]] = {}
        for i, feature in enumerate(outputs):
            (part,) = feature.parts
            key = part, feature.mode, self._dtype_of(self._tables[i]), part.group(feature)
            groups.setdefault(key, []).append(i)
        self._groups = [_Group(part, mode, members) for (part, mode, *_), members in groups.items()]
        self.reset_parameters()

    def _dtype_of(self, table: str) -> torch.dtype:
        return next(self.embedding_bags[table].parameters()).dtype

    def reset_parameters(self) -> None:
        self._initialise(self.embedding_bags)

    def is_weighted(self) -> bool:
        return self._is_weighted

    def embedding_bag_configs(self) -> list[Any]:
        """The configurations as they were given."""
        return self._configs

    def forward(self, features: Any) -> Any:
        """Embed and pool a batch.

        Args:
            features: a KeyedJaggedTensor: keys in any order, also more than are needed; batches of different
                sizes by key if it has inverse indices.

        Returns:
            A KeyedTensor: for each feature of each table its vectors ``[B, embedding_dim]``, float32.

        Raises:
            KeyError: the batch lacks a feature.
            IdOutOfRangeError: an ID that is not below its table's ``num_embeddings``, or negative.
            ValueError: no weights though this is weighted; batches of different sizes that nothing expands.
        """
        at = positions(features, self._features)
        weights = None
        if self._is_weighted:
            weights = features.weights_or_none()
            if weights is None:
                raise ValueError("features: expected weights, as is_weighted says, got none")
        if getattr(features, "variable_stride_per_key", bool)():
            values = self._variable(features, at, weights)
        else:
            values = self._pool(features.values(), features.offsets(), weights, at, len(features.keys()))
        return sibling(features, "KeyedTensor", KeyedTensor)(
            list(self._names), list(self._dims), torch.cat(values, dim=1) if len(values) > 1 else values[0]
        )

    def _pool(self, indices, offsets, weights, at: list[int], count: int, only=None) -> list[Tensor]:
        """The vectors of each output ``[B, D]``; of ``only`` one of them, if given."""
        vectors: dict[int, Tensor] = {}
        for group in self._groups:
            members = group.members if only is None else [i for i in group.members if i == only]
            if not members:
                continue
            modules = [self.embedding_bags[self._tables[i]] for i in members]
            features = [at[i] for i in members]
            bags = Bags(indices, offsets, MODES[group.mode], weights, features, count)
            if group.part is TABLE and some_do_more(modules):
                pooled = pool_each(modules, bags, lambda m, own: pool_tables([m.weight], own, self.sparse))
            elif group.part is TABLE:
                pooled = ops.embedding_bag_multi(
                    [m.weight for m in modules],
                    indices,
                    offsets,
                    group.mode,
                    weights,
                    features=features,
                    num_features=count,
                    sparse=self.sparse,
                )
            else:
                pooled = group.part.pool(modules, bags, self.sparse)
            parts = pooled.float().split([self._dims[i] for i in members], dim=1)
            vectors.update(zip(members, parts, strict=True))
        return [vectors[i] for i in sorted(vectors)]

    def _variable(self, features: Any, at: list[int], weights: Tensor | None) -> list[Tensor]:
        """Batches of different sizes: each feature by itself, its rows then repeated to the full batch."""
        strides = list(features.stride_per_key())
        inverse = getattr(features, "inverse_indices_or_none", lambda: None)()
        if inverse is None:
            raise ValueError(f"features: batches of different sizes, {strides}, without inverse indices")
        names, expand = inverse
        starts = [sum(strides[:i]) for i in range(len(strides))]
        vectors = []
        for i, key in enumerate(at):
            offsets = features.offsets()[starts[key] : starts[key] + strides[key] + 1]
            begin, end = int(offsets[0]), int(offsets[-1])
            (pooled,) = self._pool(
                features.values()[begin:end],
                offsets - begin,
                None if weights is None else weights[begin:end],
                [0] * len(self._features),
                1,
                i,
            )
            vectors.append(pooled.index_select(0, expand[list(names).index(self._features[i])]))
        return vectors


class EmbeddingCollection(_Collection):
    """Embeddings by name without pooling: ``torchrec.EmbeddingCollection`` on mprec's kernels.

    Args:
        tables: ``torchrec.EmbeddingConfig`` s, all of one ``embedding_dim``.
        device: of the tables.
        need_indices: the IDs are the result's ``weights()``.
        representation, sparse: as for :class:`EmbeddingBagCollection`.

    Attributes:
        embeddings: ``embeddings.{table}.weight``, and so on.
    """

    def __init__(
        self,
        tables: Sequence[Any],
        device: torch.device | str | None = None,
        need_indices: bool = False,
        *,
        representation: Choices = "table",
        sparse: bool = False,
    ) -> None:
        super().__init__()
        self._need_indices = need_indices
        features = self._set_up(tables, representation)
        if wrong := [f for f in features if f.embedding_dim != features[0].embedding_dim]:
            raise ValueError(
                f"tables: {wrong[0].name!r} has embedding_dim {wrong[0].embedding_dim}, expected "
                f"{features[0].embedding_dim} as of {features[0].name!r}"
            )
        self.embeddings = nn.ModuleDict()
        for config, f in zip(self._configs, features, strict=True):
            like = {"device": device, "dtype": _dtype(config)}
            size = f.num_embeddings, f.embedding_dim
            if f.representation == "table":
                self.embeddings._modules[f.name] = Embedding(*size, sparse=sparse, **like)
            elif f.representation == "dhe":
                self.embeddings._modules[f.name] = DeepHashEmbedding(*size, f.dhe, **like)
            else:
                self.embeddings._modules[f.name] = LowRankEmbedding(*size, sparse=sparse, **like)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self._initialise(self.embeddings)

    def embedding_configs(self) -> list[Any]:
        """The configurations as they were given."""
        return self._configs

    def embedding_dim(self) -> int:
        return self._configs[0].embedding_dim

    def need_indices(self) -> bool:
        return self._need_indices

    def embedding_names_by_table(self) -> list[list[str]]:
        """The names of the outputs of each table."""
        pairs = list(zip(self._names, self._tables, strict=True))
        return [[name for name, table in pairs if table == config.name] for config in self._configs]

    def forward(self, features: Any) -> dict[str, Any]:
        """Embed a batch: for each feature of each table a JaggedTensor of vectors ``[n, embedding_dim]``,
        float32, by the output's name. Raises as :meth:`EmbeddingBagCollection.forward`."""
        positions(features, self._features)
        batch = features.to_dict()
        made = {}
        for name, feature, table in zip(self._names, self._features, self._tables, strict=True):
            bags = batch[feature]
            made[name] = sibling(features, "JaggedTensor", Jagged)(
                values=self.embeddings[table](bags.values()).float(),
                lengths=bags.lengths(),
                weights=bags.values() if self._need_indices else None,
            )
        return made


def _feature(config: Any, representation: Choices) -> FeatureConfig:
    choice = representation
    if isinstance(choice, Mapping):
        choice = choice.get(config.name, "table")
    elif not isinstance(choice, (str, DheConfig)):
        choice = choice(config)
    kind, dhe = ("dhe", choice) if isinstance(choice, DheConfig) else (choice, None)
    if kind not in ("table", "dhe", "low_rank"):
        raise ValueError(f"table {config.name!r}: expected table, dhe or low_rank, got {kind!r}")
    pooling = getattr(config, "pooling", "SUM")
    return FeatureConfig(
        config.name,
        config.num_embeddings,
        config.embedding_dim,
        kind,
        dhe,
        str(getattr(pooling, "value", pooling)).lower(),
    )


def _dtype(config: Any) -> torch.dtype:
    given = getattr(config, "data_type", "FP32")
    name = str(getattr(given, "value", given))
    if name not in _DTYPES:
        raise ValueError(
            f"table {config.name!r}: data_type: expected one of {', '.join(_DTYPES)}, got {name}; "
            "mprec.nn.QuantizedEmbeddingBagCollection quantises"
        )
    return _DTYPES[name]
