"""Which operator has a kernel for which device, dtype and precision: asked of the operators themselves.

Each cell is one small call. ``kernel``: a kernel of that device takes it. ``torch``: it is right, by the
formula of ``mprec.reference`` in plain torch. Empty: it is refused.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch

import mprec
from mprec.kernels import kernels
from mprec.models.compiled import PRECISIONS
from mprec.names import FAMILIES, MODES
from mprec.nn.quantized import DECODER_PRECISIONS
from mprec.ops._table import OPS
from mprec.row_formats import ROW_FORMATS

DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MARKER = "<!-- support matrix -->"

ROWS, DIM, K = 5, 4, 4
IDS, OFFSETS = torch.tensor([1, 2]), torch.tensor([0, 1, 2])
DECODER = ("universal", "relu", "none")


def stack(dtype: torch.dtype, family: str = "universal", biases: bool = True) -> tuple:
    """Coefficients, weights and biases (or scales and biases) of a decoder with one hidden layer."""
    hashes = mprec.hashing.coefficients(K, family=family, seed=0)
    weights = [torch.ones(K, K).to(dtype), torch.ones(DIM, K).to(dtype)]
    if biases:
        return hashes, weights, [torch.ones(K, dtype=dtype), torch.ones(DIM, dtype=dtype)]
    return hashes, weights, [torch.ones(2, K), torch.ones(2, DIM)]


def table(dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(ROWS, DIM, dtype=dtype)


def grad(dtype: torch.dtype) -> torch.Tensor:
    return torch.ones(2, DIM, dtype=dtype)


def bags(mode: str = "sum") -> tuple:
    return IDS, OFFSETS, MODES[mode]


#: Calls of a dtype, by what the page says of them: (operator, its arguments of a dtype).
CALLS: dict[str, tuple[str, Callable[[torch.dtype], tuple]]] = {
    "bags of one table": ("embedding_bag", lambda d: (table(d), *bags())),
    "bags of many tables": ("embedding_bag_multi", lambda d: ([table(d)], *bags())),
    "gradient of a table, sum or mean": (
        "embedding_bag_backward",
        lambda d: (grad(d), table(d), *bags(), None, True, -1, False, False, True, False),
    ),
    "gradient of a table, maximum": (
        "embedding_bag_backward",
        lambda d: (grad(d), table(d), *bags("max"), None, True, -1, False, False, True, False),
    ),
    "sparse gradient of a table": (
        "embedding_bag_backward",
        lambda d: (grad(d), table(d), *bags(), None, True, -1, False, True, True, False),
    ),
    "gradient of per-sample weights": (
        "embedding_bag_backward",
        lambda d: (grad(d), table(d), *bags(), torch.ones(2, dtype=d), True, -1, False, False, True, True),
    ),
    "update of tables by SGD": (
        "table_sgd_",
        lambda d: ([table(d)], grad(torch.float32), *bags(), None, -1, [0], 1, [0], 0.1),
    ),
    "update of tables by row-wise Adagrad": (
        "table_rowwise_adagrad_",
        lambda d: (
            [table(d)],
            [torch.ones(ROWS, 1)],
            grad(torch.float32),
            *bags(),
            None,
            -1,
            [0],
            1,
            [0],
            0.1,
            1e-8,
        ),
    ),
    "bags of one deep hash embedding": ("dhe_bag", lambda d: (*bags()[:2], *stack(d), *DECODER)),
    "bags of many deep hash embeddings": (
        "dhe_bag_multi",
        lambda d: (*bags()[:2], [stack(d)[0]], *stack(d)[1:], [2], *DECODER),
    ),
    "gradient of a deep hash embedding, sum or mean": (
        "dhe_bag_backward",
        lambda d: (grad(d), *bags()[:2], *stack(d), *DECODER, MODES["sum"], None, True, -1, False),
    ),
    "gradient of a deep hash embedding, maximum": (
        "dhe_bag_backward",
        lambda d: (grad(d), *bags()[:2], *stack(d), *DECODER, MODES["max"], None, True, -1, False),
    ),
    "MLP": ("mlp", lambda d: (torch.ones(2, K, dtype=d), *stack(d)[1:], "relu", "none")),
    "dot interaction": ("dot_interaction", lambda d: (torch.ones(2, 3, DIM, dtype=d),)),
    "gradient of the dot interaction": (
        "dot_interaction_backward",
        lambda d: (torch.ones(2, 3, dtype=d), torch.ones(2, 3, DIM, dtype=d), False, None),
    ),
}


def rows_call(precision: str) -> tuple[str, tuple]:
    """Bags of a table in a row format."""
    form = ROW_FORMATS[precision]
    rows = form.encode(torch.arange(ROWS * DIM).view(ROWS, DIM).float())
    return "quantized_embedding_bag_multi", ([rows], [form.code], *bags())


def decoder_call(precision: str, family: str) -> tuple[str, tuple]:
    """Bags of a deep hash embedding whose decoder has a precision."""
    if precision == "float8":
        hashes, weights, affines = stack(torch.float8_e4m3fn, family, biases=False)
        many = [hashes], weights, affines, [2], family, *DECODER[1:]
        return "quantized_dhe_bag_multi", (*bags()[:2], *many)
    hashes, weights, biases = stack(torch.float32, family)
    if precision == "float32":
        return "dhe_bag_multi", (*bags()[:2], [hashes], weights, biases, [2], family, *DECODER[1:])
    many = [hashes], weights, biases, [2], family, *DECODER[1:]
    return "packed_dhe_bag_multi", (*bags()[:2], *many, [precision])


# ------------------------------------------------------------------------------------ what the operators say


def served(operator: str, device: str, arguments: tuple[Any, ...]) -> str:
    """``kernel``, ``torch`` or nothing, of a call on CPU tensors as it would be on a device."""
    if device == "cpu":
        try:
            getattr(torch.ops.mprec, operator)(*arguments)
        except (TypeError, NotImplementedError):
            return ""
    op = OPS[operator]
    call = op.check(op.call(*arguments))
    if any(kernel.supports(call) for kernel in kernels(operator, device)):
        return "kernel"
    return "torch" if op.reference is not None else ""


# ----------------------------------------------------------------------------------------------- as a page


def matrix() -> str:
    """The page's tables, in Markdown."""
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    head = ["operation", "operator", *(f"{device} {name}" for device in DEVICES for name in names)]
    by_dtype = []
    for what, (operator, arguments) in CALLS.items():
        cells = (served(operator, device, arguments(d)) for device in DEVICES for d in DTYPES)
        by_dtype.append([what, f"`{operator}`", *cells])
    rows = []
    for name in ROW_FORMATS:
        operator, arguments = rows_call(name)
        rows.append([name, f"`{operator}`", *(served(operator, device, arguments) for device in DEVICES)])
    decoders = []
    for precision, families in DECODER_PRECISIONS.items():
        for family in FAMILIES:
            if families is not None and family not in families:
                continue
            operator, arguments = decoder_call(precision, family)
            cells = (served(operator, device, arguments) for device in DEVICES)
            decoders.append([precision, family, f"`{operator}`", *cells])
    return "\n\n".join([
        "## Operators by dtype",
        as_table(head, by_dtype),
        "## Row formats of tables",
        as_table(["rows", "operator", *DEVICES], rows),
        "## Precisions of decoders",
        as_table(["precision", "hash family", "operator", *DEVICES], decoders),
        "## Whole paths",
        f"`mprec.compile_path` makes native calls of models on CPUs (dense layers: {', '.join(PRECISIONS)}) "
        "and CUDA graphs of models on GPUs (dense layers: float32).",
        "## Instruction sets",
        f"Kernels for {', '.join(mprec._C.isas)}. The best one that the CPU has is chosen at load.",
    ])  # fmt: skip


def as_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def on_page_markdown(markdown, page, config, files):
    if MARKER in markdown:
        logging.getLogger("mkdocs.hooks.support").info("asking the operators for the support matrix")
        return markdown.replace(MARKER, matrix())
    return markdown
