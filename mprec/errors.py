"""mprec's own exceptions."""

__all__ = [
    "CheckpointError",
    "DataError",
    "DatasetNotInstalledError",
    "DeviceError",
    "DtypeError",
    "IdOutOfRangeError",
    "InvalidOffsetsError",
    "PathCompileError",
    "TrainingError",
    "TrainingInterruptedError",
]


class DtypeError(TypeError, RuntimeError):
    """A tensor's dtype is not one the operator takes (torch raises ``RuntimeError``)."""


class DeviceError(ValueError, RuntimeError):
    """Tensors of one call are on different devices (torch raises ``RuntimeError``)."""


class IdOutOfRangeError(IndexError, RuntimeError):
    """An ID is negative or not below the number of embeddings.

    Both an ``IndexError`` and a ``RuntimeError``: torch raises one or the other, depending on the path.
    """


class InvalidOffsetsError(ValueError, RuntimeError):
    """Offsets are not 0 = o[0] <= o[1] <= ... = number of indices (torch raises ``RuntimeError``)."""


class DataError(ValueError):
    """A data file or a dataset is not what it should be; the message says where (``file:line`` for text)."""


class DatasetNotInstalledError(DataError):
    """A dataset was asked for that is not on this machine; the message says how to get it."""


class CheckpointError(ValueError):
    """A file is not a checkpoint of mprec's, is damaged, or was written by a newer version."""


class PathCompileError(ValueError):
    """A model that :func:`mprec.compile_path` does not take; the message says what in it, and why."""


class TrainingError(RuntimeError):
    """Training cannot go on: the loss is not a finite number."""


class TrainingInterruptedError(TrainingError):
    """Training was told to stop before its end; where it was given a snapshot, it can go on from there."""
