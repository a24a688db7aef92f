"""What a representation is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mprec.bags import Bags
from mprec.representations.dhe_config import DheConfig

__all__ = ["Feature", "Part", "Representation"]


class Feature(Protocol):
    """What a part reads of a :class:`mprec.nn.FeatureConfig`."""

    @property
    def name(self) -> str: ...
    @property
    def num_embeddings(self) -> int: ...
    @property
    def embedding_dim(self) -> int: ...
    @property
    def dhe(self) -> DheConfig | None: ...
    @property
    def mode(self) -> str: ...

    def parameter(self, name: str, default: Any) -> Any: ...


#: Every part by its container; the list of representations fills it.
INSTANCES: dict[str, Part] = {}


def _instance(container: str) -> Part:
    return INSTANCES[container]


class Part(ABC):
    """One way in which a feature's IDs become vectors of ``embedding_dim`` numbers.

    A part knows its parameters, its module, how bags of it are pooled, its bytes and floating-point
    operations, and its place in a state_dict. Each has one instance; a representation is one part, or several
    side by side.

    Attributes:
        name: also the representation that consists of this part alone.
        container: the attribute of a collection that holds its modules, so what its keys in a state_dict
            begin with: ``{container}.{feature}.``.
        has_rows: it stores rows by ID. Then IDs are below ``num_embeddings``, and a precision is that of
            rows.
        hashes: ``FeatureConfig.dhe`` describes it.
        parameters: names that ``FeatureConfig.parameters`` may have for it.
    """

    name: str
    container: str
    has_rows = False
    hashes = False
    parameters: tuple[str, ...] = ()

    def __reduce__(self):  # copies and pickles are the one instance
        return _instance, (self.container,)

    @abstractmethod
    def num_parameters(self, feature: Feature) -> int:
        """Trained numbers."""

    @abstractmethod
    def module(self, feature: Feature, *, sparse: bool, device, dtype) -> nn.Module:
        """A new module, with weights as they start."""

    @abstractmethod
    def id_bytes(self, feature: Feature, precision: str = "float32") -> int:
        """Bytes that one ID moves, beside what all IDs share. ``ValueError`` for a precision that does not
        fit."""

    @abstractmethod
    def shared_bytes(self, feature: Feature) -> int:
        """Bytes of the weights that every ID of a batch uses."""

    @abstractmethod
    def flops(self, feature: Feature) -> int:
        """Floating-point operations per ID, with one per number that is pooled."""

    @abstractmethod
    def materialize(self, module: nn.Module, num_embeddings: int) -> Tensor:
        """The table that the module stands for: ``[num_embeddings, embedding_dim]``, row i the vector of
        ID i."""

    def nbytes(self, feature: Feature, precision: str = "float32") -> int:
        """Bytes of everything that is stored."""
        rows = feature.num_embeddings * self.id_bytes(feature, precision) if self.has_rows else 0
        return rows + self.shared_bytes(feature)

    def check(self, feature: Feature) -> None:  # noqa: B027 - most have nothing to check
        """``ValueError`` for parameters that do not fit the feature."""

    def group(self, feature: Feature) -> Hashable:
        """Features of equal groups and pooling modes are pooled by one call."""
        return None

    def reset(self, module: Any) -> None:
        """Weights as they start, once more."""
        module.reset_parameters()

    def prepare(self, module: Any, ids: np.ndarray) -> None:  # noqa: B027 - most need not know
        """Told, before training, the feature's ``ids`` in all training samples, integers ``[n]``."""

    def dtype(self, module: nn.Module) -> torch.dtype:
        """Of the vectors."""
        return next(module.parameters()).dtype

    def pool(self, modules: Sequence[Any], bags: Bags, sparse: bool) -> Tensor:
        """One group's pooled vectors ``[B, sum D]``, by operators: with gradients, under compilers.

        ``bags`` are those of the whole batch; module i serves the i-th of ``bags.features``. Collections pool
        tables and deep hash embeddings themselves.
        """
        raise NotImplementedError(f"{self.name}: pooled by the collection")

    def quantised(self, module: nn.Module, quantise: Callable[[Tensor], nn.Module]) -> nn.Module:
        """A module for serving, for :meth:`pool` without gradients. ``quantise`` makes a
        :class:`mprec.nn.QuantizedTable` of a table of rows."""
        raise NotImplementedError(f"{self.name}: quantised by the collection")


class Representation(NamedTuple):
    """How a feature's IDs are represented.

    Attributes:
        name: what users write and checkpoints say.
        parts: each gives ``embedding_dim`` columns of the output, in this order.
        colour: of its curves in reports.
    """

    name: str
    parts: tuple[Part, ...]
    colour: str
