"""Collections in fewer bytes, for serving."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from mprec import reference
from mprec.bags import Bags, check_mode, check_ndim
from mprec.hashing import families_for
from mprec.layers import does_more, refuse_more
from mprec.nn.collection import EmbeddingBagCollection
from mprec.ops import pooling
from mprec.ops._checks import check_same_device
from mprec.ops._decoders import check_float16, packed_decoder
from mprec.representations import DHE, PARTS, TABLE
from mprec.representations.deep_hash import DeepHashEmbeddingBag
from mprec.representations.low_rank import pool_rows
from mprec.representations.members import pool_each, some_do_more
from mprec.row_formats import check_rows, row_format
from mprec.tensors import plain
from mprec.tracing import eager

#: Hash families that a decoder precision serves; None: all.
DECODER_PRECISIONS = {
    "float32": None,
    "float16": None,
    "bfloat16": None,
    "float8": None,
    "int8": families_for("int8"),
    "lut": families_for("lut"),
}
ON_CUDA = ("float32", "float8")


class QuantizedTable(nn.Module):
    """The rows of a table in one precision: a buffer ``rows``, saved with the model.

    ``precision`` names one of :data:`mprec.row_formats.ROW_FORMATS`. ``float16`` and ``bfloat16``:
    ``[N, D]``. ``int8`` and ``int4``: uint8 ``[N, bytes]``, each row with its own scale and bias, in the
    layout of FBGEMM and of ``torch.ops.quantized.embedding_bag_byte_prepack``.
    """

    rows: Tensor

    def __init__(self, weight: Tensor, precision: str) -> None:
        super().__init__()
        self.format = row_format(precision)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.precision = precision
        self.bits = self.format.code
        weight = plain(weight.detach().to(torch.float32))
        self.register_buffer("rows", self.format.encode(weight))

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    def dequantize(self) -> Tensor:
        """The numbers that the rows stand for: float32 ``[N, D]``."""
        return self.format.decode(self.rows)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        rows = state_dict.get(f"{prefix}rows")
        if isinstance(rows, Tensor) and rows.shape == self.rows.shape and rows.dtype == self.rows.dtype:
            try:
                check_rows(rows, self.embedding_dim, self.precision)
            except ValueError as error:
                errors.append(f"{prefix}{error}; mprec.row_formats.from_inference_rows reads them")
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.precision}, {self.nbytes:,} bytes"


class QuantizedDecoder(nn.Module):
    """The decoder of a deep hash embedding in float8 (e4m3), each output of a layer with its own scale.

    Buffers: ``coefficients``, and for each layer ``weight{layer}`` ``[out, in]`` and ``affine{layer}``,
    float32 ``[2, out]``: what the layer's outputs are multiplied by, and what is added.
    """

    def __init__(self, decoder: DeepHashEmbeddingBag) -> None:
        super().__init__()
        coefficients, weights, biases = decoder.stack()
        self.layers = len(weights)
        self.register_buffer("coefficients", coefficients.clone())
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            weight, bias = weight.detach().to(torch.float32), bias.detach().to(torch.float32)
            scale = weight.abs().amax(1) / reference.FLOAT8_MAX
            scale = torch.where(scale > 0, scale, 1)
            self.register_buffer(f"weight{layer}", reference.float8(weight / scale[:, None]))
            self.register_buffer(f"affine{layer}", torch.stack([scale, bias]))

    def stack(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Coefficients, weights, affines: what the operator takes."""
        buffers, layers = self._buffers, range(self.layers)
        weights = [buffers[f"weight{layer}"] for layer in layers]
        return buffers["coefficients"], weights, [buffers[f"affine{layer}"] for layer in layers]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())


class QuantizedEmbeddingBagCollection(EmbeddingBagCollection):
    """An :class:`EmbeddingBagCollection` for serving: tables and decoders in chosen precisions, float32
    results.

    Takes the same calls as ``collection`` and stands in for it. It holds a converted copy of the tables and
    of decoders in float8, and shares the modules of other decoders, whose packed copies have the chosen
    precision. On CUDA tables are served in any precision, decoders in float32 or float8. Results carry no
    gradients::

        model.embeddings = QuantizedEmbeddingBagCollection(model.embeddings, tables="int8")

    One of a collection on the meta device takes rows that there are already, as its own memory, by
    ``load_state_dict(rows, assign=True)``.

    Args:
        collection: in float32 on the CPU; not changed, and not kept.
        tables: one of :data:`mprec.row_formats.ROW_FORMATS`, such as ``"int8"``, for all features or by name
            (features not named stay float32).
        decoders: ``"float32"``, ``"float16"``, ``"bfloat16"``, ``"float8"``, ``"int8"`` (hash families u7 and
            universal) or ``"lut"`` (sign), for all features or by name. Other layers than the first are
            float32 in ``"int8"`` and ``"lut"``; ``"bfloat16"`` rounds every layer's inputs too. ``"float8"``
            is for CUDA (compute capability 9.0 or more): encodings and hidden layers are rounded to float8
            too, sums are float32; a CPU computes the same, slowly.

    Raises:
        ValueError: unknown precision or feature, or one that does not fit (odd dimension, hash family,
            numbers beyond the range of float16 or of int4's scales).
    """

    _table_at = "_buffers", "rows", Tensor, "bits"
    _table_types = (QuantizedTable,)

    def __init__(
        self,
        collection: EmbeddingBagCollection,
        tables: str | Mapping[str, str] = "int8",
        decoders: str | Mapping[str, str] = "float32",
    ) -> None:
        collection = collection.fold()
        super().__init__(collection.features, device="meta")
        with_tables = [f.name for f in self.features if f.has_rows]
        with_decoders = [f.name for f in self.features if f.has_dhe]
        self.table_precision = _by_name(tables, with_tables, "tables")
        self.decoder_precision = _by_name(decoders, with_decoders, "decoders")
        for f in self.features:
            if f.has_dhe:
                _check_decoder_precision(f, self.decoder_precision[f.name])
                if self.decoder_precision[f.name] == "float16":
                    weights = collection.dhe._modules[f.name].weights
                    check_float16(weights, f"decoders: feature {f.name!r}")
        self.dhe = nn.ModuleDict()
        for name in with_decoders:
            shared = collection.dhe._modules[name]
            self.dhe._modules[name] = QuantizedDecoder(shared) if self._in_float8(name) else shared
        self._dhe_groups = [part for group in self._dhe_groups for part in self._split_group(group)]
        for part in PARTS:
            if part is not DHE:
                self._modules[part.container] = nn.ModuleDict()
        for f in self.features:
            for part in f.parts:
                if part is DHE:
                    continue
                module = collection._members(part)[f.name]
                quantise = partial(QuantizedTable, precision=self.table_precision.get(f.name, "float32"))
                try:
                    if part is TABLE:
                        refuse_more(module, f"tables: feature {f.name!r}")
                        made = quantise(module.weight)
                    else:
                        made = part.quantised(module, quantise)
                    self._members(part)[f.name] = made
                except ValueError as error:
                    raise ValueError(f"tables: feature {f.name!r}: {error}") from None
        self.train(collection.training)

    def _apply(self, fn, recurse=True):
        converted = fn(torch.empty(0, dtype=torch.float32))
        if converted.dtype != torch.float32 or converted.device.type not in ("cpu", "cuda"):
            raise TypeError(
                "a quantised collection keeps its precisions, on the CPU or CUDA: convert the collection it "
                "came from"
            )
        low = sorted({p for p in self.decoder_precision.values() if p not in ON_CUDA})
        if low and not converted.is_cpu:
            raise TypeError(f"decoders in {', '.join(low)} are for the CPU, not for {converted.device}")
        return super()._apply(fn, recurse)

    def forward(
        self,
        indices: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`EmbeddingBagCollection.forward`; float32 results without gradients."""
        if not eager():  # exporters write no_grad() down, and an error would leave it switched on
            return super().forward(indices, offsets, per_sample_weights, out=out)
        with torch.no_grad():
            return super().forward(indices, offsets, per_sample_weights, out=out)

    def _dtype(self) -> torch.dtype:
        return torch.float32

    def _in_float8(self, name: str) -> bool:
        return self.decoder_precision[name] == "float8"

    def _split_group(self, group):
        """Those in float8, which an operator of their own serves, and the others."""
        for float8 in (False, True):
            at = [i for i, name in enumerate(group.names) if self._in_float8(name) == float8]
            if at:
                lists = {
                    field: [getattr(group, field)[i] for i in at]
                    for field in ("names", "features", "columns")
                }
                served = group.served if len(at) == len(group.names) else lists["features"]
                yield group._replace(**lists, served=served)

    def _run_decoders(self, group, batch: Bags, out, options) -> Tensor | None:
        if not self._in_float8(group.names[0]):
            return super()._run_decoders(group, batch, out, options)
        for column, part in self._by_column(group, self._embed_decoders(group, batch)):
            out[:, column : column + part.shape[1]] = part
        return out

    def _precisions(self, group) -> list[str]:
        return [self.decoder_precision[name] for name in group.names]

    def _embed_tables(self, group, batch: Bags) -> Tensor:
        tables = [self.tables._modules[name] for name in group.names]
        bags = group.bags(batch)
        if some_do_more(tables):
            return pool_each(tables, bags, lambda table, own: pool_rows([table], own, False))
        return pool_rows(tables, bags, False)

    def _embed_decoders(self, group, batch: Bags) -> Tensor:
        precisions, scaled = self._precisions(group), self._in_float8(group.names[0])
        if scaled or set(precisions) == {"float32"}:
            return pooling.pool_decoders(*self._stacks(group), group.options, group.bags(batch), scaled)
        return pooling.pool_packed(*self._stacks(group), group.options, precisions, group.bags(batch))

    def _forward_ops(self, batch: Bags) -> Tensor:
        """Where the kernels refused: inputs in another form, or something to raise an exception about."""
        indices, offsets, mode, weights, *others = batch
        if weights is not None:
            weights = weights.detach().to(torch.float32)
        for name, tensor in (("indices", indices), ("offsets", offsets)):
            check_ndim(tensor, name)
        batch = Bags(indices, offsets, mode, weights, *others)
        if not eager():  # operators check when they run
            return super()._forward_ops(batch).detach()
        batch = batch.checked(len(self.features), torch.float32)
        check_same_device(module=next(self.buffers()), indices=batch.indices, offsets=batch.offsets)
        if batch.indices.is_cuda:
            return super()._forward_ops(batch)
        batch.check_offsets()
        for group in (*self._table_groups, *self._dhe_groups):
            check_mode(group.mode_code, batch.per_sample_weights)
        pooled = self._forward_direct(batch)
        if pooled is None:
            if any(does_more(m) for part in PARTS for m in self._members(part).values()):
                return super()._forward_ops(batch)  # calls them, or refuses them
            raise TypeError("expected rows in their own precision, on the CPU: were buffers replaced?")
        return pooled

    @property
    def nbytes(self) -> int:
        """Bytes that a call reads: tables, and decoders as packed."""
        total = sum(table.nbytes for table in self.tables._modules.values())
        for group in self._other_groups:
            for name in group.names:
                state = self._members(group.part)[name].state_dict()
                total += sum(tensor.nbytes for tensor in state.values())
        with torch.no_grad():
            for group in self._dhe_groups:
                for name in group.names:
                    if self._in_float8(name):
                        total += self.dhe._modules[name].nbytes
                        continue
                    stack = self.dhe._modules[name].stack()
                    total += packed_decoder(*stack, *group.options, self.decoder_precision[name]).nbytes
        return total


def _by_name(choice: str | Mapping[str, str], names: list[str], argument: str) -> dict[str, str]:
    if isinstance(choice, str):
        return dict.fromkeys(names, choice)
    if unknown := sorted(set(choice) - set(names)):
        raise ValueError(f"{argument}: no feature {unknown[0]!r} with any; there are {', '.join(names)}")
    return {name: choice.get(name, "float32") for name in names}


def _check_decoder_precision(feature, precision: str) -> None:
    if precision not in DECODER_PRECISIONS:
        choices = ", ".join(DECODER_PRECISIONS)
        raise ValueError(f"decoders: feature {feature.name!r}: expected one of {choices}, got {precision!r}")
    families = DECODER_PRECISIONS[precision]
    if families is not None and feature.dhe.family not in families:
        raise ValueError(
            f"decoders: feature {feature.name!r}: {precision} is for hash families {', '.join(families)}, "
            f"got {feature.dhe.family}"
        )
