"""The dense half of a ranking model: MLPs, and the products of pairs of vectors."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mprec.layers import run_as_modules
from mprec.names import ACTIVATIONS, code
from mprec.ops import dot_interaction, mlp
from mprec.reference import activate

__all__ = ["MLP", "DotInteraction"]


class MLP(nn.Module):
    """A stack of linear layers on mprec's kernels: bias and activation are part of the matrix product.

    Takes the place of Facebook's ``nn.Sequential`` of ``nn.Linear`` and ``nn.ReLU`` (with ``last_activation``
    ``"relu"`` for a bottom MLP) and of ``torchrec.modules.mlp.MLP``.

    Args:
        sizes: inputs, then outputs of each layer; at least two.
        activation: behind every layer but the last: ``"none"``, ``"relu"``, ``"sigmoid"`` or ``"mish"``.
        last_activation: behind the last.
        device, dtype: of the weights.

    Shape: ``[..., sizes[0]]`` to ``[..., sizes[-1]]``.

    Attributes:
        layers: ``nn.Linear`` modules, with torch's initialisation. They are called only where one of them has
            hooks or a forward pass of its own; else kernels read their weights.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str = "relu",
        last_activation: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"sizes: expected at least two, each at least 1, got {list(sizes)}")
        code(ACTIVATIONS, activation, "activation")
        code(ACTIVATIONS, last_activation, "last_activation")
        self.activation, self.last_activation = activation, last_activation
        self.layers = nn.ModuleList(
            nn.Linear(inputs, outputs, device=device, dtype=dtype)
            for inputs, outputs in itertools.pairwise(sizes)
        )

    def forward(self, input: Tensor) -> Tensor:
        if run_as_modules(self.layers):
            x, last = input, len(self.layers) - 1
            for i, layer in enumerate(self.layers):
                x = activate(layer(x), self.last_activation if i == last else self.activation)
            return x
        weights, biases = [x.weight for x in self.layers], [x.bias for x in self.layers]
        rows = input.reshape(-1, input.shape[-1]) if input.dim() != 2 else input
        out = mlp(rows, weights, biases, self.activation, self.last_activation)
        return out if input.dim() == 2 else out.reshape(*input.shape[:-1], out.shape[-1])

    def extra_repr(self) -> str:
        return f"{self.activation}, last {self.last_activation}"


class DotInteraction(nn.Module):
    """Dot products of all pairs of a sample's vectors, behind the first of them.

    Computes only the products that are kept, where ``torch.bmm`` computes every one twice. Takes the place of
    ``torchrec.models.dlrm.InteractionArch`` and of ``interact_features`` (``"dot"``) in Facebook's DLRM.

    Args:
        self_interaction: of each vector with itself, too (Facebook's ``--arch-interaction-itself``).

    Shape: ``dense`` ``[B, D]`` and ``sparse`` ``[B, F, D]`` to ``[B, D + F (F + 1) / 2]``, with
    ``self_interaction`` ``[B, D + (F + 1) (F + 2) / 2]``: the dense vector, then products (1,0) (2,0) (2,1)
    (3,0) and so on, where vector 0 is the dense one.
    """

    def __init__(self, self_interaction: bool = False) -> None:
        super().__init__()
        self.self_interaction = self_interaction

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        if dense.dim() != 2 or sparse.dim() != 3 or sparse.shape[::2] != dense.shape:
            raise ValueError(
                f"dense, sparse: expected [B, D] and [B, F, D], got {list(dense.shape)} and "
                f"{list(sparse.shape)}"
            )
        return dot_interaction(sparse, self.self_interaction, dense)

    def extra_repr(self) -> str:
        return f"self_interaction={self.self_interaction}"
