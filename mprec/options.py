"""How a module's native calls run: options that never change a result."""

from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["DEFAULT_OPTIONS", "Options", "RunOptions", "TuningTraits", "check_options"]


class RunOptions(NamedTuple):
    """Run-time options of kernels on the CPU. ``None`` lets the kernel decide.

    Attributes:
        threads: at most this many.
        dedupe: decode equal IDs of a batch once. Never changes a result.
        cache: look IDs up before decoding them, where there is a cache (None: yes).
    """

    threads: int | None = None
    dedupe: bool | None = None
    cache: bool | None = None


#: None: kernels choose by rules. A function from the number of samples to options. "auto": such a function,
#: made from measurements at the first call without gradients.
Options = Callable[[int], RunOptions] | str | None

DEFAULT_OPTIONS = RunOptions()


def check_options(options: Options) -> Options:
    """``options`` itself. Raises ``ValueError`` unless it is None, "auto" or callable."""
    if options is not None and options != "auto" and not callable(options):
        raise ValueError(f"options: expected None, 'auto' or a function of the batch size, got {options!r}")
    return options


class TuningTraits(NamedTuple):
    """What a module says of itself, so that its options can be measured.

    Attributes:
        has_dhe: it decodes hashed IDs.
        has_cache: it looks IDs up before decoding them.
        vocabularies: number of IDs of each of its features.
        shape: JSON types that name what is measured: a profile of another shape is not this module's.
        takes_batches: its input is the indices and offsets of a whole batch, one bag per feature and sample.
    """

    has_dhe: bool
    has_cache: bool
    vocabularies: list[int]
    shape: list[Any]
    takes_batches: bool
