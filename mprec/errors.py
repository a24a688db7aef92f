"""Exceptions that the kernels raise on bad input."""

__all__ = ["IdOutOfRangeError", "InvalidOffsetsError"]


class IdOutOfRangeError(IndexError, RuntimeError):
    """An ID is negative or not below the number of embeddings.

    Both an ``IndexError`` and a ``RuntimeError``: torch raises one or the other, depending on the path.
    """


class InvalidOffsetsError(ValueError, RuntimeError):
    """Offsets are not 0 = o[0] <= o[1] <= ... = number of indices (torch raises ``RuntimeError``)."""
