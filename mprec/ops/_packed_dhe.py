"""``torch.ops.mprec.packed_dhe_bag_multi``: deep hash embeddings whose decoders are packed in few bytes, for
serving on the CPU under compilers. (Called eagerly, modules go past operators.)"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mprec._native import _C
from mprec.ops import _dhe
from mprec.ops._checks import check_same_device
from mprec.ops._common import library, plain
from mprec.ops._decoders import decoder

# precisions: of each decoder, as of mprec.nn.QuantizedEmbeddingBagCollection
library.define(
    "packed_dhe_bag_multi(Tensor indices, Tensor offsets, Tensor[] coefficients, Tensor[] weights, "
    "Tensor[] biases, int[] layers, str family, str activation, str last_activation, str[] precisions, "
    "int mode=0, Tensor? per_sample_weights=None, int[]? features=None, int? num_features=None) -> Tensor"
)


def _packed_dhe_bag_multi(
    indices: Tensor,
    offsets: Tensor,
    coefficients: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    layers: Sequence[int],
    family: str,
    activation: str,
    last_activation: str,
    precisions: Sequence[str],
    mode: int = 0,
    per_sample_weights: Tensor | None = None,
    features: Sequence[int] | None = None,
    num_features: int | None = None,
) -> Tensor:
    options = family, activation, last_activation
    stacks = _dhe.stacks_of(coefficients, weights, biases, layers, options)
    check_same_device(
        indices=indices,
        offsets=offsets,
        coefficients=coefficients,
        weights=weights,
        biases=biases,
        per_sample_weights=per_sample_weights,
    )
    indices, offsets, num_features = _dhe.checked_multi(
        indices, offsets, torch.float32, mode, per_sample_weights, features, num_features, len(layers)
    )
    return _C.dhe_bag_multi(
        [decoder(*stack, *options, p) for stack, p in zip(stacks, precisions, strict=True)],
        indices,
        offsets,
        plain(per_sample_weights),
        mode,
        -1,
        None,
        None,
        torch.get_num_threads(),
        features=features,
        num_features=num_features,
    )


def _packed_dhe_bag_multi_fake(
    indices, offsets, coefficients, weights, biases, layers, family, activation, last_activation, precisions,
    mode=0, per_sample_weights=None, features=None, num_features=None,
):  # fmt: skip
    batch = (offsets.shape[0] - 1) // (len(layers) if num_features is None else num_features)
    dims = [stack[-1].shape[0] for stack in _dhe._split(layers, weights)]
    return weights[0].new_empty(batch, sum(dims))


library.impl("packed_dhe_bag_multi", _packed_dhe_bag_multi, "CPU")
torch.library.register_fake("mprec::packed_dhe_bag_multi", _packed_dhe_bag_multi_fake, lib=library)
