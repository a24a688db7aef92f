"""Rows of ``compare.py``: whole paths of a DLRM as one native call, against the same model in torch and
compiled by torch, by zentorch and in ONNX Runtime, and the machine.

zentorch and ONNX Runtime are compared where they are installed: zentorch==2.13.0.1 is for torch 2.13.
"""

import importlib
from collections.abc import Callable, Iterator

import ceilings
import harness
import onnx_peers
import torch
from compare import Row
from torch import Tensor, nn

import mprec
from mprec.models import DLRM
from mprec.nn import FeatureConfig

BATCHES = (1, 16, 128, 2048)
KAGGLE = (
    3,
    4,
    10,
    15,
    18,
    24,
    27,
    105,
    305,
    583,
    633,
    1460,
    2173,
    3194,
    5652,
    5683,
    12517,
    14992,
    93145,
    142572,
)
TERABYTE = (3, 4, 10, 14, 36, 61, 101, 122, 970, 1442, 2208, 7112, 7378, 11156, 12420, 17217, 20134, 36084)
#: Vocabularies (capped at a million), vector size, hidden layers of the bottom and the top MLP.
SHAPES = {
    "Kaggle d16": ((*KAGGLE, 286181, *[10**6] * 5), 16, (512, 256, 64), (512, 256)),
    "Terabyte d64": ((*TERABYTE, 313829, 415421, *[10**6] * 6), 64, (512, 256), (512, 512, 256)),
}
PEERS = {"inductor": "torch.compile, frozen", "zentorch": "zentorch, compiled", "onnx": "ONNX Runtime"}
VS_EAGER = (8, 4, 1.8, 1.5)
VS_COMPILED = (3, 2, 1.2, 1.12)
PEAK_SHARE, READ_SHARE, TWO_THREADS = 0.88, 1 / 1.4, 1.85
#: Fewer bits against float32, where the CPU has the instructions.
BFLOAT16, INT8, INT8_AVX2 = 1.6, 2.5, 1.4


class Plain(nn.Module):
    """The model as one writes it in torch, on the weights of ``model``."""

    def __init__(self, model: DLRM) -> None:
        super().__init__()
        self.bottom, self.top = model.bottom, model.top
        tables = model.embeddings.tables.values()
        self.tables = nn.ModuleList(
            nn.EmbeddingBag.from_pretrained(table.weight.detach(), mode="sum", include_last_offset=True)
            for table in tables
        )
        count = 1 + len(self.tables)
        rows, columns = torch.tril_indices(count, count, offset=-1)
        self.register_buffer("pairs", rows * count + columns)

    def forward(self, dense: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        """``indices`` [T, B], one ID a bag; ``offsets`` [B + 1]."""
        return self.logits(dense, indices, offsets).sigmoid()

    def logits(self, dense: Tensor, indices: Tensor, offsets: Tensor) -> Tensor:
        first = self.bottom(dense)
        vectors = [first] + [table(ids, offsets) for table, ids in zip(self.tables, indices, strict=True)]
        stacked = torch.stack(vectors, dim=1)
        products = torch.bmm(stacked, stacked.transpose(1, 2)).flatten(1)[:, self.pairs]
        return self.top(torch.cat([first, products], dim=1)).squeeze(1)


def make_model(shape: str) -> DLRM:
    vocabularies, dim, bottom, top = SHAPES[shape]
    features = [FeatureConfig(f"f{i}", size, dim) for i, size in enumerate(vocabularies)]
    with torch.inference_mode(False):  # weights of inference mode have no counter of changes
        return DLRM(features, 13, dim, bottom, top).eval()


def multiply_adds(model: DLRM) -> int:
    """Products of one sample: weights, and pairs of vectors."""
    weights = sum(m.weight.numel() for m in (*model.bottom, *model.top) if isinstance(m, nn.Linear))
    tables = len(model.features)
    return weights + tables * (tables + 1) // 2 * model.embedding_dim


def draws(model: DLRM, batch: int) -> Callable[[], tuple[Tensor, Tensor]]:
    sizes = torch.tensor([[f.num_embeddings] for f in model.features])
    return lambda: (
        torch.randn(batch, model.num_dense),
        (torch.rand(len(sizes), batch, dtype=torch.float64) * sizes).long(),
    )


def compiled(plain: Plain, batch: int, backend: str) -> Callable | None:
    """As torch compiles it with its weights frozen, or zentorch; None where they cannot."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    try:
        if backend != "inductor":
            importlib.import_module(backend)
        with inductor.patch(freezing=True), torch.no_grad():
            call = torch.compile(plain, dynamic=False, backend=backend)
            inputs = _example(plain, batch)
            for _ in range(2):
                call(*inputs)
    except Exception as error:  # no compiler, say: the other rows are still worth having
        print(f"not compared, {backend}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return None
    return lambda x, bags: _without_gradients(call, x, bags)


@torch.no_grad()
def _without_gradients(call: Callable, x: tuple[Tensor, Tensor], bags: Tensor) -> Tensor:
    """Zentorch compiles for inference alone, and each mode of gradients is compiled by itself."""
    return call(x[0], x[1], bags)


def _example(plain: Plain, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    indices = torch.zeros(len(plain.tables), batch, dtype=torch.int64)
    return torch.randn(batch, plain.bottom[0].in_features), indices, torch.arange(batch + 1)


def mlps(model: DLRM) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Both MLPs by mprec's operator: (bottom's inputs, top's inputs) -> their outputs."""

    def stack(layers: nn.Sequential) -> tuple[list[Tensor], list[Tensor]]:
        linear = [m for m in layers if isinstance(m, nn.Linear)]
        return [m.weight for m in linear], [m.bias for m in linear]

    bottom, top = stack(model.bottom), stack(model.top)
    last = "relu" if isinstance(model.bottom[-1], nn.ReLU) else "none"
    return lambda dense, products: (
        mprec.ops.mlp(dense, *bottom, "relu", last),
        mprec.ops.mlp(products, *top, "relu", "none"),
    )


def names() -> list[str]:
    return [f"whole path, {shape}, batch {batch}" for shape in SHAPES for batch in BATCHES]


def rows(seconds: float, only: str) -> Iterator[Row]:
    for shape in SHAPES:
        wanted = [i for i, batch in enumerate(BATCHES) if only in f"whole path, {shape}, batch {batch}"]
        if not wanted:
            continue
        model = make_model(shape)
        path, plain = mprec.compile_path(model), Plain(model).eval()
        for i in wanted:
            yield from _rows_of_batch(f"whole path, {shape}, batch {BATCHES[i]}", i, path, plain, seconds)


def _rows_of_batch(work, i, path, plain, seconds) -> Iterator[Row]:
    batch, model = BATCHES[i], path.model
    offsets, bags = torch.arange(len(model.features) * batch + 1), torch.arange(batch + 1)
    flops = 2 * multiply_adds(model) * batch
    products = torch.randn(batch, model.top[0].in_features)
    ours_alone = mlps(model)
    candidates = {
        "ours": lambda x: path(x[0], x[1].view(-1), offsets),
        "eager": lambda x: plain(x[0], x[1], bags),
        "module": lambda x: model(x[0], x[1].view(-1), offsets).sigmoid(),
    }
    for backend in ("inductor", "zentorch"):
        if (call := compiled(plain, batch, backend)) is not None:
            candidates[backend] = lambda x, call=call: call(x, bags)
    if onnx_peers.available():
        whole, their_mlps = onnx_peers.whole(model), onnx_peers.mlps(model)
        candidates["onnx"] = lambda x: whole(*x)
        pair = products[:, : model.num_dense], products
        torch.testing.assert_close(ours_alone(*pair), their_mlps(*pair), rtol=1e-4, atol=1e-5)
    else:
        print("not compared, ONNX Runtime: not installed", flush=True)
    item = draws(model, batch)()
    for name in candidates:
        torch.testing.assert_close(candidates[name](item), candidates["ours"](item), rtol=1e-4, atol=1e-5)
    candidates["peak"] = lambda x: ceilings.multiply_add(flops)
    for precision in ("bfloat16", "int8"):
        low = mprec.compile_path(model, precision)
        candidates[precision] = lambda x, low=low: low(x[0], x[1].view(-1), offsets)
    candidates["mlps"] = lambda x: ours_alone(x[0], products)
    if "onnx" in candidates:
        candidates["onnx mlps"] = lambda x: their_mlps(x[0], products)
    t = harness.interleaved(candidates, draws(model, batch), seconds=seconds)
    us = {name: timing.p50 * 1e6 for name, timing in t.items()}
    ours, note = us["ours"], f"{us['peak'] / us['ours']:.0%} of the FMA peak of its products"
    yield Row(work, "torch, nn.EmbeddingBag", ours, us["eager"], VS_EAGER[i], note)
    yield Row(work, "mprec's DLRM module", ours, us["module"], 1)
    for backend, name in PEERS.items():
        if backend in us:
            yield Row(work, name, ours, us[backend], VS_COMPILED[i])
    if "onnx mlps" in us:
        yield Row(f"{work}, its two MLPs alone", "ONNX Runtime", us["mlps"], us["onnx mlps"], 1)
    if batch == 1:
        read = path.nbytes / ceilings.read_bandwidth(path.nbytes) * 1e6
        yield Row(work, "reading its weights once", ours, read, READ_SHARE)
    if batch >= 128:
        yield Row(work, "FMA peak of its products", ours, us["peak"], PEAK_SHARE)
        for precision, target in _low_precision_targets(mprec._C.runnable_isas()):
            yield Row(f"{work}, {precision}", "its float32", us[precision], ours, target)
        yield from _two_threads(work, path, model, batch, offsets, seconds)


def _low_precision_targets(isas: list[str]) -> Iterator[tuple[str, float]]:
    if "avx512bf16" in isas:
        yield "bfloat16", BFLOAT16
    if "avx2" in isas:
        yield "int8", INT8 if "avx512vnni" in isas else INT8_AVX2


def _two_threads(work, path, model, batch, offsets, seconds) -> Iterator[Row]:
    def on(threads):
        def call(x):
            torch.set_num_threads(threads)
            path(x[0], x[1].view(-1), offsets)

        return call

    with harness.threads(1):
        t = harness.interleaved({"one": on(1), "two": on(2)}, draws(model, batch), seconds=seconds / 2)
    one, two = t["one"].p50 * 1e6, t["two"].p50 * 1e6
    yield Row(work, "itself on one thread", two, one, TWO_THREADS, ceilings.two_threads_note())
