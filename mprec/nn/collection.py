"""All categorical features of a model in one module."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mprec import ops
from mprec._native import TableGroup
from mprec.bags import Bags, new
from mprec.errors import IdOutOfRangeError
from mprec.names import MODES
from mprec.nn.keyed import embed_alone
from mprec.ops import pooling
from mprec.ops._common import NATIVE_TABLES, write_to
from mprec.ops._decoders import group_decoders
from mprec.options import DEFAULT_OPTIONS, Options, TuningTraits, check_options
from mprec.representations import DHE, PARTS, REPRESENTATIONS, TABLE, FeatureConfig, Part
from mprec.representations.dhe import stacks_of
from mprec.representations.embedding_bag import EmbeddingBag
from mprec.representations.members import pool_each, some_do_more
from mprec.tracing import eager
from mprec.tuning import options_for

_PARTS = {part.container for part in PARTS}


class _Group(NamedTuple):
    """Parts of one kind that one operator call serves."""

    part: Part
    names: tuple[str, ...]
    features: list[int]  # their positions in the collection
    columns: list[int]  # first output column of each
    served: list[int] | None  # the positions, None: all features, in order
    alone: bool  # all columns, side by side
    mode: str
    mode_code: int
    options: Hashable  # of a deep hash embedding: family, activation, last_activation
    tables: TableGroup | None  # of tables: their places

    def bags(self, batch: Bags) -> Bags:
        """Those of the batch that the group pools, in its mode."""
        indices, offsets, mode, weights, _, count, _, _ = batch
        if self.served is None and mode == self.mode_code:
            return batch
        return new(Bags, (indices, offsets, self.mode_code, weights, self.served, count, True, -1))


class EmbeddingBagCollection(nn.Module):
    """Embeds a batch of many features, each in its own representation: a table, a deep hash embedding, both.

    *table*, *dhe*, *hybrid* and *select* models are four lists of :class:`FeatureConfig` for this one class
    (see :func:`with_representation`). All tables of one pooling mode are one kernel call, as are all decoders
    of one mode, hash family and pair of activations.

    Args:
        features: in the order of the batch and of the output.
        sparse: gradients of tables are sparse tensors (for ``torch.optim.SparseAdam`` and the like).
        device, dtype: of tables and decoders.
        options: how native calls without gradients run: ``"auto"`` measures at the first one what is fastest
            on this machine by batch size (:func:`mprec.nn.auto_options`), None leaves it to rules; or a
            function from the number of samples to :class:`RunOptions`. Never changes a result.

    Shape: ``indices`` ``[n]`` and ``offsets`` ``[F * B + 1]``: bag b of feature f is
    ``indices[offsets[f * B + b] : offsets[f * B + b + 1]]``. Output ``[B, sum(output_dims)]``.

    Attributes:
        features: the configurations, a tuple.
        output_dims: columns of each feature: its ``embedding_dim``, twice that for *hybrid* (table first).
        tables: ``tables.{name}.weight``, uniform in +-1/sqrt(num_embeddings) at first.
        dhe: ``dhe.{name}.coefficients`` and ``dhe.{name}.decoder.{layer}.weight|bias``.
        options: as given, or what was measured (:func:`mprec.nn.tune_options` does, with your batches).
    """

    has_cache = False  # of rows before the decoders
    # Where a module has its table, of what type it is, and which attribute says of what format its rows are.
    _table_at = "_parameters", "weight", nn.Parameter, None
    _table_types: tuple[type, ...] = (EmbeddingBag, nn.EmbeddingBag)  # whose rows are read

    def __init__(
        self,
        features: Sequence[FeatureConfig],
        sparse: bool = False,
        device=None,
        dtype=None,
        options: Options = None,
    ) -> None:
        super().__init__()
        self.options = check_options(options)
        self.features = tuple(features)
        self.sparse = sparse
        if not self.features:
            raise ValueError("features: expected at least one")
        if wrong := [f for f in self.features if not isinstance(f, FeatureConfig)]:
            raise TypeError(
                f"features: expected FeatureConfigs, got {type(wrong[0]).__name__}; TorchRec's are for "
                "mprec.nn.torchrec.EmbeddingBagCollection"
            )
        names = [feature.name for feature in self.features]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"features: names must differ, got {', '.join(twice)} more than once")
        self.output_dims = [feature.output_dim for feature in self.features]
        for part in PARTS:
            self._modules[part.container] = nn.ModuleDict()
        for f in self.features:
            for part in f.parts:
                # Into _modules directly: ModuleDict refuses names of its own methods, such as "type" or
                # "keys" (with these, all works but torch.export, which looks submodules up by getattr).
                module = part.module(f, sparse=sparse, device=device, dtype=dtype)
                self._members(part)[f.name] = module
        groups = self._group()
        self._table_groups = [group for group in groups if group.part is TABLE]
        self._dhe_groups = [group for group in groups if group.part is DHE]
        self._other_groups = [group for group in groups if group.part not in (TABLE, DHE)]
        self._mode, self._count = groups[0].mode_code, len(self.features)
        self._width = sum(self.output_dims)
        self.reset_parameters()

    def _members(self, part: Part) -> dict[str, nn.Module]:
        """The modules of a part, by feature."""
        return self._modules[part.container]._modules

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for part in PARTS:
            for module in self._members(part).values():
                part.reset(module)

    def fold(self) -> "EmbeddingBagCollection":
        """The same function of the IDs with plain tables and decoders only: here, the collection itself."""
        return self

    def _group(self) -> list[_Group]:
        found: dict[tuple, list[tuple[int, int]]] = {}
        column = 0
        for i, f in enumerate(self.features):
            for part in f.parts:
                found.setdefault((part, f.mode, part.group(f)), []).append((i, column))
                column += f.embedding_dim
        made = []
        for (part, mode, kind), members in found.items():
            positions, columns = [i for i, _ in members], [column for _, column in members]
            names = tuple(self.features[i].name for i in positions)
            served = None if len(members) == len(self.features) else positions
            alone, code = len(found) == 1, MODES[mode]
            tables = None
            if part is TABLE:
                at = None if alone else columns
                tables = TableGroup(
                    names, *self._table_at, code, at, served, len(self.features), self._table_types
                )
            made.append(_Group(part, names, positions, columns, served, alone, mode, code, kind, tables))
        return made

    def forward(
        self,
        indices: Any,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        *,
        out: Tensor | None = None,
    ) -> Any:
        """Embed and pool a batch.

        Args:
            indices: int64 or int32 ``[n]``, feature after feature. Or, alone, :class:`mprec.bags.Bags` of all
                features, whose ``mode`` is not read; or a KeyedJaggedTensor, with the names of the features
                as keys, in any order.
            offsets: int64 or int32 ``[F * B + 1]``, from 0 to n.
            per_sample_weights: one factor per index (features of modes sum and mean only).
            out: where to write the result, and what to return: a buffer of its shape and dtype that is used
                again costs neither an allocation nor its page faults. Not with gradients.

        Returns:
            ``[B, sum(output_dims)]``; of a KeyedJaggedTensor a KeyedTensor (see :mod:`mprec.nn.keyed`).

        Raises:
            IdOutOfRangeError: an ID of a feature with a table is not in ``[0, num_embeddings)``, or an ID of
                one without is negative (a deep hash embedding takes any other).
            InvalidOffsetsError, DtypeError, DeviceError, ValueError, NotImplementedError.
        """
        if offsets is None:
            return embed_alone(self, indices, per_sample_weights, out=out)
        batch = new(Bags, (indices, offsets, self._mode, per_sample_weights, None, self._count, True, -1))
        try:
            if (
                eager()
                and not torch.is_grad_enabled()
                and type(indices) is type(offsets) is Tensor
                and (per_sample_weights is None or type(per_sample_weights) is Tensor)
                and (out is None or type(out) is Tensor)
            ):
                pooled = self._forward_direct(batch, out)
                if pooled is not None:
                    return pooled
            return write_to(out, self._forward_ops(batch))
        except IdOutOfRangeError as error:
            self._name_feature(batch, error)
            raise

    def _forward_direct(self, batch: Bags, out: Tensor | None = None) -> Tensor | None:
        """Kernels straight into one output: no dispatcher, no concatenation, checks left to native code.
        None for what that does not take."""
        groups = self._table_groups
        if out is None and self.options is None and groups and groups[0].alone:  # native code does all
            return self._run_tables(groups[0], batch, None, DEFAULT_OPTIONS)
        offsets, count = batch.offsets, batch.num_features
        if offsets.dim() != 1:
            return None  # the operators say what is wrong
        ends = offsets.numel() - 1
        samples = ends // count
        if ends < 0 or samples * count != ends:
            return None
        options = DEFAULT_OPTIONS if self.options is None else options_for(self, samples)
        if out is None and groups and groups[0].alone:
            return self._run_tables(groups[0], batch, None, options)
        dtype = self._dtype()
        if out is None:
            if dtype not in NATIVE_TABLES:
                return None
            out = torch.empty(samples, self._width, dtype=dtype)
        elif out.dtype is not dtype or out.shape != (samples, self._width):
            return None
        for group in groups:
            if self._run_tables(group, batch, out, options) is None:
                return None
        for group in self._dhe_groups:
            if self._run_decoders(group, batch, out, options) is None:
                return None
        for group in self._other_groups:
            for column, part in self._by_column(group, self._embed_others(group, batch)):
                out[:, column : column + part.shape[1]] = part
        return out

    def _dtype(self) -> torch.dtype | None:
        """Of the output; None where no table of the collection's own says it."""
        if self._table_groups:
            modules = self._modules["tables"]._modules
            weight = modules[self._table_groups[0].names[0]]._parameters.get("weight")
            return None if weight is None else weight.dtype  # parametrised, or an adapter
        if not self._dhe_groups:
            group = self._other_groups[0]
            return group.part.dtype(self._members(group.part)[group.names[0]])
        return getattr(self._modules["dhe"]._modules[self._dhe_groups[0].names[0]], "weight_dtype", None)

    def _run_tables(self, group: _Group, batch: Bags, out, options) -> Tensor | None:
        """One group's pooled rows into its columns of ``out``; None if native code does not take them."""
        modules = self._modules["tables"]._modules
        return pooling.try_table_group(group.tables, modules, batch, out, options.threads)

    def _run_decoders(self, group: _Group, batch: Bags, out, options) -> Tensor | None:
        """One group's vectors into its columns of ``out``; None if native code does not take them."""
        modules = self._modules["dhe"]._modules
        members = [modules[name] for name in group.names]
        each = batch.indices.numel() // len(self.features)  # IDs of a decoder, about
        decoders = group_decoders(self, group.names[0], members, group.options, self._precisions(group), each)
        if decoders is None:
            return None
        return pooling.try_decoders(
            decoders, group.bags(batch), out, group.columns, options.threads, options.dedupe
        )

    def _precisions(self, group: _Group) -> list[str] | None:
        """Those that decoders are packed in; None: float32."""
        return None

    def invalidate(self) -> None:
        """See writes to decoders through ``.data``, NumPy or DLPack at the next call: such writes raise no
        version counter and may else go unnoticed until some 2048 IDs of each feature have been decoded."""
        ops.clear_decoders()

    def _forward_ops(self, batch: Bags) -> Tensor:
        """By operators: with gradients, under compilers, and to say what is wrong."""
        if batch.indices.dim() != 1 or batch.offsets.dim() != 1:
            raise ValueError(
                "expected indices and offsets of 1 dimension, got "
                f"{batch.indices.dim()} and {batch.offsets.dim()}"
            )
        parts = {}
        for groups, embed in (
            (self._table_groups, self._embed_tables),
            (self._dhe_groups, self._embed_decoders),
            (self._other_groups, self._embed_others),
        ):
            for group in groups:
                out = embed(group, batch)
                parts.update(self._by_column(group, out))
        if len(self._table_groups) + len(self._dhe_groups) + len(self._other_groups) == 1:
            return out
        return torch.cat([parts[column] for column in sorted(parts)], dim=1)

    def _embed_tables(self, group: _Group, batch: Bags) -> Tensor:
        """One group's pooled rows by its operator."""
        members, bags = [self.tables._modules[name] for name in group.names], group.bags(batch)
        if some_do_more(members):
            return pool_each(members, bags, lambda m, own: pooling.pool_tables([m.weight], own, self.sparse))
        return pooling.pool_tables([member.weight for member in members], bags, self.sparse)

    def _embed_decoders(self, group: _Group, batch: Bags) -> Tensor:
        """One group's pooled vectors by its operator."""
        return DHE.pool([self.dhe._modules[name] for name in group.names], group.bags(batch), self.sparse)

    def _embed_others(self, group: _Group, batch: Bags) -> Tensor:
        """One group's pooled vectors as its part pools them."""
        members = self._members(group.part)
        return group.part.pool([members[name] for name in group.names], group.bags(batch), self.sparse)

    def tuning_traits(self) -> TuningTraits:
        """For :mod:`mprec.tuning`."""
        precisions = [getattr(self, f"{kind}_precision", None) for kind in ("table", "decoder")]
        return TuningTraits(
            bool(self._dhe_groups),
            self.has_cache,
            [feature.num_embeddings for feature in self.features],
            [[feature.to_dict() for feature in self.features], precisions],
            takes_batches=True,
        )

    def _stacks(self, group: _Group) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
        """What operators take of a group's decoders."""
        return stacks_of([self.dhe._modules[name] for name in group.names])

    def _by_column(self, group: _Group, out: Tensor):
        dims = [self.features[i].embedding_dim for i in group.features]
        return zip(group.columns, out.split(dims, dim=1), strict=True)

    def _name_feature(self, batch: Bags, error: IdOutOfRangeError) -> None:
        """Raise the error again with the feature's name, if a feature's ID is at fault."""
        batch = batch.of_kernels()
        for i, feature in enumerate(self.features):
            bound = feature.num_embeddings if feature.has_rows else None
            try:
                batch._replace(features=[i]).check_ids([bound])
            except IdOutOfRangeError as found:
                message = str(found).replace(f"(feature {i}, ", f"(feature {feature.name!r}, ")
                raise IdOutOfRangeError(
                    message.replace("(bag ", f"(feature {feature.name!r}, bag ")
                ) from error

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        saved: dict[str, set[str]] = {}
        for key in state_dict:
            container, name, *_ = (*key.removeprefix(prefix).split(".", 2), "")
            if key.startswith(prefix) and container in _PARTS:
                saved.setdefault(name, set()).add(container)
        for feature in self.features:
            found = saved.get(feature.name)
            if found and found != {part.container for part in feature.parts}:
                kinds = [r.name for r in REPRESENTATIONS.values() if found == {p.container for p in r.parts}]
                was = " or ".join(kinds) or " and ".join(sorted(found))
                errors.append(
                    f"feature {feature.name!r} is a {was} in the state_dict, "
                    f"but a {feature.representation} in this module"
                )

    def extra_repr(self) -> str:
        kinds = [feature.representation for feature in self.features]
        counts = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
        numbers = sum(feature.num_parameters() for feature in self.features)
        return f"{len(kinds)} features ({counts}), {self._width} columns, {numbers:,} parameters"
