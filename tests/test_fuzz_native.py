"""Hostile arguments, straight to the native functions: an exception or a result, never a crash, and never a
byte written outside ``out``.

Each function is fuzzed in a process of its own: a crash fails one test, which names the call that did it.
"""

import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mprec import _C
from mprec.bags import Bags
from mprec.data import Batch

EXAMPLES = int(os.environ.get("MPREC_FUZZ_EXAMPLES", 300))
INT64 = np.iinfo(np.int64)
EDGES = [0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, -(2**31), 2**32, 2**62, INT64.max - 1, INT64.max, INT64.min]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8,
          torch.uint8, torch.bool, torch.complex64, torch.int16]  # fmt: skip
# What a Python function may raise for bad arguments. Not SystemError: that is a bug in a C extension.
ALLOWED = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OverflowError, MemoryError,
           BufferError)  # fmt: skip

CANARY = 0x5A


class Guard:
    """Arrays to be written: each lies between canaries in a larger buffer."""

    def __init__(self):
        self._buffers: list[tuple[np.ndarray, int, int]] = []

    def array(self, shape: tuple[int, ...], dtype: str = "f4") -> np.ndarray:
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        buffer = np.full(nbytes + 512, CANARY, np.uint8)
        self._buffers.append((buffer, 256, 256 + nbytes))
        return buffer[256 : 256 + nbytes].view(dtype).reshape(shape)

    def check(self) -> None:
        for buffer, begin, end in self._buffers:
            assert (buffer[:begin] == CANARY).all(), "wrote before the beginning"
            assert (buffer[end:] == CANARY).all(), "wrote beyond the end"


def no_storage(shape: tuple[int, ...]) -> torch.Tensor:
    tensor = torch.zeros(shape)
    tensor.untyped_storage().resize_(0)
    return tensor


class Wrapper(torch.Tensor):
    """A tensor subclass that has a shape and no memory of its own."""

    @staticmethod
    def __new__(cls, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32)

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        raise NotImplementedError


def fake(shape: tuple[int, ...]) -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.zeros(shape)


def unaligned(shape: tuple[int, ...]) -> np.ndarray:
    n = math.prod(shape)
    return np.frombuffer(bytearray(4 * n + 1), np.float32, n, offset=1).reshape(shape)


def readonly(shape: tuple[int, ...], dtype="f4") -> np.ndarray:
    array = np.zeros(shape, dtype)
    array.flags.writeable = False
    return array


def field_of_records(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape, dtype=[("value", "f4"), ("pad", "i1")])["value"]


def expanded(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.zeros([1] * len(shape)).expand(shape)


shapes = st.lists(st.sampled_from([0, 1, 2, 3, 8, 17]), max_size=3).map(tuple)
matrices = st.tuples(st.sampled_from([0, 1, 2, 3, 4, 6]), st.sampled_from([0, 1, 3, 5, 8, 16, 17, 40]))

junk = st.one_of(
    st.sampled_from([None, "text", b"bytes", 3, -1, 2.5, 10**30, math.nan, True, object()]),
    st.sampled_from([[], [1, 2], [None], {}, ()]),
    st.builds(torch.zeros, shapes, dtype=st.sampled_from(DTYPES)),
    st.builds(torch.zeros, matrices, dtype=st.sampled_from(DTYPES)),
    st.builds(lambda s: torch.zeros(s, device="meta"), matrices),
    st.builds(lambda s: torch.zeros(s).to_sparse(), matrices),
    st.builds(lambda s: torch.zeros(s, requires_grad=True), matrices),
    st.builds(lambda s: torch.nn.Parameter(torch.zeros(s)), matrices),
    st.builds(lambda s: torch.zeros(s[::-1]).T, matrices),
    st.builds(lambda s: torch.zeros(s[0], 2 * s[1] + 1)[:, ::2], matrices),
    st.builds(lambda s: torch.zeros(s, dtype=torch.complex64).conj().imag, matrices),
    st.builds(lambda s: np.zeros(s, "f4")[::-1], matrices),
    st.builds(lambda s: np.zeros(s, "f4")[:, ::-1], matrices),
    st.builds(lambda s: np.zeros(s, ">f4"), matrices),
    st.builds(lambda s: np.zeros(s, "O"), matrices),
    st.builds(lambda n: torch.zeros([1] * n), st.integers(0, 12)),
    st.builds(lambda n: np.zeros([1] * n, "f4"), st.integers(0, 12)),
    *(st.builds(make, matrices) for make in (Wrapper, fake, unaligned, readonly, field_of_records, expanded)),
)  # fmt: skip

integers = st.one_of(st.sampled_from(EDGES), st.integers(INT64.min, INT64.max), st.integers(-3, 5))
id_lists = st.lists(st.one_of(st.sampled_from(EDGES), st.integers(0, 4)), max_size=40)


def id_tensor(values: list[int], wide: bool, is_numpy: bool):
    array = np.array(values, "i8").astype("i8" if wide else "i4")
    return array if is_numpy else torch.from_numpy(array)


hostile_ids = st.one_of(
    st.builds(id_tensor, id_lists, st.booleans(), st.booleans()),
    st.builds(id_tensor, id_lists.map(sorted), st.booleans(), st.booleans()),
    st.builds(lambda n: torch.zeros(1, dtype=torch.int64).expand(n), st.integers(0, 30)),
    st.builds(lambda n: torch.arange(2 * n)[::2], st.integers(0, 30)),
    junk,
)
hostile = st.one_of(junk, integers)


@st.composite
def bags(draw, tables: int, batch: int, num_rows: int):
    """Valid CSR indices and offsets."""
    lengths = draw(st.lists(st.integers(0, 4), min_size=tables * batch, max_size=tables * batch))
    n = sum(lengths)
    indices = draw(st.lists(st.integers(0, max(num_rows - 1, 0)), min_size=n, max_size=n))
    offsets = np.cumsum([0, *lengths]).tolist()
    return [id_tensor(v, draw(st.booleans()), draw(st.booleans())) for v in (indices, offsets)]


@st.composite
def embedding_bag_multi(draw, guard: Guard):
    tables, batch, num_rows = draw(st.integers(1, 4)), draw(st.integers(0, 5)), draw(st.integers(1, 6))
    dims = [draw(st.sampled_from([1, 3, 8, 16, 17, 40])) for _ in range(tables)]
    indices, offsets = draw(bags(tables, batch, num_rows))
    return {
        "weights": [torch.randn(num_rows, d) for d in dims],
        "indices": indices,
        "offsets": offsets,
        "per_sample_weights": draw(st.sampled_from([None, torch.ones(len(indices))])),
        "mode": draw(st.sampled_from([0, 1])),
        "padding_idx": -1,
        "out": guard.array((batch, sum(dims))),
        "out_columns": draw(st.sampled_from([None, np.cumsum([0, *dims[:-1]]).tolist()])),
        "threads": draw(st.integers(1, 4)),
    }


@st.composite
def embedding_bag(draw, guard: Guard):
    batch, num_rows, dim = draw(st.integers(0, 5)), draw(st.integers(1, 6)), draw(st.sampled_from([1, 8, 17]))
    indices, offsets = draw(bags(1, batch, num_rows))
    return {
        "weight": torch.randn(num_rows, dim),
        "indices": indices,
        "offsets": offsets,
        "per_sample_weights": None,
        "mode": draw(st.sampled_from([0, 1, 2])),
        "include_last_offset": True,
        "padding_idx": draw(st.sampled_from([-1, 0])),
        "out": guard.array((batch, dim)),
        "threads": 1,
    }


def coefficients(family: int, k: int) -> torch.Tensor:
    return torch.randint(1, 1000, (2 if family in (1, 2) else 4, k), dtype=torch.int32)


def decoder_arguments(sizes: list[int], family: int = 0) -> dict:
    pairs = list(itertools.pairwise(sizes))
    return {
        "coefficients": coefficients(family, sizes[0]),
        "weights": [torch.randn(o, i) for i, o in pairs],
        "biases": [torch.randn(o) for _, o in pairs],
        "family": family,
        "activation": 1,
        "last_activation": 0,
    }


@st.composite
def decoder(draw, guard: Guard):
    sizes = draw(st.lists(st.sampled_from([2, 4, 16, 18]), min_size=2, max_size=4))
    return decoder_arguments(sizes, draw(st.integers(0, 4)))


@st.composite
def dhe_bag_multi(draw, guard: Guard):
    features, batch = draw(st.integers(1, 3)), draw(st.integers(0, 5))
    decoders = [
        _C.Decoder(**decoder_arguments([16, 5, draw(st.sampled_from([1, 8, 17]))])) for _ in range(features)
    ]
    dims = [d.dim for d in decoders]
    indices, offsets = draw(bags(features, batch, 1000))
    return {
        "decoders": decoders,
        "indices": indices,
        "offsets": offsets,
        "per_sample_weights": draw(st.sampled_from([None, torch.ones(len(indices))])),
        "mode": draw(st.sampled_from([0, 1])),
        "padding_idx": -1,
        "out": guard.array((batch, sum(dims))),
        "out_columns": draw(st.sampled_from([None, np.cumsum([0, *dims[:-1]]).tolist()])),
        "threads": draw(st.integers(1, 4)),
    }


@st.composite
def dhe_bag(draw, guard: Guard):
    batch = draw(st.integers(0, 5))
    indices, offsets = draw(bags(1, batch, 1000))
    return {
        "decoder": _C.Decoder(**decoder_arguments([16, 5, 9])),
        "indices": indices,
        "offsets": offsets,
        "per_sample_weights": None,
        "mode": draw(st.sampled_from([0, 1, 2])),
        "include_last_offset": True,
        "padding_idx": draw(st.sampled_from([-1, 0])),
        "out": guard.array((batch, 9)),
        "threads": 1,
    }


@st.composite
def stack_watch(draw, guard: Guard):
    arguments = decoder_arguments([16, draw(st.integers(1, 20)), 9])
    return {name: arguments[name] for name in ("coefficients", "weights", "biases")}


@st.composite
def same_stack(draw, guard: Guard):
    arguments = draw(stack_watch(guard))
    return arguments | {"watch": _C.StackWatch.of(**arguments), "thorough": draw(st.booleans())}


@st.composite
def kept_decoder(draw, guard: Guard):
    weight = torch.zeros(draw(st.integers(1, 100)))
    return {
        "watch": _C.WeightWatch.of([({"weight": weight}, "weight")]),
        "decoder": _C.Decoder(**decoder_arguments([16, 5, 9])),
    }


@st.composite
def dhe_bag_kept(draw, guard: Guard):
    arguments = draw(dhe_bag(guard))
    del arguments["decoder"], arguments["out"]
    kept = _C.KeptDecoder(**draw(kept_decoder(guard)))
    return arguments | {"kept": kept, "bound": draw(st.sampled_from([None, 2**63 - 1])), "dedupe": None}


@st.composite
def check_offsets(draw, guard: Guard):
    features, batch = draw(st.integers(1, 3)), draw(st.integers(0, 5))
    indices, offsets = draw(bags(features, batch, 6))
    return {
        "offsets": offsets,
        "num_indices": len(indices),
        "include_last_offset": True,
        "num_features": features,
    }


@st.composite
def check_ids(draw, guard: Guard):
    features, batch = draw(st.integers(1, 3)), draw(st.integers(0, 5))
    indices, offsets = draw(bags(features, batch, 6))
    chosen = draw(st.lists(st.integers(0, features - 1), max_size=3))
    return {
        "indices": indices,
        "offsets": offsets,
        "bags": batch,
        "num_features": features,
        "bounds": [(f, draw(st.sampled_from([-1, 6, 6]))) for f in chosen],
    }


def hashing(dtype: str):
    @st.composite
    def arguments(draw, guard: Guard):
        family, k, n = (
            draw(st.integers(0, 4)),
            draw(st.sampled_from([2, 16, 18, 40])),
            draw(st.integers(0, 6)),
        )
        return {
            "coefficients": coefficients(family, k),
            "indices": id_tensor(
                draw(st.lists(st.integers(0, INT64.max), min_size=n, max_size=n)), True, False
            ),
            "family": family,
            "out": guard.array((n, k), dtype),
        }

    return arguments


@st.composite
def update_tables(draw, guard: Guard):
    tables, batch, num_rows = draw(st.integers(1, 3)), draw(st.integers(0, 5)), draw(st.integers(1, 6))
    dims = [draw(st.sampled_from([1, 8, 17])) for _ in range(tables)]
    indices, offsets = draw(bags(tables, batch, num_rows))
    rule = draw(st.integers(1, 4))

    def states():
        return [guard.array((num_rows, 1 if rule == 3 else d)) for d in dims]

    return {
        "weights": [guard.array((num_rows, d), draw(st.sampled_from(["f4", "f2"]))) for d in dims],
        "first": states(),
        "second": states(),
        "indices": indices,
        "offsets": offsets,
        "per_sample_weights": None,
        "mode": draw(st.sampled_from([0, 1])),
        "padding_idx": -1,
        "grad": torch.randn(batch, sum(dims)),
        "columns": None,
        "rule": rule,
        "lr": 0.1,
        "eps": 1e-8,
        "beta1": 0.9,
        "beta2": 0.99,
        "keep": draw(st.sampled_from([1.0, 0.9])),
        "noise": draw(st.sampled_from([None, list(range(tables))])),
        "threads": draw(st.integers(1, 4)),
    }


@st.composite
def sparse_gradient(draw, guard: Guard):
    batch, num_rows, dim = draw(st.integers(0, 5)), draw(st.integers(1, 6)), draw(st.sampled_from([1, 8, 17]))
    indices, offsets = draw(bags(1, batch, num_rows))
    return {
        "indices": indices,
        "offsets": offsets,
        "per_sample_weights": None,
        "mode": draw(st.sampled_from([0, 1])),
        "padding_idx": -1,
        "num_rows": num_rows,
        "grad": torch.randn(batch, dim),
        "rows": guard.array((len(indices),), "i8"),
        "values": guard.array((len(indices), dim)),
        "threads": 1,
    }


@st.composite
def row_cache(draw, guard: Guard):
    return {"dim": draw(st.integers(1, 20)), "nbytes": draw(st.sampled_from([4096, 1 << 16]))}


def cache_call(method: str):
    @st.composite
    def arguments(draw, guard: Guard):
        dim, n = draw(st.sampled_from([1, 8, 17])), draw(st.integers(0, 8))
        cache = _C.RowCache(dim, 1 << 14)
        ids = torch.tensor(draw(st.lists(st.integers(0, 9), min_size=n, max_size=n)), dtype=torch.int64)
        cache.fill(torch.arange(3), torch.randn(3, dim), cache.generation)
        common = {"self": cache, "ids": ids, "generation": cache.generation}
        if method == "lookup":
            return common | {
                "out": guard.array((n, dim)),
                **{name: guard.array((n,), "i8") for name in ("positions", "distinct_ids", "inverse")},
            }
        return common | {"rows": torch.randn(n, dim)}

    return arguments


@st.composite
def held_ids(draw, guard: Guard):
    cache = _C.RowCache(4, 1 << 14)
    cache.fill(torch.arange(9), torch.randn(9, 4), cache.generation)
    return {"self": cache, "out": guard.array((draw(st.integers(0, 12)),), "i8")}


@st.composite
def cached_decoders(draw, guard: Guard):
    count = draw(st.integers(1, 3))
    decoders = [_C.Decoder(**decoder_arguments([16, 5, 8])) for _ in range(count)]
    return {
        "decoders": decoders,
        "caches": [draw(st.sampled_from([None, _C.RowCache(8, 1 << 14)])) for _ in range(count)],
        "positions": list(range(count)),
        "columns": [8 * i for i in range(count)],
        "num_features": draw(st.integers(count, 4)),
    }


@st.composite
def cached_forward(draw, guard: Guard):
    arguments = draw(cached_decoders(guard))
    features, batch = arguments["num_features"], draw(st.integers(0, 5))
    indices, offsets = draw(bags(features, batch, 1000))
    return {
        "decoders": _C.CachedDecoders(**arguments),
        "indices": indices,
        "offsets": offsets,
        "per_sample_weights": draw(st.sampled_from([None, torch.ones(len(indices))])),
        "mode": draw(st.sampled_from([0, 1])),
        "include_last_offset": True,
        "padding_idx": -1,
        "bound": draw(st.sampled_from([None, 1000])),
        "out": draw(st.sampled_from([None, guard.array((batch, 8 * len(arguments["decoders"])))])),
        "admit": draw(st.booleans()),
        "threads": draw(st.integers(1, 4)),
    }


@st.composite
def codebook_rows(draw, guard: Guard):
    count, stages, dim, n = draw(st.tuples(*(st.integers(1, m) for m in (9, 3, 9, 6))))
    return {
        "codes": torch.randint(0, 256, (count, stages), dtype=torch.uint8),
        "centroids": torch.randn(256 * stages, dim),
        "ids": torch.randint(0, count, (n,)),
        "out": guard.array((n, dim)),
    }


@st.composite
def dhe_backward(draw, guard: Guard):
    arguments = decoder_arguments([16, 5, 3], draw(st.integers(0, 4)))
    weights, biases = arguments["weights"], arguments["biases"]
    n = draw(st.integers(0, 6))
    handle = _C.Decoder(**arguments)
    return {
        "decoder": handle,
        "weights": weights,
        "indices": torch.randint(0, 1000, (n,)),
        "grad": torch.randn(n, 3),
        "grad_weights": [guard.array(tuple(w.shape)) for w in weights],
        "grad_biases": [guard.array(tuple(b.shape)) for b in biases],
        "threads": draw(st.integers(1, 4)),
        "kept": draw(st.sampled_from([None, torch.randn(handle.kept_shape(n))])),
    }


@st.composite
def dhe_bag_keeping(draw, guard: Guard):
    handle = _C.Decoder(**decoder_arguments([16, 5, draw(st.sampled_from([1, 8, 17]))]))
    indices, offsets = draw(bags(1, draw(st.integers(0, 5)), 1000))
    n = len(indices)
    return {
        "decoder": handle,
        "indices": indices,
        "offsets": offsets,
        "per_sample_weights": draw(st.sampled_from([None, torch.ones(n)])),
        "mode": draw(st.sampled_from([0, 1])),
        "include_last_offset": True,
        "padding_idx": draw(st.sampled_from([-1, 3])),
        "kept": guard.array(handle.kept_shape(n)),
        "distinct": guard.array((n,), "i8"),
        "row_of_entry": guard.array((n,), "i4"),
        "threads": draw(st.integers(1, 3)),
    }


@st.composite
def select_features(draw, guard: Guard):
    features, batch = draw(st.integers(1, 4)), draw(st.integers(0, 5))
    indices, offsets = draw(bags(features, batch, 1000))
    chosen = draw(st.lists(st.integers(0, features - 1)))
    return {
        "indices": indices,
        "offsets": offsets,
        "per_sample_weights": draw(st.sampled_from([None, torch.ones(len(indices))])),
        "features": chosen,
        "num_features": features,
    }


@st.composite
def unique_share(draw, guard: Guard):
    features = draw(st.integers(1, 4))
    indices, offsets = draw(bags(features, draw(st.integers(0, 5)), 5))
    return {"indices": indices, "offsets": offsets, "num_features": features}


@st.composite
def join_bags(draw, guard: Guard):
    features = draw(st.integers(1, 4))
    samples = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    parts = [draw(bags(features, batch, 1000)) for batch in samples]
    starts = [draw(st.integers(0, batch)) for batch in samples]
    return {
        "indices": [indices for indices, _ in parts],
        "offsets": [offsets for _, offsets in parts],
        "samples": samples,
        "starts": starts,
        "stops": [draw(st.integers(start, batch)) for start, batch in zip(starts, samples, strict=True)],
        "features": features,
    }


def layers(*widths):
    """Weights, biases and activations (ReLU, at last none) of an MLP."""
    sizes = list(itertools.pairwise(widths))
    weights = [torch.randn(o, i) for i, o in sizes]
    return weights, [torch.randn(o) for _, o in sizes], [1] * (len(sizes) - 1) + [0]


def program_arguments(modes, interaction="dot", precision="float32", before=""):
    """A path of two features (a table, and one of low rank and a decoder) and three dense numbers.

    ``before`` the first feature's decoder, which it has as well, there may be a "cache" or "hot" rows."""
    tables = [{"weight": torch.randn(10, 8)}, {"weight": torch.randint(-128, 128, (14, 3), dtype=torch.int8)}]
    decoder = _C.Decoder(**decoder_arguments([16, 5, 8]))
    projection = None if modes[1] == 2 else (torch.randn(3, 8), torch.randn(8))
    if projection is None:
        tables[1] = {"weight": torch.randn(14, 8)}
    cached, hot = [], []
    if before == "cache":
        caches = [_C.RowCache(8, _C.RowCache.bytes_for(8, 6))]
        book = torch.randint(0, 256, (4, 1), dtype=torch.uint8), torch.randn(256, 8)
        decoders = _C.CachedDecoders([decoder], caches, [0], [0], 2, None, [book])
        cached = [(decoders, [3], modes[0], True)]
    elif before == "hot":
        rows = {"weight": torch.randn(3, 8)}, "weight", 0, 3, 0, 8, None, None
        hot = [(torch.tensor([1, 4, 9]), 10, 0, 3, 0, rows, (decoder, 0, 3, 0))]
    unseen = [(1, 1, torch.tensor([1, 0, 1], dtype=torch.uint8), 2, modes[1] == 1, torch.randn(16))]
    vectors = 4 + bool(before)
    return {
        "num_features": 2,
        "num_dense": 3,
        "dim": 8,
        "tables": [
            (tables[0], "weight", 0, 0, modes[0], 8, None, None),
            (tables[1], "weight", 1, 1, modes[1], 8, (3, 13), projection),
        ],
        "decoders": [(decoder, 1, 2, modes[1])],
        "bottom": layers(3, 5, 8),
        "constant": None,
        "top": layers(8 + vectors * (vectors - 1) // 2 if interaction == "dot" else vectors * 8, 7, 1),
        "mixing": [],
        "interaction": interaction,
        "watch": _C.WeightWatch.of([(table, "weight") for table in tables]),
        "precision": precision,
        "cached": cached,
        "hot": hot,
        "unseen": unseen if before else [],
    }


program_kinds = st.tuples(
    st.sampled_from(["dot", "cat"]),
    st.sampled_from(["float32", "bfloat16", "int8"]),
    st.sampled_from(["", "cache", "hot"]),
)


@st.composite
def path_program(draw, guard: Guard):
    return program_arguments(draw(st.tuples(st.integers(0, 2), st.integers(0, 2))), *draw(program_kinds))


@st.composite
def program_run(draw, guard: Guard):
    batch = draw(st.sampled_from([0, 1, 5, 140]))
    indices, offsets = draw(bags(2, batch, 10))
    return {
        "program": _C.PathProgram(**program_arguments((0, 1), *draw(program_kinds))),
        "dense": torch.randn(batch, 3),
        "indices": indices,
        "offsets": offsets,
        "threads": draw(st.sampled_from([1, 2])),
    }


def mlp_arguments(*widths):
    return dict(zip(("weights", "biases", "activations"), layers(*widths), strict=True))


@st.composite
def mlp(draw, guard: Guard):
    return mlp_arguments(*draw(st.lists(st.integers(1, 20), min_size=2, max_size=4)))


@st.composite
def mlp_run(draw, guard: Guard):
    batch = draw(st.sampled_from([0, 1, 5, 140]))
    return {
        "mlp": _C.Mlp(**mlp_arguments(7, 20, 3)),
        "input": torch.randn(batch, 7),
        "out": guard.array((batch, 3)),
        "threads": draw(st.sampled_from([1, 2])),
    }


@st.composite
def mlp_kept(draw, guard: Guard):
    made = mlp_arguments(7, 20, 3)
    weights, biases = made["weights"], made["biases"]
    return {
        "mlp": _C.Mlp(**made),
        "watch": _C.StackWatch.of(weights[0], weights, biases),
        "input": torch.randn(draw(st.sampled_from([0, 1, 5, 140])), 7),
        "weights": weights,
        "biases": biases,
        "threads": draw(st.sampled_from([1, 2])),
    }


@st.composite
def interaction(draw, guard: Guard):
    batch, vectors, own = draw(st.integers(0, 9)), draw(st.integers(1, 9)), draw(st.booleans())
    dim, first = draw(st.integers(1, 20)), draw(st.booleans())
    count = vectors + first
    return {
        "vectors": torch.randn(batch, vectors, dim),
        "self_interaction": own,
        "first": torch.randn(batch, dim) if first else None,
        "out": guard.array((batch, first * dim + count * (count - 1) // 2 + own * count)),
        "threads": draw(st.sampled_from([1, 2])),
    }


@st.composite
def interaction_backward(draw, guard: Guard):
    arguments = draw(interaction(guard))
    grad = torch.randn(arguments["out"].shape)
    out, first = guard.array(tuple(arguments["vectors"].shape)), arguments["first"]
    out_first = None if first is None else guard.array(tuple(first.shape))
    return arguments | {"grad": grad, "out": out, "out_first": out_first}


@st.composite
def json_query(draw, guard: Guard):
    ids = draw(st.lists(st.lists(st.lists(st.integers(-1, 9), max_size=3), max_size=3), max_size=3))
    body = json.dumps({"ids": ids, "dense": [[0.5, 1e300]] * len(ids), "sla_ms": 5}).encode()
    at = draw(st.integers(0, len(body)))
    body = draw(st.sampled_from([body, body[:at], body[:at] + draw(st.binary(max_size=3)) + body[at:]]))
    return {
        "body": body,
        "vocabularies": torch.tensor([5, 10]),
        "num_dense": 2,
        "max_samples": draw(st.integers(0, 5)),
        "max_ids": draw(st.integers(0, 20)),
    }


@st.composite
def criteo_text(draw, guard: Guard):
    line = b"1" + b"\t7" * 13 + b"\tff" * 26 + b"\n"
    text = b"".join(draw(st.lists(st.sampled_from([line, line[:-2] + b"\n", b"\n", b"0\t"]), max_size=4)))
    at = draw(st.integers(0, len(text)))
    text = text[:at] + draw(st.binary(max_size=2)) + text[at:]
    rows = draw(st.integers(4, 9))
    return {
        "text": np.frombuffer(text, np.uint8),
        "labels": guard.array((rows,)),
        "dense": guard.array((rows, 13)),
        "categories": guard.array((26, rows), "i4"),
        "missing": guard.array((rows,), "i4"),
    }


@st.composite
def coded_values(draw, guard: Guard):
    rows = draw(st.integers(0, 9))
    values, missing = guard.array((rows,), "i4"), guard.array((rows,), "i4")
    values[:] = draw(st.lists(st.integers(-5, 5), min_size=rows, max_size=rows))
    missing[:] = draw(st.lists(st.integers(-1, 1), min_size=rows, max_size=rows))
    return {
        "values": values,
        "missing": draw(st.sampled_from([missing, None])),
        "bit": draw(st.integers(0, 31)),
        "counted": draw(st.integers(-1, 12)),
        "results": [],
    }


def summed_bytes(guard: Guard):
    return st.binary(max_size=99).map(lambda data: {"data": np.frombuffer(data, np.uint8)})


seconds = st.lists(st.floats(1e-6, 1.0), min_size=5, max_size=5)
options = st.builds(_C.Option, st.sampled_from("ab"), st.floats(-1, 1), seconds)
lanes = st.lists(st.builds(_C.Lane, st.just("cpu"), st.lists(options, min_size=1, max_size=2)), min_size=1)


def serve(lanes, steps, **limits):
    """A scheduler through some calls."""
    scheduler, jobs = _C.Scheduler(lanes, **limits), []
    for now, size, deadline, index in steps:
        ticket = scheduler.offer(now, size, deadline)
        scheduler.expire(now)
        while (job := scheduler.next(now)) is not None:
            jobs.append(job)
        if isinstance(ticket, _C.Ticket):
            scheduler.again(ticket) if not scheduler.withdraw(ticket) and not ticket.taken else None
        scheduler.rest(index, now, deadline)
        if jobs:
            scheduler.done(jobs.pop(), now, deadline)
    for job in jobs:
        _C.Scheduler(lanes[:1]).done(job, 0.0, 1.0)  # perhaps of an executor that this one has not
    scheduler.clear()


def scheduler(guard: Guard):
    step = st.tuples(anything_float, st.integers(1, 9), anything_float, st.integers(0, 1))
    return st.fixed_dictionaries(
        {
            "lanes": lanes,
            "steps": st.lists(step, max_size=6),
            "max_batch": st.sampled_from([1, 4, 100, INT64.max]),
            "max_queue": st.sampled_from([1, 100, INT64.max]),
            "admission": st.booleans(),
        }
    )


def engine_calls(batches, sla_s, arrived_s, path_s, fails, **limits):
    """An engine of a native and another path through the life of some queries, in this thread."""
    lane = _C.Lane("cpu", [_C.Option("native", 0.6, [1e-6] * 9), _C.Option("other", 0.5, [1e-6] * 9)])
    arguments = {"late_share": 0.01, "clock": None, "features": 2, "num_dense": 3, "check": lambda *_: None}
    engine = _C.Engine([lane], **arguments | {"admission": False} | limits)
    engine.set_program(0, "native", _C.PathProgram(**program_arguments((0, 1))))
    for batch in batches:
        taken = engine.submit(object(), batch, sla_s, arrived_s)
        if isinstance(taken, _C.EngineQuery) and fails:
            engine.cancel(taken)
    engine.close()
    while (job := engine.take(0, 1)) is not None:
        for _, query, start, stop in engine.wanted(job):
            if fails or not engine.score(query, start, stop, "other", torch.zeros(stop - start)):
                engine.fail(query)
        engine.done(job, path_s)
    for _, scores, paths, _, _ in engine.outcomes(wait=False):
        assert scores is None or len(scores) == sum(paths.values())
    engine.statistics()


@st.composite
def engine_queries(draw, guard: Guard):
    batches = []
    for size in draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)):
        indices, offsets = draw(bags(2, size, 10))
        inputs = {"dense": torch.randn(size, 3), "indices": indices, "offsets": offsets}
        inputs = draw(corrupted(inputs)) if draw(st.integers(0, 3)) == 0 else inputs
        dense, indices, offsets = inputs.values()
        batches.append(Batch(dense, Bags(indices, offsets, num_features=2), torch.zeros(size)))
    return {
        "batches": batches,
        "sla_s": draw(st.sampled_from([1e-9, 10.0])),
        "arrived_s": None,
        "path_s": draw(anything_float),
        "fails": draw(st.booleans()),
        "max_batch": draw(st.sampled_from([1, 4, 8])),
        "max_queue": draw(st.sampled_from([1, 100])),
    }


anything_float = st.one_of(st.floats(0, 1), st.floats())


def by_name(**arguments):
    return lambda guard: st.fixed_dictionaries(arguments)


def price(executors, executor, rate):
    found = _C.FluidPrice(executors)
    found.sample(rate)
    found.second(executor, rate)
    found.quality_per_second(rate)


def traffic(counts):
    found = _C.Traffic()
    for now, size, left in counts:
        found.count(now, size, left)
        found.rate(now)


def correction(names, name, ratio, now):
    _C.Correction(names).observe(name, ratio, now)


def weight_watch(guard: Guard):
    return st.just({"places": [({"weight": torch.zeros(3)}, "weight")]})


def place_watch(guard: Guard):
    return st.just({"places": [({"weight": torch.zeros(3), "none": None}, "weight")]})


@st.composite
def table_group(draw, guard: Guard):
    names = tuple(draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=4)))
    named = draw(st.booleans())
    return {
        "names": names,
        "owner": "_parameters",
        "key": draw(st.sampled_from(["weight", "bias"])),
        "type": torch.nn.Parameter,
        "bits": draw(st.sampled_from([None, "in_features"])),
        "mode": draw(st.integers(0, 2)),
        "columns": draw(st.sampled_from([None, [2 * t for t in range(len(names))]])),
        "features": [draw(st.integers(0, 5)) for _ in names] if named else None,
        "num_features": 6 if named else len(names),
        "module_types": draw(st.sampled_from([(torch.nn.Linear,), (torch.nn.EmbeddingBag, torch.nn.Linear)])),
    }


@st.composite
def pooled_group(draw, guard: Guard):
    arguments = draw(table_group(guard))
    try:
        group = _C.TableGroup(**arguments)
    except (TypeError, ValueError):
        group = None
    batch, count = draw(st.integers(0, 3)), arguments["num_features"]
    lengths = draw(st.lists(st.integers(0, 2), min_size=count * batch, max_size=count * batch))
    return {
        "group": group,
        "modules": {name: torch.nn.Linear(2, 3) for name in "abc"},
        "indices": np.array([draw(st.integers(0, 3)) for _ in range(sum(lengths))], "i8"),
        "offsets": np.array([0, *itertools.accumulate(lengths)], "i8"),
        "per_sample_weights": None,
        "out": draw(st.sampled_from([None, guard.array((batch, 2 * len(arguments["names"])))])),
        "threads": draw(st.integers(1, 3)),
    }


@st.composite
def steps(draw, guard: Guard):
    one = st.sampled_from(
        [torch.zeros(()), torch.zeros((), dtype=torch.int64), torch.zeros(1), torch.zeros(2)]
    )
    return {"steps": [each.clone() for each in draw(st.lists(one, max_size=4))]}


TARGETS: dict[str, tuple[Callable, Callable]] = {
    "embedding_bag_multi": (_C.embedding_bag_multi, embedding_bag_multi),
    "embedding_bag": (_C.embedding_bag, embedding_bag),
    "try_embedding_bag_multi": (_C.try_embedding_bag_multi, embedding_bag_multi),
    "try_embedding_bag": (_C.try_embedding_bag, embedding_bag),
    "try_dhe_bag_multi": (_C.try_dhe_bag_multi, dhe_bag_multi),
    "try_dhe_bag": (_C.try_dhe_bag, dhe_bag),
    "check_offsets": (_C.check_offsets, check_offsets),
    "check_ids": (_C.check_ids, check_ids),
    "update_tables": (_C.update_tables, update_tables),
    "count_steps": (_C.count_steps, steps),
    "sparse_gradient": (_C.sparse_gradient, sparse_gradient),
    "Decoder": (_C.Decoder, decoder),
    "dhe_bag_multi": (_C.dhe_bag_multi, dhe_bag_multi),
    "dhe_bag": (_C.dhe_bag, dhe_bag),
    "dhe_bag_kept": (_C.dhe_bag_kept, dhe_bag_kept),
    "KeptDecoder": (_C.KeptDecoder, kept_decoder),
    "StackWatch.of": (_C.StackWatch.of, stack_watch),
    "same_stack": (_C.same_stack, same_stack),
    "hash_encode": (_C.hash_encode, hashing("f4")),
    "hash_values": (_C.hash_values, hashing("i8")),
    "RowCache": (_C.RowCache, row_cache),
    "RowCache.lookup": (_C.RowCache.lookup, cache_call("lookup")),
    "RowCache.admit": (_C.RowCache.admit, cache_call("admit")),
    "RowCache.fill": (_C.RowCache.fill, cache_call("fill")),
    "RowCache.ids": (_C.RowCache.ids, held_ids),
    "CachedDecoders": (_C.CachedDecoders, cached_decoders),
    "cached_dhe_bag": (_C.cached_dhe_bag, cached_forward),
    "codebook_rows": (_C.codebook_rows, codebook_rows),
    "dhe_backward": (_C.dhe_backward, dhe_backward),
    "dhe_bag_keeping": (_C.dhe_bag_keeping, dhe_bag_keeping),
    "select_features": (_C.select_features, select_features),
    "unique_share": (_C.unique_share, unique_share),
    "join_bags": (_C.join_bags, join_bags),
    "read_json_query": (_C.read_json_query, json_query),
    "read_criteo": (_C.read_criteo, criteo_text),
    "encode_values": (_C.encode_values, coded_values),
    "checksum": (_C.checksum, summed_bytes),
    "PathProgram": (_C.PathProgram, path_program),
    "run_program": (_C.run_program, program_run),
    "try_run_program": (_C.try_run_program, program_run),
    "Mlp": (_C.Mlp, mlp),
    "mlp": (_C.mlp, mlp_run),
    "try_mlp_kept": (_C.try_mlp_kept, mlp_kept),
    "dot_interaction": (_C.dot_interaction, interaction),
    "dot_interaction_backward": (_C.dot_interaction_backward, interaction_backward),
    "Scheduler": (serve, scheduler),
    "Engine": (engine_calls, engine_queries),
    "FluidPrice": (
        price,
        by_name(
            executors=st.lists(st.lists(st.tuples(anything_float, anything_float), max_size=3), max_size=3),
            executor=st.integers(0, 3),
            rate=anything_float,
        ),
    ),
    "Traffic": (
        traffic,
        by_name(counts=st.lists(st.tuples(anything_float, st.integers(), anything_float), max_size=70)),
    ),
    "Correction": (
        correction,
        by_name(
            names=st.just(["a", "b"]), name=st.sampled_from("abc"), ratio=anything_float, now=anything_float
        ),
    ),
    "Latest": (
        _C.Latest,
        by_name(
            seconds=st.lists(anything_float, max_size=4),
            sizes=st.lists(st.integers(0, 9), max_size=4),
            sla=anything_float,
            spread=anything_float,
        ),
    ),
    "Overflow": (_C.Overflow, by_name(load=anything_float, grain=anything_float, bound=anything_float)),
    "Option": (_C.Option, by_name(path=st.just("a"), quality=anything_float, seconds=seconds)),
    "Lane": (_C.Lane, by_name(name=st.just("cpu"), options=st.lists(options, max_size=2))),
    "WeightWatch.of": (_C.WeightWatch.of, weight_watch),
    "PlaceWatch": (_C.PlaceWatch, place_watch),
    "TableGroup": (_C.TableGroup, table_group),
    "try_pool_tables": (_C.try_pool_tables, pooled_group),
}
# They take no argument, or a name only.
WITHOUT_ARRAYS = {
    "cpu_model",
    "hash_families",
    "isa",
    "row_formats",
    "runnable_isas",
    "use_isa",
}
MADE_BY_OTHERS = {"EngineJob", "EngineQuery", "Job", "Piece", "Refusal", "Ticket"}


def test_every_native_function_is_a_target():
    native = {name for name in dir(_C) if callable(getattr(_C, name)) and not name.startswith("__")}
    assert native == {target.partition(".")[0] for target in TARGETS} | WITHOUT_ARRAYS | MADE_BY_OTHERS


LISTS = {"weights", "biases", "decoders", "out_columns", "columns", "first", "second", "caches", "positions",
         "grad_weights", "grad_biases", "features", "places", "samples", "starts", "stops", "lanes", "tables",
         "mixing", "options", "bounds"}  # fmt: skip
IDS = {"indices", "offsets", "ids"}


@st.composite
def corrupted(draw, arguments: dict) -> dict:
    """The arguments with up to three of them replaced."""
    result = dict(arguments)
    tensors = [name for name, value in arguments.items() if isinstance(value, torch.Tensor | np.ndarray)]
    if tensors and draw(st.integers(0, 19)) == 0:
        # Alone: beside another bad argument pybind11's message prints it, and torch's repr crashes on it.
        result[draw(st.sampled_from(tensors))] = no_storage(draw(matrices))
        return result
    for name in draw(st.lists(st.sampled_from(sorted(arguments)), max_size=3, unique=True)):
        if name in LISTS and isinstance(result[name], list) and result[name] and draw(st.booleans()):
            items = list(result[name])  # one item of the list, or its length
            at = draw(st.integers(0, len(items)))
            items[at : at + 1] = draw(st.lists(hostile, max_size=1))
            result[name] = items
        elif name in LISTS:
            result[name] = draw(st.one_of(hostile, st.lists(integers, max_size=4)))
        else:
            result[name] = draw(hostile_ids if name in IDS else hostile)
    return result


def fuzz(target: str) -> None:
    function, valid_arguments = TARGETS[target]
    journal = Path(sys.argv[2]).open("w")  # noqa: SIM115 - must outlive a crash
    outcomes = {"result": 0, "exception": 0}

    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.data())
    def attack(data):
        guard = Guard()
        arguments = data.draw(corrupted(data.draw(valid_arguments(guard))))
        journal.seek(0)
        journal.truncate()
        journal.write("\n".join(f"{k} = {describe(v)}" for k, v in arguments.items()))
        journal.flush()
        positional = [arguments.pop("self")] if "self" in arguments else []
        try:
            function(*positional, **arguments)
            outcomes["result"] += 1
        except ALLOWED:
            outcomes["exception"] += 1
        guard.check()

    attack()
    print(outcomes)
    assert min(outcomes.values()) > EXAMPLES // 50, f"one-sided: {outcomes}"


def describe(value) -> str:
    if isinstance(value, torch.Tensor | np.ndarray):
        text = f"{type(value).__name__} {tuple(value.shape)} {value.dtype}"
        is_plain = type(value) in (torch.Tensor, np.ndarray) and 0 < math.prod(value.shape) <= 40
        if (
            is_plain
            and "int64" in str(value.dtype)
            and getattr(value, "device", None) in (None, torch.device("cpu"), "cpu")
        ):
            text += f" {value.tolist()}"
        return text
    if isinstance(value, Batch):
        return "Batch(" + ", ".join(f"{key}={describe(each)}" for key, each in value.tensors().items()) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(describe, value)) + "]"
    return repr(value)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_hostile_arguments(target, tmp_path):
    journal = tmp_path / "journal"
    command = [sys.executable, "-X", "faulthandler", __file__, target, str(journal)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, (
        f"{done.stdout[-2000:]}{done.stderr[-4000:]}\nlast call of {target}:\n{journal.read_text()}"
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    fuzz(sys.argv[1])
