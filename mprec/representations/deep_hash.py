"""A deep hash embedding with pooling."""

import itertools
import math

import torch
from torch import Tensor, nn

from mprec import ops
from mprec.bags import Bags, new
from mprec.hashing import coefficients
from mprec.layers import read_by_collections, recompute, run_as_modules
from mprec.names import MODES, code
from mprec.ops._autograd import is_batched
from mprec.ops._common import eager, rows_as_bags
from mprec.ops._decoders import ModuleDecoder, clear_decoders
from mprec.options import DEFAULT_OPTIONS, Options, TuningTraits, check_options
from mprec.reference import activate
from mprec.representations.dhe_config import DheConfig
from mprec.tracing import has_values
from mprec.tuning import options_for


@read_by_collections
class DeepHashEmbeddingBag(nn.Module):
    """Embeds IDs without a table: k hashes of the ID, decoded by an MLP (Kang et al., KDD 2021), then pooled.

    The size does not depend on the vocabulary, and any ID in ``[0, 2**63)`` has an embedding.

    Args:
        embedding_dim: D, the size of the vectors.
        config: hashes and layers.
        mode: ``"sum"``, ``"mean"`` or ``"max"`` over a bag.
        include_last_offset: ``offsets`` ends with the number of IDs, as in ``torch.nn.EmbeddingBag``.
        padding_idx: entries with this ID are left out.
        num_embeddings: refuse IDs not below this; ``None`` takes any.
        device, dtype: of the decoder.
        options: how native calls without gradients run, as for :class:`EmbeddingBagCollection`.

    Shape: ``input`` ``[n]`` with ``offsets`` ``[B]``, or ``[B, L]``; output ``[B, D]``.

    Attributes:
        coefficients: int32 ``[rows, k]``, the hash functions: a buffer, saved with the model.
        decoder: ``nn.Linear`` layers. Weights start from N(0, 2 / (in + out)), biases from N(0, 1 / out).
            Kernels read their weights. Where a layer has hooks, or was replaced by a module with a forward
            pass of its own (an adapter, a quantised layer), the layers are called instead, which is slower.
    """

    coefficients: Tensor

    def __init__(
        self,
        embedding_dim: int,
        config: DheConfig | None = None,
        mode: str = "sum",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        num_embeddings: int | None = None,
        device=None,
        dtype=None,
        options: Options = None,
    ) -> None:
        super().__init__()
        self.options = check_options(options)
        code(MODES, mode, "mode")
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim: expected at least 1, got {embedding_dim}")
        if padding_idx is not None and padding_idx < 0:
            raise ValueError(f"padding_idx: expected an ID >= 0, got {padding_idx}")
        self.embedding_dim = embedding_dim
        self.config = config or DheConfig()
        self.mode = mode
        self.include_last_offset = include_last_offset
        self.padding_idx = padding_idx
        self.num_embeddings = num_embeddings
        hashes = _hashes(self.config)
        self.register_buffer("coefficients", hashes.to(torch.empty(0, device=device).device))
        widths = self.config.widths(embedding_dim)
        self.decoder = nn.ModuleList(
            nn.Linear(inputs, outputs, device=device, dtype=dtype)
            for inputs, outputs in itertools.pairwise(widths)
        )
        self.reset_parameters()
        self._packed = ModuleDecoder()

    def reset_parameters(self) -> None:
        """The hash functions of the configuration's seed, and a new decoder."""
        self._reset_hashes()
        for layer in self.decoder:
            nn.init.xavier_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=math.sqrt(1 / layer.out_features))

    @torch.no_grad()
    def _reset_hashes(self) -> None:
        if not self.coefficients.is_meta:
            self.coefficients.copy_(_hashes(self.config))

    def _apply(self, fn, recurse=True):
        was_meta = self.coefficients.is_meta
        super()._apply(fn, recurse)
        if was_meta:  # to_empty: what no training makes is right at once
            self._reset_hashes()
        return self

    @property
    def weights(self) -> list[Tensor]:
        return [layer.weight for layer in self.decoder]

    @property
    def biases(self) -> list[Tensor]:
        return [layer.bias for layer in self.decoder]

    def stack(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Coefficients, weights, biases: what operators take.

        Raises:
            TypeError: weights alone do not say what the layers do (:meth:`runs_layers`).
        """
        if self.runs_layers():
            raise TypeError(
                "decoder: expected nn.Linear layers with biases and without hooks, to be read, got "
                f"{self.decoder}"
            )
        layers = self._modules["decoder"]._modules.values()
        try:  # past nn.Module.__getattr__, which would cost a microsecond
            weights = [layer._parameters["weight"] for layer in layers]
            return self._buffers["coefficients"], weights, [layer._parameters["bias"] for layer in layers]
        except KeyError:  # parametrised or pruned layers
            for layer in layers:
                recompute(layer)
            return self.coefficients, self.weights, self.biases

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the decoder's parameters; float32 where it has none (layers quantised by torch)."""
        decoder = self._modules["decoder"]
        for layer in decoder._modules.values():  # walking through all parameters would cost microseconds
            if (weight := layer._parameters.get("weight")) is not None:
                return weight.dtype
        return next((parameter.dtype for parameter in decoder.parameters()), torch.float32)

    def runs_layers(self) -> bool:
        """Whether the decoder's layers must be called, because kernels that read their weights would leave
        something out."""
        return run_as_modules(self._modules["decoder"]._modules.values())

    def pool_by_layers(self, bags: Bags) -> Tensor:
        """The pooled vectors of bags of one feature, by calling the layers."""
        bags.check_offsets()
        x = ops.hash_encode(self.coefficients, bags.indices, self.config.family)
        x = x.to(self.weight_dtype)
        for i, layer in enumerate(self.decoder, 1):
            last = i == len(self.decoder)
            x = activate(layer(x), self.config.last_activation if last else self.config.activation)
        weights = bags.per_sample_weights
        if weights is not None and bags.mode == MODES["mean"]:  # of which torch takes none
            x, weights = x * weights.to(x.dtype)[:, None], None
        # Entries of padding are positions of one more vector, which torch leaves out.
        where, padding = torch.arange(len(x), device=x.device), len(x)
        if (kept := bags.positions_kept()) is not None:
            where = torch.where(kept, where, padding)
        return nn.functional.embedding_bag(
            where,
            nn.functional.pad(x, (0, 0, 0, 1)),
            bags.offsets.to(where.dtype),
            mode=list(MODES)[bags.mode],
            per_sample_weights=weights if weights is None else weights.to(x.dtype),
            include_last_offset=bags.include_last_offset,
            padding_idx=padding,
        )

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        include_last_offset = self.include_last_offset
        if offsets is None:
            if input.dim() != 2 and not input.is_nested:
                raise ValueError("offsets has to be a 1D Tensor but got None")
            input, offsets, per_sample_weights = rows_as_bags(input, per_sample_weights)
            include_last_offset = True
        if (
            not torch.is_grad_enabled()
            and eager()
            and type(input) is type(offsets) is Tensor
            and (per_sample_weights is None or type(per_sample_weights) is Tensor)
        ):
            mode, padding = MODES[self.mode], -1 if self.padding_idx is None else self.padding_idx
            out = self._forward_direct(
                new(Bags, (input, offsets, mode, per_sample_weights, None, 1, include_last_offset, padding))
            )
            if out is not None:
                return out
        if input.dim() == 2:
            raise ValueError("if input is 2D, then offsets has to be None: each row of input is a bag")
        if self.num_embeddings is not None:
            check_bound(input, offsets, include_last_offset, self.num_embeddings)
        if self.runs_layers():
            padding = -1 if self.padding_idx is None else self.padding_idx
            bags = (
                input,
                offsets,
                MODES[self.mode],
                per_sample_weights,
                None,
                1,
                include_last_offset,
                padding,
            )
            return self.pool_by_layers(Bags(*bags).checked(1, self.weight_dtype))
        return ops.dhe_bag(
            input,
            offsets,
            *self.stack(),
            self.config.family,
            self.config.activation,
            self.config.last_activation,
            self.mode,
            per_sample_weights,
            include_last_offset,
            self.padding_idx,
        )

    def _forward_direct(self, bags: Bags) -> Tensor | None:
        """As :meth:`forward`, without the operator: one native call. None for what that does not take."""
        options = DEFAULT_OPTIONS if self.options is None else options_for(self, bags.batch)
        return self._packed.try_pool(self, bags, self.num_embeddings, options.threads, options.dedupe)

    def invalidate(self) -> None:
        """See writes to the decoder through ``.data``, NumPy or DLPack at the next call: such writes raise no
        version counter and may else go unnoticed until some 2048 IDs have been decoded. All other changes are
        seen at once."""
        clear_decoders()

    @torch.no_grad()
    def materialize(self, num_embeddings: int | None = None, chunk: int = 16384) -> Tensor:
        """The table this module stands for: ``[num_embeddings, D]``, row i the embedding of ID i."""
        count = self.num_embeddings if num_embeddings is None else num_embeddings
        if count is None:
            raise ValueError("num_embeddings: this module has no bound of its own, so give one")
        device = self.coefficients.device
        table = torch.empty(count, self.embedding_dim, device=device, dtype=self.weight_dtype)
        for begin in range(0, count, chunk):
            ids = torch.arange(begin, min(begin + chunk, count), device=device)
            ends = torch.arange(len(ids) + 1, device=device)
            if self.runs_layers():
                table[begin : begin + chunk] = self.pool_by_layers(Bags(ids, ends))
                continue
            table[begin : begin + chunk] = ops.dhe_bag(
                ids,
                ends,
                *self.stack(),
                self.config.family,
                self.config.activation,
                self.config.last_activation,
                include_last_offset=True,
            )
        return table

    def tuning_traits(self) -> TuningTraits:
        """For :mod:`mprec.tuning`. A bag without a bound is measured on 2**20 IDs."""
        shape = [[self.config.to_dict(), self.embedding_dim, self.mode], []]
        return TuningTraits(True, False, [self.num_embeddings or 1 << 20], shape, takes_batches=False)

    def extra_repr(self) -> str:
        bound = "" if self.num_embeddings is None else f", num_embeddings={self.num_embeddings}"
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        c = self.config
        return (
            f"{c.k} {c.family} hashes, {'-'.join(map(str, c.widths(self.embedding_dim)))}, {c.activation}, "
            f"last {c.last_activation}, mode={self.mode!r}{bound}{padding}"
        )


def _hashes(config: DheConfig) -> Tensor:
    with torch.device("cpu"):
        return coefficients(config.k, config.family, config.seed)


def check_bound(indices: Tensor, offsets: Tensor, include_last_offset: bool, bound: int) -> None:
    """``IdOutOfRangeError`` if an ID is not below ``bound``. On a GPU this would wait for it: not checked
    there."""
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if watched or not indices.is_cpu or is_batched(indices) or indices.dim() != 1 or not has_values(indices):
        return
    bags = Bags(indices, offsets, include_last_offset=include_last_offset).of_kernels()
    bags.check_offsets()
    bags.check_ids([bound])
