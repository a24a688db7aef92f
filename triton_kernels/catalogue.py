"""Representative calls of every kernel: what the static gates compile, and what `benchmarks/gpu.py` runs."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from mprec.hashing import check_family
from mprec.reference import FLOAT8
from mprec.row_formats import ROW_FORMATS

from . import autotune, dhe, dhe_gradient, embedding_bag, gradient, row_cache

FEATURES = 26  # as in Criteo's logs
SHRINK = 1  # decoders' widths are divided by this: a rehearsal sets it


class Call(NamedTuple):
    """One call, its work, and where its results are.

    flops counts matrix products only, bytes what must cross device memory at least once. `reference`
    computes the same by plain torch operations (None: there is no such thing). `calls`: other ways to the
    same result, by name, that are timed as they are.
    """

    run: Callable[[], object]
    flops: float
    bytes: float
    reference: Callable[[], object] | None
    tune: Callable[[Callable], object] | None = None  # with a stopwatch: choose tile sizes and keep them
    calls: Mapping[str, Callable[[], object]] = {}


class Case(NamedTuple):
    """A named call for a number of samples: make(device, samples) -> Call.

    peer(device, samples) gives the same work by another library, or None where that is not installed.
    targets: the tuning targets that have it (None: all).
    """

    name: str
    make: Callable[[torch.device, int], Call]
    samples: int = 2048
    peer: Callable[[torch.device, int], Callable[[], object] | None] | None = None
    targets: tuple[str, ...] | None = None

    def serves(self, target: str) -> bool:
        return self.targets is None or target in self.targets


def dhe_case(k, widths, dtype, family="universal", samples=2048) -> Case:
    def make(device, samples):
        return call(device, samples, k // SHRINK, [max(8, width // SHRINK) for width in widths])

    def call(device, samples, k, widths):
        generator = torch.Generator().manual_seed(0)
        n = samples * FEATURES
        ids = torch.randint(0, 10**7, (n,), generator=generator).to(device)
        offsets = (torch.arange(FEATURES + 1) * samples).to(device)  # a "bag" per feature: nothing is pooled
        coefficients, weights, biases = [], [], []
        for _ in range(FEATURES):
            rows, p = (2, 1000003) if check_family(family, 0).artifact else (4, 2**31 - 1)
            hashes = torch.randint(1, p, (rows, k), generator=generator, dtype=torch.int32)
            coefficients.append(hashes.to(device))
            fan_in = [k, *widths[:-1]]
            weights.append(
                [
                    (torch.randn(o, i, generator=generator) / i**0.5).to(dtype).to(device)
                    for o, i in zip(widths, fan_in, strict=True)
                ]
            )
            if dtype == FLOAT8:
                biases.append([torch.tensor([[1.0], [0.0]], device=device).repeat(1, o) for o in widths])
            else:
                biases.append([torch.zeros(o, dtype=dtype, device=device) for o in widths])
        result = torch.float32 if dtype == FLOAT8 else dtype
        out = torch.empty(n, widths[-1], dtype=result, device=device)

        def run(steps=None):
            dhe.decode_grouped(
                ids, offsets, 1, list(range(FEATURES)), coefficients, weights, biases,
                family, "relu", "sigmoid", out, steps,
            )  # fmt: skip
            return out

        def reference():
            from mprec import reference

            parts = [
                reference.dhe(
                    ids[t * samples : (t + 1) * samples], coefficients[t], weights[t], biases[t],
                    family, "relu", "sigmoid", dtype=result,
                )
                for t in range(FEATURES)
            ]  # fmt: skip
            return torch.cat(parts)

        def tune(seconds):
            return autotune.tune(device, n, k, widths, dtype, family, run, seconds)

        flops = 2.0 * n * sum(i * o for i, o in zip([k, *widths[:-1]], widths, strict=True))
        parameters = sum(w.numel() for stack in weights for w in stack) * dtype.itemsize
        return Call(run, flops, parameters + n * (8 + widths[-1] * result.itemsize), reference, tune)

    shape = "-".join(map(str, [k, *widths]))
    targets = dhe.FLOAT8_TARGETS if dtype == FLOAT8 else None
    return Case(f"dhe {shape} {family} {str(dtype)[6:]}", make, samples, targets=targets)


def _bags(device, samples, rows, pooling):
    generator = torch.Generator().manual_seed(0)
    n = samples * FEATURES * pooling
    indices = torch.randint(0, rows, (n,), generator=generator).to(device)
    return indices, (torch.arange(samples * FEATURES + 1) * pooling).to(device)


def embedding_bag_case(dim, dtype, kind=embedding_bag.FLOAT, pooling=1, rows=100_000) -> Case:
    def make(device, samples):
        small = min(rows, max(100, samples * 4)) if device.type == "cpu" else rows
        indices, offsets = _bags(device, samples, small, pooling)
        if kind == embedding_bag.FLOAT:
            tables = [torch.randn(small, dim).to(dtype).to(device) for _ in range(FEATURES)]
        else:
            width = ROW_FORMATS[embedding_bag.QUANTISED[kind]].row_bytes(dim)
            tables = [torch.zeros(small, width, dtype=torch.uint8, device=device) for _ in range(FEATURES)]
        row_bytes = tables[0].shape[1] * tables[0].element_size()
        out_dtype = dtype if kind == embedding_bag.FLOAT else torch.float32
        out = torch.empty(samples, FEATURES * dim, dtype=out_dtype, device=device)
        columns = [dim * t for t in range(FEATURES)]

        def run():
            embedding_bag.embedding_bag_grouped(
                tables, indices, offsets, samples, range(FEATURES), 0, None, -1, out, columns, kind
            )
            return out

        def reference():
            parts, size = [], samples * pooling
            for t, table in enumerate(tables):
                mine = indices[t * size : (t + 1) * size]
                local = offsets[: samples + 1]
                parts.append(
                    torch.nn.functional.embedding_bag(
                        mine, table, local, mode="sum", include_last_offset=True
                    )
                )
            return torch.cat(parts, 1)

        moved = indices.numel() * (8 + row_bytes) + offsets.numel() * 8 + out.numel() * out.element_size()
        return Call(run, 0.0, moved, reference if kind == embedding_bag.FLOAT else None)

    def fbgemm(device, samples):
        try:
            from fbgemm_gpu import split_table_batched_embeddings_ops_common as common
            from fbgemm_gpu import split_table_batched_embeddings_ops_training as training
            from fbgemm_gpu.split_embedding_configs import SparseType
        except ImportError:
            return None
        if device.type == "cuda":
            where = common.EmbeddingLocation.DEVICE, training.ComputeDevice.CUDA
        else:
            where = common.EmbeddingLocation.HOST, training.ComputeDevice.CPU
        precision = SparseType.from_dtype(dtype)
        bags = training.SplitTableBatchedEmbeddingBagsCodegen(
            [(rows, dim, *where)] * FEATURES,
            weights_precision=precision,
            output_dtype=precision,
            device=device,
        )
        indices, offsets = _bags(device, samples, rows, pooling)
        return lambda: bags(indices, offsets)

    return Case(
        f"embedding_bag d{dim} {embedding_bag.QUANTISED.get(kind, str(dtype)[6:])} pooling {pooling}",
        make,
        peer=fbgemm if kind == embedding_bag.FLOAT else None,
    )


def gradient_case(dim, action, rows=100_000) -> Case:
    def make(device, samples):
        small = min(rows, max(100, samples * 4)) if device.type == "cpu" else rows
        indices, offsets = _bags(device, samples, small, 1)
        tables = [torch.randn(small, dim, device=device) for _ in range(FEATURES)]
        states = [torch.zeros(small, device=device) for _ in range(FEATURES)]
        upstream = torch.randn(samples, FEATURES * dim, device=device)
        columns = [dim * t for t in range(FEATURES)]

        def run():
            segments = gradient.sort_entries(
                [small] * FEATURES, indices, offsets, samples, range(FEATURES), FEATURES, 0, None, -1
            )
            if action == gradient.STORE:
                return gradient.weight_gradients(tables, segments, upstream, columns)
            if action == gradient.SGD:
                return gradient.sgd_(tables, segments, upstream, columns, 0.0)
            return gradient.rowwise_adagrad_(tables, states, segments, upstream, columns, 0.0, 1e-8)

        def reference():
            grads = []
            for t in range(FEATURES):
                grad = torch.zeros(small, dim, device=device)
                mine = indices[t * samples : (t + 1) * samples]
                grads.append(grad.index_add_(0, mine, upstream[:, dim * t : dim * (t + 1)].contiguous()))
            return grads

        moved = indices.numel() * (8 + 3 * dim * 4)
        return Call(run, 0.0, moved, reference if action == gradient.STORE else None)

    names = {gradient.STORE: "dense", gradient.SGD: "sgd", gradient.ROWWISE_ADAGRAD: "rowwise adagrad"}
    return Case(f"gradient d{dim} {names[action]}", make)


def dhe_gradient_case(k, width, dtype) -> Case:
    def make(device, samples):
        return call(device, samples, k // SHRINK, width // SHRINK)

    def call(device, samples, k, width):
        generator = torch.Generator().manual_seed(0)
        n = samples * FEATURES
        ids = torch.randint(0, 10**7, (n,), generator=generator).to(device)
        hashes = torch.randint(1, 2**31 - 1, (4, k), generator=generator, dtype=torch.int32).to(device)
        upstream = torch.randn(n, width, generator=generator).to(dtype).to(device)

        def run():
            return dhe_gradient.first_layer_gradient(ids, hashes, upstream, "universal")

        def reference():
            from mprec import reference

            return upstream.T @ reference.encode(hashes, ids, "universal").to(dtype)

        moved = n * (8 + width * dtype.itemsize) + k * width * 4
        return Call(run, 2.0 * n * k * width, moved, reference)

    return Case(f"dhe gradient {k}-{width} {str(dtype)[6:]}", make)


def later_layer_gradient_case(k, width, dtype) -> Case:
    """What a layer after the first costs on the way back: its inputs' gradient, its weights' and biases'."""

    def make(device, samples):
        return call(device, samples, k // SHRINK, width // SHRINK)

    def call(device, samples, k, width):
        generator = torch.Generator().manual_seed(0)
        n, features = samples * FEATURES, list(range(FEATURES))
        offsets = (torch.arange(FEATURES + 1) * samples).to(device)
        inputs = torch.randn(n, k, generator=generator).to(dtype).to(device)
        upstream = torch.randn(n, width, generator=generator).to(dtype).to(device)
        weights = [torch.randn(width, k, generator=generator).to(dtype).to(device) for _ in features]
        back = torch.empty_like(inputs)

        def run():
            dhe.layer_grouped(upstream, offsets, 1, features, weights, None, back)
            return [back, *dhe_gradient.layer_gradients(
                inputs, None, upstream, offsets, 1, features, "universal"
            )]  # fmt: skip

        def reference():
            z, x = upstream.view(FEATURES, samples, width), inputs.view(FEATURES, samples, k)
            return [torch.bmm(z, torch.stack(weights)).view(n, k), torch.bmm(z.mT, x), z.sum(1)]

        moved = n * (2 * k + width) * dtype.itemsize
        return Call(run, 4.0 * n * k * width, moved, reference)

    return Case(f"layer gradient {k}-{width} {str(dtype)[6:]}", make)


def row_cache_case(dim, dtype, hot_share=0.5) -> Case:
    def make(device, samples):
        generator = torch.Generator().manual_seed(0)
        n, hot = samples * FEATURES, min(10_000, 4 * samples * FEATURES)
        cache = row_cache.build(torch.arange(hot), torch.randn(hot, dim).to(dtype).to(device))
        upper = int(hot / hot_share)
        ids = torch.randint(0, upper, (n,), generator=generator).to(device)
        out = torch.zeros(n, dim, dtype=dtype, device=device)

        def run():
            row_cache.lookup(cache, ids, out)
            return out

        def reference():
            table = torch.zeros(upper, dim, dtype=dtype, device=device)
            table[cache.keys[cache.keys >= 0]] = cache.rows[cache.keys >= 0]
            return table[ids]

        return Call(run, 0.0, n * (16 + 2 * hot_share * dim * dtype.itemsize), reference)

    return Case(f"row_cache d{dim} {str(dtype)[6:]}", make)


_BF16, _F16, _F32 = torch.bfloat16, torch.float16, torch.float32

CASES: list[Case] = [
    *(dhe_case(1024, [128, 16], dtype) for dtype in (_BF16, _F16, _F32)),
    *(dhe_case(1024, [512, 256, 64], dtype) for dtype in (_BF16, _F16, _F32)),
    *(dhe_case(1024, widths, FLOAT8) for widths in ([128, 16], [512, 256, 64])),
    *(dhe_case(1024, [512, 256, 64], _BF16, family) for family in ("sign", "u7", "artifact")),
    dhe_case(1024, [128, 16], _F32, "artifact_gaussian"),
    *(embedding_bag_case(dim, _F32) for dim in (16, 64, 128)),
    *(embedding_bag_case(64, dtype) for dtype in (_BF16, _F16)),
    embedding_bag_case(64, _F32, embedding_bag.INT8),
    embedding_bag_case(64, _F32, embedding_bag.INT4),
    embedding_bag_case(64, _F32, pooling=20),
    *(gradient_case(64, action) for action in (gradient.STORE, gradient.SGD, gradient.ROWWISE_ADAGRAD)),
    *(dhe_gradient_case(1024, 512, dtype) for dtype in (_BF16, _F32)),
    *(later_layer_gradient_case(512, 256, dtype) for dtype in (_BF16, _F32)),
    row_cache_case(64, _F32),
]
