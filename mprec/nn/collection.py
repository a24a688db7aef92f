"""All categorical features of a model in one module."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mprec import ops
from mprec._native import _C
from mprec.errors import IdOutOfRangeError
from mprec.names import MODES
from mprec.nn.config import FeatureConfig
from mprec.nn.deep_hash import DeepHashEmbeddingBag
from mprec.nn.embedding_bag import EmbeddingBag
from mprec.nn.options import DEFAULT_OPTIONS, Kernel, KernelTraits, check_kernel
from mprec.nn.tuning import kernel_options
from mprec.ops._checks import check_ids
from mprec.ops._common import NATIVE_TABLES, ids, into
from mprec.ops._csr import batch_size
from mprec.ops._decoders import group_decoders
from mprec.tracing import eager

_Parameter = nn.Parameter


class _Group(NamedTuple):
    """Parts of one kind that one operator call serves."""

    names: tuple[str, ...]
    features: list[int]  # their positions in the collection
    columns: list[int]  # first output column of each
    whole: bool  # all features, in order
    alone: bool  # all columns, side by side
    mode: str
    mode_code: int
    decoder: tuple[str, str, str]  # family, activation, last_activation; empty strings for tables


class EmbeddingBagCollection(nn.Module):
    """Embeds a batch of many features, each by a table, a deep hash embedding, or both.

    *table*, *dhe*, *hybrid* and *select* models are four lists of :class:`FeatureConfig` for this one class
    (see :func:`with_representation`). All tables of one pooling mode are one kernel call, as are all decoders
    of one mode, hash family and pair of activations.

    Args:
        features: in the order of the batch and of the output.
        sparse: gradients of tables are sparse tensors (for ``torch.optim.SparseAdam`` and the like).
        device, dtype: of tables and decoders.
        kernel: how native calls without gradients run: ``"auto"`` measures at the first one what is fastest
            on this machine by batch size (:func:`mprec.nn.auto_kernels`), None leaves it to rules; or a
            function from the number of samples to :class:`KernelOptions`. Never changes a result.

    Shape: ``indices`` ``[n]`` and ``offsets`` ``[F * B + 1]``: bag b of feature f is
    ``indices[offsets[f * B + b] : offsets[f * B + b + 1]]``. Output ``[B, sum(output_dims)]``.

    Attributes:
        features: the configurations, a tuple.
        output_dims: columns of each feature: its ``embedding_dim``, twice that for *hybrid* (table first).
        tables: ``tables.{name}.weight``, uniform in +-1/sqrt(num_embeddings) at first.
        dhe: ``dhe.{name}.coefficients`` and ``dhe.{name}.decoder.{layer}.weight|bias``.
        kernel: as given, or what was measured (:func:`mprec.nn.tune_kernels` does, with your batches).
    """

    has_cache = False  # of rows before the decoders

    def __init__(
        self,
        features: Sequence[FeatureConfig],
        sparse: bool = False,
        device=None,
        dtype=None,
        kernel: Kernel = None,
    ) -> None:
        super().__init__()
        self.kernel = check_kernel(kernel)
        self.features = tuple(features)
        self.sparse = sparse
        if not self.features:
            raise ValueError("features: expected at least one")
        names = [feature.name for feature in self.features]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"features: names must differ, got {', '.join(twice)} more than once")
        self.output_dims = [feature.output_dim for feature in self.features]
        self.tables, self.dhe = nn.ModuleDict(), nn.ModuleDict()
        for f in self.features:
            # Into _modules directly: ModuleDict refuses names of its own methods, such as "type" or "keys"
            # (with these, all works but torch.export, which looks submodules up by getattr).
            if f.has_table:
                table = EmbeddingBag(
                    f.num_embeddings,
                    f.embedding_dim,
                    mode=f.mode,
                    sparse=sparse,
                    include_last_offset=True,
                    device=device,
                    dtype=dtype,
                )
                self.tables._modules[f.name] = table
            if f.has_dhe:
                self.dhe._modules[f.name] = DeepHashEmbeddingBag(
                    f.embedding_dim,
                    f.dhe,
                    f.mode,
                    include_last_offset=True,
                    device=device,
                    dtype=dtype,
                )
        self._table_groups, self._dhe_groups = self._group()
        self._width = sum(self.output_dims)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for table in self.tables._modules.values():
            bound = table.num_embeddings**-0.5
            table.weight.uniform_(-bound, bound)
        for dhe in self.dhe._modules.values():
            dhe.reset_parameters()

    def fold(self) -> "EmbeddingBagCollection":
        """The same function of the IDs with plain tables and decoders only: here, the collection itself."""
        return self

    def _group(self) -> tuple[list[_Group], list[_Group]]:
        tables: dict[tuple, list[tuple[int, int]]] = {}
        decoders: dict[tuple, list[tuple[int, int]]] = {}
        column = 0
        for i, f in enumerate(self.features):
            if f.has_table:
                tables.setdefault((f.mode, ("", "", "")), []).append((i, column))
                column += f.embedding_dim
            if f.has_dhe:
                kind = (f.dhe.family, f.dhe.activation, f.dhe.last_activation)
                decoders.setdefault((f.mode, kind), []).append((i, column))
                column += f.embedding_dim

        def groups(found):
            made = []
            for key, parts in found.items():
                positions, columns = [i for i, _ in parts], [column for _, column in parts]
                names = tuple(self.features[i].name for i in positions)
                whole, alone = len(parts) == len(self.features), len(tables) + len(decoders) == 1
                made.append(_Group(names, positions, columns, whole, alone, key[0], MODES[key[0]], key[1]))
            return made

        return groups(tables), groups(decoders)

    def forward(
        self,
        indices: Tensor,
        offsets: Tensor,
        per_sample_weights: Tensor | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """Embed and pool a batch.

        Args:
            indices: int64 or int32 ``[n]``, feature after feature.
            offsets: int64 or int32 ``[F * B + 1]``, from 0 to n.
            per_sample_weights: one factor per index (features of modes sum and mean only).
            out: where to write the result, and what to return: a buffer of its shape and dtype that is used
                again costs neither an allocation nor its page faults. Not with gradients.

        Returns:
            ``[B, sum(output_dims)]``.

        Raises:
            IdOutOfRangeError: an ID of a feature with a table is not in ``[0, num_embeddings)``, or an ID of
                one without is negative (a deep hash embedding takes any other).
            InvalidOffsetsError, DtypeError, DeviceError, ValueError, NotImplementedError.
        """
        try:
            if (
                eager()
                and not torch.is_grad_enabled()
                and type(indices) is type(offsets) is Tensor
                and (per_sample_weights is None or type(per_sample_weights) is Tensor)
                and (out is None or type(out) is Tensor)
            ):
                pooled = self._forward_direct(indices, offsets, per_sample_weights, out)
                if pooled is not None:
                    return pooled
            return into(out, self._forward_ops(indices, offsets, per_sample_weights))
        except IdOutOfRangeError as error:
            self._name_feature(indices, offsets, error)
            raise

    def _forward_direct(self, indices, offsets, per_sample_weights, out=None) -> Tensor | None:
        """Kernels straight into one output: no dispatcher, no concatenation, checks left to native code.
        None for what that does not take."""
        if offsets.dim() != 1:
            return None  # the operators say what is wrong
        ends = offsets.shape[0] - 1
        samples = ends // len(self.features)
        if ends < 0 or samples * len(self.features) != ends:
            return None
        options = DEFAULT_OPTIONS if self.kernel is None else kernel_options(self, samples)
        if out is None and self._table_groups and self._table_groups[0].alone:  # native code makes it
            group = self._table_groups[0]
            return self._run_tables(group, indices, offsets, per_sample_weights, None, options)
        dtype = self._dtype()
        if out is None:
            if dtype not in NATIVE_TABLES:
                return None
            out = torch.empty(samples, self._width, dtype=dtype)
        elif out.dtype is not dtype or out.shape != (samples, self._width):
            return None
        for group in self._table_groups:
            if self._run_tables(group, indices, offsets, per_sample_weights, out, options) is None:
                return None
        for group in self._dhe_groups:
            if self._run_decoders(group, indices, offsets, per_sample_weights, out, options) is None:
                return None
        return out

    def _dtype(self) -> torch.dtype:
        if self._table_groups:
            modules = self._modules["tables"]._modules
            return modules[self._table_groups[0].names[0]]._parameters["weight"].dtype
        return self._modules["dhe"]._modules[self._dhe_groups[0].names[0]].stack()[1][0].dtype

    def _run_tables(self, group: _Group, indices, offsets, per_sample_weights, out, options) -> Tensor | None:
        """One group's pooled rows into its columns of ``out``; None if native code does not take them."""
        weights = _C.tensors_of(
            self._modules["tables"]._modules, group.names, "_parameters", "weight", _Parameter
        )
        return self._pool_tables(group, weights, None, indices, offsets, per_sample_weights, out, options)

    def _pool_tables(self, group, tables, bits, indices, offsets, per_sample_weights, out, options):
        if tables is None:
            return None
        return _C.try_embedding_bag_multi(
            tables,
            indices,
            offsets,
            per_sample_weights,
            group.mode_code,
            -1,
            out,
            None if group.alone else group.columns,
            options.threads or torch.get_num_threads(),
            bits,
            None,
            None if group.whole else group.features,
            len(self.features),
        )

    def _run_decoders(
        self, group: _Group, indices, offsets, per_sample_weights, out, options
    ) -> Tensor | None:
        """One group's vectors into its columns of ``out``; None if native code does not take them."""
        modules = self._modules["dhe"]._modules
        members = [modules[name] for name in group.names]
        decoders = group_decoders(
            self, group.names[0], members, group.decoder, self._precisions(group), indices.numel()
        )
        if decoders is None:
            return None
        return _C.try_dhe_bag_multi(
            decoders,
            indices,
            offsets,
            per_sample_weights,
            group.mode_code,
            -1,
            out,
            group.columns,
            options.threads or torch.get_num_threads(),
            options.dedupe,
            None if group.whole else group.features,
            len(self.features),
        )

    def _precisions(self, group: _Group) -> list[str] | None:
        """Those that decoders are packed in; None: float32."""
        return None

    def invalidate(self) -> None:
        """See writes to decoders through ``.data``, NumPy or DLPack at the next call: such writes raise no
        version counter and may else go unnoticed until some 2048 IDs have been decoded."""
        ops.clear_decoders()

    def _forward_ops(self, indices, offsets, per_sample_weights) -> Tensor:
        if indices.dim() != 1 or offsets.dim() != 1:
            raise ValueError(
                f"expected indices and offsets of 1 dimension, got {indices.dim()} and {offsets.dim()}"
            )
        parts = {}
        for group in self._table_groups:
            out = self._embed_tables(group, indices, offsets, per_sample_weights)
            parts.update(self._by_column(group, out))
        for group in self._dhe_groups:
            out = self._embed_decoders(group, indices, offsets, per_sample_weights)
            parts.update(self._by_column(group, out))
        if len(self._table_groups) + len(self._dhe_groups) == 1:
            return out
        return torch.cat([parts[column] for column in sorted(parts)], dim=1)

    def _embed_tables(self, group: _Group, indices, offsets, per_sample_weights) -> Tensor:
        """One group's pooled rows by its operator."""
        return ops.embedding_bag_multi(
            self._weights(group),
            indices,
            offsets,
            group.mode,
            per_sample_weights,
            features=None if group.whole else group.features,
            num_features=len(self.features),
            sparse=self.sparse,
        )

    def _embed_decoders(self, group: _Group, indices, offsets, per_sample_weights) -> Tensor:
        """One group's pooled vectors by its operator."""
        return ops.dhe_bag_multi(
            indices,
            offsets,
            *self._stacks(group),
            *group.decoder,
            mode=group.mode,
            per_sample_weights=per_sample_weights,
            features=None if group.whole else group.features,
            num_features=len(self.features),
        )

    def kernel_traits(self) -> KernelTraits:
        """For :mod:`mprec.nn.tuning`."""
        precisions = [getattr(self, f"{kind}_precision", None) for kind in ("table", "decoder")]
        return KernelTraits(
            bool(self._dhe_groups),
            self.has_cache,
            [feature.num_embeddings for feature in self.features],
            [[feature.to_dict() for feature in self.features], precisions],
            takes_batches=True,
        )

    def _weights(self, group: _Group) -> list[Tensor]:
        modules = self.tables._modules
        return [modules[name].weight for name in group.names]

    def _stacks(self, group: _Group) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
        """Coefficients, weights, biases and numbers of layers: what operators take."""
        stacks = [self.dhe._modules[name].stack() for name in group.names]
        return (
            [hashes for hashes, _, _ in stacks],
            [weight for _, weights, _ in stacks for weight in weights],
            [bias for _, _, biases in stacks for bias in biases],
            [len(weights) for _, weights, _ in stacks],
        )

    def _by_column(self, group: _Group, out: Tensor):
        dims = [self.features[i].embedding_dim for i in group.features]
        return zip(group.columns, out.split(dims, dim=1), strict=True)

    def _name_feature(self, indices, offsets, error) -> None:
        """Raise the error again with the feature's name, if a feature's ID is at fault."""
        batch = batch_size(offsets, len(self.features))
        for i, feature in enumerate(self.features):
            bound = feature.num_embeddings if feature.has_table else None
            try:
                check_ids(
                    ids(indices, "indices"), ids(offsets, "offsets"), [bound], batch, [i], len(self.features)
                )
            except IdOutOfRangeError as found:
                message = str(found).replace(f"(feature {i}, ", f"(feature {feature.name!r}, ")
                raise IdOutOfRangeError(
                    message.replace("(bag ", f"(feature {feature.name!r}, bag ")
                ) from error

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        for feature in self.features:
            table = f"{prefix}tables.{feature.name}"
            has_table = f"{table}.weight" in state_dict or f"{table}.rows" in state_dict  # rows: quantised
            has_dhe = f"{prefix}dhe.{feature.name}.coefficients" in state_dict
            if (has_table or has_dhe) and (has_table, has_dhe) != (feature.has_table, feature.has_dhe):
                saved = "hybrid" if has_table and has_dhe else "table" if has_table else "dhe"
                errors.append(
                    f"feature {feature.name!r} is a {saved} in the state_dict, "
                    f"but a {feature.representation} in this module"
                )

    def extra_repr(self) -> str:
        kinds = [feature.representation for feature in self.features]
        counts = ", ".join(f"{kinds.count(k)} {k}" for k in dict.fromkeys(kinds))
        numbers = sum(feature.num_parameters() for feature in self.features)
        return f"{len(kinds)} features ({counts}), {self._width} columns, {numbers:,} parameters"
