"""The operators as they run on CUDA tensors, called past torch's dispatcher, wherever their arguments are."""

from functools import partial

from mprec.ops._table import OPS


def __getattr__(name: str):
    if name not in OPS:
        raise AttributeError(name)
    return partial(OPS[name].run, device="cuda")
