"""``mprec.compile_path``: a model's whole path as one call, in the way of the device that the model is on."""

from __future__ import annotations

from torch import nn

from mprec.models.captured import CapturedPath
from mprec.models.compiled import CompiledPath

__all__ = ["compile_path"]


def compile_path(model: nn.Module, precision: str = "float32") -> CompiledPath | CapturedPath:
    """The model's whole path as one call, ``(dense, bags) -> click probabilities [B]``.

    Takes a :class:`mprec.models.DLRM`, a path of a multi-path model (``model.path(name)``) or a multi-path
    model itself (its hybrid path).

    *On the CPU* the call is native (:class:`CompiledPath`). The model is in float32; its embeddings are
    tables of any precision, also of low rank, deep hash embeddings of any precision but float8, hybrids of
    both (decoded into longer rows, too), or hot rows over a rest. Tables are read where they lie; other
    weights are packed once, and again when they changed (as packed decoders are: see
    :func:`mprec.ops.clear_decoders`; a call of n samples counts as n / 4 IDs). Row caches and codebooks of a
    :class:`mprec.cache.CachedEmbeddingBagCollection` are asked and filled as in its own calls, which may run
    at the same time; only its ``options`` are not read. Any of these may be
    in a :class:`mprec.nn.MeanForUnseen`.

    *On CUDA* the call replays a graph that was captured for the batch's size (:class:`CapturedPath`). Dense
    layers are float32, embeddings any whose operators do not wait for the device.

    Args:
        model: evaluated as it is at each call; without gradients.
        precision: of the dense layers. ``"bfloat16"`` rounds weights and inputs of every layer but the last,
            and adds up in float32. ``"int8"`` rounds them to integers, weights to -127 to 127 by a step of
            each output, inputs to 0 to 127 by a range of each sample, and adds up exactly; layers of fewer
            than 32 inputs or of one output stay float32. There an input that is not finite makes its
            sample's score NaN. Both are for the CPU.

    Raises:
        PathCompileError: what is not compiled, and why; ``model(...).sigmoid()`` still serves.
        ValueError: unknown precision.
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    on_cuda = any(parameter.is_cuda for parameter in parameters)
    return CapturedPath(model, precision) if on_cuda else CompiledPath(model, precision)
