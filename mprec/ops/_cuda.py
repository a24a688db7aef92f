"""The operators on CUDA (and ROCm) tensors: Triton kernels, without waiting for the device.

Offsets and IDs are not checked before the launch, since that would wait: kernels clamp offsets, leave out
IDs out of range and count them, and a later call raises (``mprec.triton_kernels.faults``). What the kernels
lack (float64, gradients of the maximum, ...) goes the way of any other device.
"""

import inspect

from mprec.ops import _cuda_dhe, _cuda_tables
from mprec.ops._common import library
from mprec.ops._cuda_common import KERNEL_DTYPES

try:  # not public, and so perhaps elsewhere in another release: operators stay whole there
    from torch._subclasses.functional_tensor import FunctionalTensorMode
    from torch.export._trace import custom_triton_ops_decomposition_disabled
    from torch.library import register_torch_dispatch
except ImportError:
    register_torch_dispatch = None

for _operator in (
    _cuda_tables.embedding_bag,
    _cuda_tables.embedding_bag_backward,
    _cuda_tables.embedding_bag_multi,
    _cuda_tables.embedding_bag_multi_backward,
    _cuda_tables.quantized_embedding_bag_multi,
    _cuda_tables.table_sgd_,
    _cuda_tables.table_rowwise_adagrad_,
    _cuda_dhe.cached_dhe_bag,
    _cuda_dhe.dhe_bag,
    _cuda_dhe.dhe_bag_backward,
    _cuda_dhe.dhe_bag_multi,
    _cuda_dhe.dhe_bag_multi_backward,
    _cuda_dhe.quantized_dhe_bag_multi,
):
    library.impl(_operator.__name__, _operator, "CUDA")


def _see_through(operator, serves) -> None:
    """Let torch.compile replace the operator, on CUDA tensors that the kernels serve, by what it consists of.

    As ``torch.library.triton_op`` does, for an operator whose schema is defined elsewhere; ``torch.export``
    keeps the operator.
    """
    if register_torch_dispatch is None:
        return
    signature = inspect.signature(operator)

    def rule(mode, op, types, args, kwargs):
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        chosen = call.arguments
        if not chosen["indices"].is_cuda or custom_triton_ops_decomposition_disabled() or not serves(chosen):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return operator(*args, **kwargs)

    register_torch_dispatch(f"mprec::{operator.__name__}", FunctionalTensorMode, rule, lib=library)


# One feature: its tensors are arguments of the launches, which become nodes of a compiled graph. Many
# features: the launches take addresses, which a graph cannot have, so the operator is the node, and its
# arguments keep the tensors alive. Gradients of tables go through addresses too.
_see_through(_cuda_tables.embedding_bag, lambda call: call["weight"].dtype in KERNEL_DTYPES)
_see_through(_cuda_dhe.dhe_bag, lambda call: call["weights"][0].dtype in KERNEL_DTYPES)
_see_through(
    _cuda_dhe.dhe_bag_backward, lambda call: _cuda_dhe.backward_serves(call["mode"], call["weights"])
)
