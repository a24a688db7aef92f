"""Which parameters of a module are tables."""

from torch import nn

__all__ = ["split_parameters"]


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of a module as (embedding tables, everything else), each once."""
    tables = {
        id(child.weight)
        for child in module.modules()
        if isinstance(child, nn.EmbeddingBag) or getattr(child, "is_embedding_table", False)
    }
    parameters = list(module.parameters())
    return [p for p in parameters if id(p) in tables], [p for p in parameters if id(p) not in tables]
