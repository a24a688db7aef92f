"""Operators: the only door to the kernels.

Each function here is also ``torch.ops.mprec.<name>``, with a gradient, for ``torch.compile`` and
``torch.export``. Called eagerly on plain CPU tensors that need no gradient, the functions skip torch's
dispatcher and go straight to the kernel; what that does not take goes to the operator. Tables in float32,
float16 and bfloat16 and decoders in float32 have native kernels; others are computed by
:mod:`mprec.reference` in float64 and rounded once. Bad IDs, offsets, dtypes, shapes and devices raise the
exceptions of :mod:`mprec.errors`, ``ValueError`` or ``TypeError``.

Backward passes run kernels. Derivatives of derivatives, forward-mode AD and the transforms of ``torch.func``
run the formulas of :mod:`mprec.reference` in plain torch.

CUDA: Triton kernels that do not wait for the device; bad IDs are left out and reported by a later call.
"""

from mprec.ops import _decompositions as _decompositions
from mprec.ops import _dhe_gradient as _dhe_gradient  # the operators without a function of their own
from mprec.ops import _flops as _flops
from mprec.ops import _tables as _tables
from mprec.ops import _updates as _updates
from mprec.ops._decoders import clear_decoders
from mprec.ops._dense import dot_interaction, mlp
from mprec.ops._embedding import embedding
from mprec.ops._functional import dhe_bag, dhe_bag_multi, embedding_bag, embedding_bag_multi, hash_encode

__all__ = [
    "clear_decoders",
    "dhe_bag",
    "dhe_bag_multi",
    "dot_interaction",
    "embedding",
    "embedding_bag",
    "embedding_bag_multi",
    "hash_encode",
    "mlp",
]
