"""Exceptions that the kernels raise on bad input."""

__all__ = ["DeviceError", "DtypeError", "IdOutOfRangeError", "InvalidOffsetsError"]


class DtypeError(TypeError, RuntimeError):
    """A tensor's dtype is not one the operator takes (torch raises ``RuntimeError``)."""


class DeviceError(ValueError, RuntimeError):
    """Tensors of one call are on different devices (torch raises ``RuntimeError``)."""


class IdOutOfRangeError(IndexError, RuntimeError):
    """An ID is negative or not below the number of embeddings.

    Both an ``IndexError`` and a ``RuntimeError``: torch raises one or the other, depending on the path.
    """


class InvalidOffsetsError(ValueError, RuntimeError):
    """Offsets are not 0 = o[0] <= o[1] <= ... <= number of indices (torch raises ``RuntimeError``)."""
