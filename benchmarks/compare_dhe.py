"""Rows of ``compare.py``: deep hash embeddings against torch, their own float32, and the machine."""

from collections.abc import Callable, Iterator

import ceilings
import harness
import torch
from compare import Row
from dhe_peers import SHAPES, Artifact, GoodTorch, zipf

from mprec._native import _C
from mprec.names import ACTIVATIONS, FAMILIES
from mprec.nn import DeepHashEmbeddingBag, DheConfig

BATCHES = (1, 16, 128, 2048)
VS_TORCH = {"1024-128-16": (12, 4, 1.8, 2), "1024-512-256-64": (4, 2.3, 1.35, 1.35)}
VS_ARTIFACT = {"1024-128-16": (10, 1, 1, 3.5), "1024-512-256-64": (1, 1, 1, 1)}


def make_module(shape: str, family: str = "universal") -> DeepHashEmbeddingBag:
    k, hidden, dim = SHAPES[shape]
    return DeepHashEmbeddingBag(dim, DheConfig(k=k, hidden=hidden, family=family))


def pack(module: DeepHashEmbeddingBag, precision: str = "float32", layers: int | None = None):
    """The module's native decoder; only the first ``layers`` layers."""
    stack = list(module.decoder)[:layers]
    config = module.config
    last = config.last_activation if len(stack) == len(module.decoder) else config.activation
    return _C.Decoder(
        module.coefficients,
        [layer.weight.detach() for layer in stack],
        [layer.bias.detach() for layer in stack],
        FAMILIES[config.family],
        ACTIVATIONS[config.activation],
        ACTIVATIONS[last],
        precision,
    )


def uniform(batch: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randint(0, 10**9, (batch,))


def native_call(handle, batch: int, threads: int = 1, dedupe: bool | None = None):
    """The kernel alone, into a buffer that is used again."""
    offsets, out = torch.arange(batch), torch.empty(batch, handle.dim)

    def call(ids):
        _C.dhe_bag(handle, ids, offsets, None, 0, False, -1, out, threads, dedupe)

    return call


def module_call(module: DeepHashEmbeddingBag, batch: int):
    offsets = torch.arange(batch)
    return lambda ids: module(ids, offsets)


def multiply_adds(handle) -> int:
    return sum(a * b for a, b in zip(handle.dims, handle.dims[1:], strict=False))


class Rows:
    """Measures two candidates on equal inputs, if the work's name is wanted."""

    def __init__(self, seconds: float, only: str) -> None:
        self.seconds, self.only = seconds, only

    def compare(self, work, peer, ours, theirs, make_input, target, note="") -> Iterator[Row]:
        if self.only in work:
            t = harness.interleaved({"ours": ours, "theirs": theirs}, make_input, seconds=self.seconds)
            yield Row(work, peer, t["ours"].p50 * 1e6, t["theirs"].p50 * 1e6, target, note)

    def bound(self, work, peer, ours, make_input, bound_s, target, note="") -> Iterator[Row]:
        """Against the time that a limit of the machine allows: the ratio is the share of it reached."""
        if self.only in work:
            t = harness.interleaved({"ours": ours}, make_input, seconds=self.seconds / 2)
            yield Row(work, peer, t["ours"].p50 * 1e6, bound_s * 1e6, target, note)


@torch.inference_mode(False)
def _modules(family: str) -> dict[str, DeepHashEmbeddingBag]:
    return {shape: make_module(shape, family) for shape in SHAPES}


def rows(seconds: float, only: str) -> Iterator[Row]:
    measure = Rows(seconds, only)
    with harness.threads(1):
        yield from _against_torch(measure)
        yield from _against_limits(measure)
        yield from _against_float32(measure)
        yield from _gradients(measure)
    with harness.threads(2):
        yield from _two_threads(measure)


def _against_torch(measure: Rows) -> Iterator[Row]:
    universal, artifact = _modules("universal"), _modules("artifact")
    for shape in SHAPES:
        peer, formula = GoodTorch(universal[shape]), Artifact(artifact[shape])
        compiled = torch.compile(peer, dynamic=False)
        for i, batch in enumerate(BATCHES):
            ids, ours = uniform(batch), module_call(universal[shape], batch)
            work = f"dhe {shape} batch {batch}"
            yield from measure.compare(work, "good torch", ours, peer, ids, VS_TORCH[shape][i], "module call")
            yield from measure.compare(work, "torch.compile of it", ours, compiled, ids, 1, "module call")
            yield from measure.compare(
                f"dhe artifact {shape} batch {batch}",
                "the artifact's formula in torch",
                module_call(artifact[shape], batch),
                formula,
                ids,
                VS_ARTIFACT[shape][i],
                "module call",
            )


def _against_limits(measure: Rows) -> Iterator[Row]:
    for shape, module in _modules("universal").items():
        handle = pack(module)
        for batch in (128, 2048):
            flops = 2 * multiply_adds(handle) * batch
            yield from measure.compare(
                f"dhe kernel {shape} batch {batch}",
                "FMA peak, of the matrix products alone",
                native_call(handle, batch),
                lambda _, flops=flops: ceilings.multiply_add(flops),  # in turn: the clock changes
                uniform(batch),
                0.85,
            )
        bandwidth = ceilings.read_bandwidth(handle.nbytes)
        yield from measure.bound(
            f"dhe kernel {shape} batch 1",
            "reading the weights once",
            native_call(handle, 1),
            uniform(1),
            handle.nbytes / bandwidth,
            0.8,
            f"{handle.nbytes >> 10} KiB at {bandwidth / 1e9:.0f} GB/s",
        )


def _against_float32(measure: Rows) -> Iterator[Row]:
    for shape in SHAPES:
        handle = pack(_modules("universal")[shape])
        yield from measure.compare(
            f"dhe dedupe {shape} batch 2048, Zipf(1.05)",
            "every ID computed",
            native_call(handle, 2048, dedupe=True),
            native_call(handle, 2048, dedupe=False),
            lambda: zipf(2048),
            1.6,
        )
        for precision, family, target in (("int8", "u7", 1.5), ("lut", "sign", 2.5), ("float16", "u7", 1)):
            module = _modules(family)[shape]
            for batch in (1, 128, 2048):
                yield from measure.compare(
                    f"dhe {precision} {shape} batch {batch}",
                    "own float32",
                    native_call(pack(module, precision), batch),
                    native_call(pack(module), batch),
                    uniform(batch),
                    target if batch > 1 else 1,
                )
            if precision != "float16":
                yield from measure.compare(
                    f"dhe {precision} {shape} first layer batch 1",
                    "own float32",
                    native_call(pack(module, precision, 1), 1),
                    native_call(pack(module, layers=1), 1),
                    uniform(1),
                    6,
                )


def _training_step(call: Callable, parameters: list[torch.Tensor], dim: int) -> Callable:
    """Forward and backward; the gradients are dropped."""

    def step(ids):
        with torch.inference_mode(False), torch.enable_grad():
            torch.autograd.grad(call(ids.clone()), parameters, torch.ones(len(ids), dim))

    return step


def _gradients(measure: Rows) -> Iterator[Row]:
    for shape, module in _modules("universal").items():
        peer = GoodTorch(module)
        peer.layers = [(layer.weight, layer.bias) for layer in module.decoder]
        parameters = [p for layer in peer.layers for p in layer]
        for batch in (128, 2048):
            with torch.inference_mode(False):
                ours = module_call(module, batch)
            yield from measure.compare(
                f"dhe gradients {shape} batch {batch}",
                "good torch, forward and backward",
                _training_step(ours, parameters, module.embedding_dim),
                _training_step(peer, parameters, module.embedding_dim),
                uniform(batch),
                1,
                "forward and backward",
            )


def _two_threads(measure: Rows) -> Iterator[Row]:
    for shape, module in _modules("universal").items():
        handle = pack(module)
        wanted = any(measure.only in f"dhe 2 threads {shape} batch {batch}" for batch in BATCHES)
        ceiling = ceilings.two_threads_note() if wanted else ""
        for batch, target in ((1, 0.95), (16, 0.95), (128, 1.8), (2048, 1.8)):  # few rows: no slower
            yield from measure.compare(
                f"dhe 2 threads {shape} batch {batch}",
                "1 thread",
                native_call(handle, batch, 2),
                native_call(handle, batch, 1),
                uniform(batch),
                target,
                ceiling,
            )
