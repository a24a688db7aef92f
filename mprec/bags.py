"""A batch of bags: which IDs each sample has for each feature, and how they are pooled.

Kernels check offsets and IDs as they read them. What is here checks the rest before, for every device. It
checks offsets and IDs too, for what has no kernel; native code (``csrc/bags/check.h``) words what is wrong.
On CUDA a look at values would wait for the device: kernels there count what is wrong instead.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mprec._native import check_ids, check_offsets, join_bags, select_features, unique_share
from mprec.errors import DtypeError, InvalidOffsetsError
from mprec.tensors import as_ids, plain
from mprec.tracing import values_of

__all__ = ["Bags", "check_features", "check_mode", "check_ndim", "new"]


def check_ndim(tensor: Tensor, name: str, ndim: int = 1) -> None:
    if tensor.dim() != ndim:
        raise ValueError(f"{name} has to be a {ndim}D Tensor, but got Tensor of dimension {tensor.dim()}")


def check_mode(mode: int, per_sample_weights: Tensor | None) -> None:
    if mode not in (0, 1, 2):
        raise ValueError(f"mode: expected 0 (sum), 1 (mean) or 2 (max), got {mode}")
    if mode == 2 and per_sample_weights is not None:
        raise NotImplementedError(
            "per_sample_weights: only supported for mode='sum' and mode='mean', got mode='max'"
        )


def check_features(features: Sequence[int] | None, num_features: int | None, count: int) -> None:
    """``ValueError`` unless ``features`` names one of ``num_features`` for each of ``count`` parts."""
    if num_features is None:
        num_features = count
    if num_features < 1:
        raise ValueError(f"num_features: expected at least 1, got {num_features}")
    if features is None:
        if num_features != count:
            raise ValueError(f"num_features: {num_features}, but there are {count} parts and no features")
        return
    if len(features) != count:
        raise ValueError(f"features: expected one for each of {count} parts, got {len(features)}")
    for t, f in enumerate(features):
        if not 0 <= f < num_features:
            raise ValueError(f"features[{t}]: expected in [0, {num_features}), got {f}")


#: ``new(Bags, values)`` makes one of a tuple of all its values, in half the time of ``Bags(*values)``.
new = tuple.__new__


class Bags(NamedTuple):
    """Bags of ``num_features`` features of B samples each, feature after feature, and how to pool them.

    Bag b of feature f is ``indices[offsets[f * B + b] : offsets[f * B + b + 1]]``. Making one checks nothing;
    :meth:`checked` does.

    Attributes:
        indices: IDs, integers ``[n]``.
        offsets: where each bag begins, integers ``[F * B + 1]``, the last one n.
        mode: 0 sum, 1 mean, 2 max.
        per_sample_weights: one factor per index, or None.
        features: which features are pooled, one for each table or decoder; None: all, in order.
        num_features: F.
        include_last_offset: False: the last offset is left out. Of one feature only.
        padding_idx: entries with this ID are left out; -1: none. Of one feature only.
    """

    indices: Tensor
    offsets: Tensor
    mode: int = 0
    per_sample_weights: Tensor | None = None
    features: Sequence[int] | None = None
    num_features: int = 1
    include_last_offset: bool = True
    padding_idx: int = -1

    # ------------------------------------------------------------------------------------------------ shapes

    @property
    def batch(self) -> int:
        """B, for shapes: offsets are not checked."""
        bags = self.offsets.shape[0] - int(self.include_last_offset)  # tracers take no bool from a size
        return bags if self.num_features == 1 else bags // self.num_features

    def served(self, count: int) -> list[int]:
        """The feature of each of ``count`` tables or decoders."""
        return list(range(count)) if self.features is None else list(self.features)

    @property
    def is_plain(self) -> bool:
        """Whether indices and offsets say all: of every feature, without weights or padding."""
        return (
            self.per_sample_weights is None
            and self.features is None
            and self.include_last_offset
            and self.padding_idx < 0
        )

    def positions_kept(self) -> Tensor | None:
        """Which indices are no padding, bool ``[n]``; None: all."""
        return None if self.padding_idx < 0 else self.indices != self.padding_idx

    # ----------------------------------------------------------------------------------------------- checks

    def checked(self, count: int, dtype: torch.dtype, or_float32: bool = False) -> "Bags":
        """As kernels take them, for ``count`` tables or decoders; the checks that need no look at values.

        Per-sample weights are to be of ``dtype``; ``or_float32``: of float32 too where that is a 16-bit type.

        Raises:
            ValueError, NotImplementedError, DtypeError, InvalidOffsetsError: naming the argument.
        """
        check_features(self.features, self.num_features, count)
        check_mode(self.mode, self.per_sample_weights)
        check_ndim(self.indices, "indices")
        check_ndim(self.offsets, "offsets")
        self._check_weights(dtype, or_float32)
        self.check_number()
        return self.of_kernels()

    def of_kernels(self) -> "Bags":
        """Indices, offsets and weights as kernels take them."""
        indices, offsets, mode, weights, features, count, last, padding = self
        indices, offsets = as_ids(indices, "indices"), as_ids(offsets, "offsets")
        return new(Bags, (indices, offsets, mode, plain(weights), features, count, last, padding))

    def with_float_weights(self) -> "Bags":
        """Per-sample weights in float32, unseen by autograd, as the CPU's kernels take them."""
        weights = self.per_sample_weights
        if weights is None:
            return self
        return self._replace(per_sample_weights=plain(weights.detach().to(torch.float32)))

    def _check_weights(self, dtype: torch.dtype, or_float32: bool) -> None:
        weights = self.per_sample_weights
        if weights is None:
            return
        if weights.shape != self.indices.shape:
            raise ValueError(
                f"per_sample_weights: expected the shape of indices, {tuple(self.indices.shape)}, "
                f"got {tuple(weights.shape)}"
            )
        wider = or_float32 and dtype in (torch.float16, torch.bfloat16)
        if weights.dtype != dtype and not (wider and weights.dtype == torch.float32):
            raise DtypeError(
                f"per_sample_weights: expected to have the same type as weight, {dtype}, got {weights.dtype}"
            )

    def check_number(self) -> None:
        """``InvalidOffsetsError`` unless ``num_features`` divides the number of bags."""
        bags = self.offsets.shape[0] - int(self.include_last_offset)
        if self.num_features < 1:
            raise ValueError(f"num_features: expected at least 1, got {self.num_features}")
        if bags < 0 and self.num_features == 1:
            raise InvalidOffsetsError(
                "offsets: with include_last_offset there must be at least one (1 + a multiple of the number "
                "of features, 1), got none"
            )
        if bags < 0 or (self.num_features > 1 and bags % self.num_features):
            raise InvalidOffsetsError(
                f"offsets: expected 1 + a multiple of the number of features, {self.num_features}, got "
                f"{self.offsets.shape[0]}"
            )

    def check_offsets(self) -> None:
        """``InvalidOffsetsError`` unless offsets rise from 0 to the number of indices. Waits for a GPU."""
        self.check_number()
        check_offsets(values_of(self.offsets), len(self.indices), self.include_last_offset, self.num_features)

    def check_ids(self, bounds: Sequence[int | None]) -> None:
        """``IdOutOfRangeError`` unless IDs of part i's feature are in ``[0, bounds[i])``; None: not negative.

        Offsets have been checked.
        """
        pairs = [
            (f, -1 if bound is None else bound)
            for f, bound in zip(self.served(len(bounds)), bounds, strict=True)
        ]
        check_ids(values_of(self.indices), values_of(self.offsets), self.batch, self.num_features, pairs)

    # -------------------------------------------------------------------------------------- parts of a batch

    def with_last_offset(self) -> "Bags":
        """The same bags, the last offset written out."""
        if self.include_last_offset:
            return self
        offsets = torch.nn.functional.pad(self.offsets, (0, 1), value=len(self.indices))
        return self._replace(offsets=offsets, include_last_offset=True)

    def parts(self, count: int) -> "Iterator[tuple[int, int, Bags]]":
        """Of each of ``count`` parts: where its indices begin and end, and the bags of its feature alone."""
        if self.num_features == 1:
            yield from [(0, self.indices.shape[0], self._of_all())] * count
            return
        batch = self.batch
        bounds = self.offsets[::batch].tolist() if batch else [0] * (self.num_features + 1)
        # The ends are where they should be. If the offsets say otherwise, the part's own check will.
        bounds[0], bounds[-1] = 0, self.indices.shape[0]
        for f in self.served(count):
            begin, end = bounds[f], bounds[f + 1]
            weights = self.per_sample_weights
            starts = self.offsets[f * batch : (f + 1) * batch + 1] - begin
            yield (
                begin,
                end,
                Bags(
                    self.indices[begin:end],
                    starts,
                    self.mode,
                    None if weights is None else weights[begin:end],
                ),
            )

    def _of_all(self) -> "Bags":
        return self if self.features is None else self._replace(features=None)

    def only(self, features: Sequence[int] | None) -> "Bags":
        """The batch of these features (None: all) alone, in this order. CPU only. ``InvalidOffsetsError``."""
        if features is None or list(features) == list(range(self.num_features)):
            return self._of_all()
        indices, offsets = as_ids(self.indices, "indices"), as_ids(self.offsets, "offsets")
        self.check_number()
        selected, starts, weights = select_features(
            indices, offsets, self.per_sample_weights, list(features), self.num_features
        )
        return Bags(selected, starts, self.mode, weights, None, len(features))

    def arguments(self, num_features: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Indices, offsets and per-sample weights of a batch of all ``num_features`` features.

        ``ValueError`` for bags of some of them, of another number, with padding or without the last offset.
        """
        indices, offsets, _, weights, features, count, last, padding = self
        if count != num_features:
            raise ValueError(f"num_features: expected {num_features}, got {count}")
        if features is not None or not last or padding >= 0:
            raise ValueError(
                "bags: expected those of all features, every offset and no padding, got features "
                f"{features}, include_last_offset {last}, padding_idx {padding}"
            )
        return indices, offsets, weights

    @classmethod
    def join(
        cls, batches: Sequence["Bags"], samples: Sequence[int], starts: Sequence[int], stops: Sequence[int]
    ) -> "Bags":
        """Samples ``starts[i]`` to ``stops[i]`` of batches of ``samples[i]`` samples each, one after another.

        On the CPU. ``ValueError`` unless all have the same features, and are plain.
        """
        if not all(bags.is_plain for bags in batches):
            raise ValueError("bags: expected those of all features, without per_sample_weights and padding")
        count = batches[0].num_features
        indices, offsets = join_bags(
            [as_ids(bags.indices, "indices") for bags in batches],
            [as_ids(bags.offsets, "offsets") for bags in batches],
            samples, starts, stops, count,
        )  # fmt: skip
        return cls(indices, offsets, num_features=count)

    def unique_share(self) -> float:
        """Distinct (feature, ID) pairs over all IDs; 1 if there are none. A few nanoseconds an ID."""
        return unique_share(self.indices.cpu(), self.offsets.cpu(), self.num_features)

    # ------------------------------------------------------------------------------------------------ places

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Bags":
        """The same bags in what ``move`` makes of each tensor."""
        weights = self.per_sample_weights
        return self._replace(
            indices=move(self.indices),
            offsets=move(self.offsets),
            per_sample_weights=None if weights is None else move(weights),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Bags":
        return self.moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Bags":
        return self.moved(torch.Tensor.pin_memory)
