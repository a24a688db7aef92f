"""Launches that torch.compile can see through."""

from torch.library import wrap_triton

from mprec.tracing import traced


def launchable(kernel):
    """The kernel to index with a grid; while torch.compile traces, one that becomes a node of its graph."""
    return wrap_triton(kernel) if traced() else kernel
