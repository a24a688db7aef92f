"""``libmprec_ops.so``, the operators on torch's stable ABI: in processes that do not import mprec, and without Python.

The library takes minutes to build. Tests that need it run where ``MPREC_OPS_LIBRARY`` says where it is::

    cmake -S . -B build/torch_stable -DMPREC_PYTHON=OFF -DMPREC_STABLE_ABI=ON -DCMAKE_PREFIX_PATH=...
    cmake --build build/torch_stable --parallel 2 --target mprec_ops
    MPREC_OPS_LIBRARY=$PWD/build/torch_stable/libmprec_ops.so pytest -m slow tests/test_torch_stable.py
"""

import inspect
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mprec.hashing import coefficients
from mprec.ops._table import OPS
from mprec.row_formats import ROW_FORMATS

ROOT = Path(__file__).parents[1]
LIBRARY = os.environ.get("MPREC_OPS_LIBRARY")


def needs_library(test):
    reason = "MPREC_OPS_LIBRARY does not say where libmprec_ops.so is"
    return pytest.mark.slow(pytest.mark.timeout(900)(pytest.mark.skipif(not LIBRARY, reason=reason)(test)))


def run(*command, **options) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


# --------------------------------------------------------------------------------------------------- schemas


def test_schemas_are_those_of_python():
    source = (ROOT / "csrc/torch_stable/library.cpp").read_text()
    table = source[source.index("operators[] = {") : source.index("};", source.index("operators[] = {"))]
    entries = re.findall(r'\{((?:"[^"]*"\s*)+),\s*TORCH_BOX\(&(\w+)\)', table)
    assert len(entries) == table.count("TORCH_BOX") >= 8
    for literals, function in entries:
        schema = "".join(re.findall(r'"([^"]*)"', literals))
        name = schema.split("(")[0]
        assert name == function
        assert f"mprec::{schema}" == str(OPS[name].overload._schema)


# ------------------------------------------------------------------------------- operators, one call at a time


def ids(rows, count, dtype=torch.int64, seed=0):
    return torch.randint(0, rows, (count,), generator=torch.Generator().manual_seed(seed)).to(dtype)


def offsets(*lengths, dtype=torch.int64):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def decoder(widths, family="universal", seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    pairs = list(itertools.pairwise(widths))
    weights = [(torch.randn(out, into, generator=g) / into**0.5).to(dtype) for into, out in pairs]
    biases = [torch.randn(out, generator=g).to(dtype) for _, out in pairs]
    return coefficients(widths[0], family, seed), weights, biases


def one_decoder(*widths, family="universal", activation="relu", last="sigmoid", **options):
    return *decoder(widths, family, **options), family, activation, last


def several(*stacks, options=("universal", "relu", "none")):
    return (
        [hashes for hashes, _, _ in stacks],
        [weight for _, weights, _ in stacks for weight in weights],
        [bias for _, _, biases in stacks for bias in biases],
        [len(weights) for _, weights, _ in stacks],
        *options,
    )


TABLES = [torch.randn(9, 8, generator=torch.Generator().manual_seed(1)), torch.arange(60.0).view(20, 3)]
IDS = torch.cat([ids(9, 5), ids(20, 4)])  # of two features of three bags each
ENDS = offsets(2, 0, 3, 1, 1, 2)
PSW = torch.linspace(-1, 1, 9)
STACKS = decoder([16, 5, 8]), decoder([8, 3], seed=1)
MLP = decoder([6, 33, 2], seed=2)[1:]


def good_calls():
    """Calls that both have kernels for."""
    for dtype, mode in itertools.product([torch.float32, torch.float16, torch.bfloat16], range(3)):
        tables = [t.to(dtype) for t in TABLES]
        yield "embedding_bag", tables[0], ids(9, 7, torch.int32), offsets(3, 0, 4, dtype=torch.int32), mode, None, True
        yield "embedding_bag", tables[0], ids(9, 7), offsets(3, 0, 4)[:-1], mode, None, False, 3
        yield "embedding_bag_multi", tables, IDS, ENDS, mode
        if mode < 2:
            yield "embedding_bag", tables[0], ids(9, 7), offsets(3, 0, 4), mode, torch.rand(7).to(dtype), True, 0
            for weights in (PSW, PSW.to(dtype)):
                yield "embedding_bag_multi", tables, IDS, ENDS, mode, weights
    yield "embedding_bag_multi", [*TABLES, TABLES[1]], IDS, ENDS, 1, PSW, [0, 1, 1], 2
    yield "embedding_bag_multi", [TABLES[1]], IDS.int(), ENDS, 0, None, [1], 2
    yield "embedding_bag_multi", [torch.randn(9, 4).expand(9, 4)[::2]] * 2, IDS % 5, ENDS
    yield "embedding_bag_multi", TABLES, IDS.repeat_interleave(2)[::2], ENDS.repeat_interleave(2)[::2], 0, PSW
    yield "embedding_bag", TABLES[0], ids(9, 0), torch.tensor([0]), 0, None, True
    yield "embedding_bag", TABLES[0], ids(9, 0), torch.tensor([0, 0, 0]), 2
    rows = {name: f.encode(torch.randn(20, 8)) for name, f in ROW_FORMATS.items()}
    codes = [ROW_FORMATS[name].code for name in rows]
    batch = ids(20, 18), torch.arange(19)
    for mode in range(3):
        yield "quantized_embedding_bag_multi", list(rows.values()), codes, *batch, mode
    yield "quantized_embedding_bag_multi", list(rows.values()), codes, *batch, 1, torch.rand(18)
    yield "quantized_embedding_bag_multi", [rows["int4"]] * 3, [4] * 3, *batch, 0, None, [5, 0, 2], 6
    for family, activation in itertools.product(
        ["universal", "artifact", "artifact_gaussian", "sign", "u7", "u8"], ["none", "relu", "sigmoid", "mish"]
    ):
        stack = one_decoder(24, 12, 5, family=family, activation=activation, last=activation)
        yield "dhe_bag", ids(2**62, 7), offsets(3, 0, 4), *stack, 1, torch.rand(7), True
    for mode in range(3):
        yield "dhe_bag", ids(5, 40), offsets(3, 0, 37)[:-1], *one_decoder(16, 8), mode, None, False, 2
        yield "dhe_bag_multi", IDS, ENDS, *several(*STACKS), mode
    yield "dhe_bag_multi", IDS.int(), ENDS.int(), *several(*STACKS, STACKS[0]), 1, PSW, [1, 0, 1], 2
    for precision, family in [("float32", "u7"), ("float16", "u7"), ("bfloat16", "u7"), ("int8", "u7"), ("lut", "sign")]:
        stacks = several(decoder([64, 16, 4], family), decoder([32, 4], family), options=(family, "relu", "none"))
        yield "packed_dhe_bag_multi", IDS, ENDS, *stacks, [precision, "float32"], 0
    transposed = [weight.t().contiguous().t() for weight in STACKS[0][1]]
    yield "dhe_bag", IDS, ENDS, STACKS[0][0], transposed, STACKS[0][2], "universal", "relu", "none", 0, None, True
    for size in (0, 1, 3, 300):
        yield "mlp", torch.randn(size, 6), *MLP, "mish", "sigmoid"
        yield "dot_interaction", torch.randn(size, 5, 7)
        yield "dot_interaction", torch.randn(size, 5, 7), True
    yield "mlp", torch.randn(6, 4).t()[:, :6].contiguous(), [torch.randn(1, 6)], [torch.randn(1)], "none", "none"
    yield "mlp", torch.randn(6, 4).t(), *MLP, "relu", "none"
    # Weights that change where they are are seen at once, and so are those of a decoder that is no longer kept.
    changed = decoder([16, 5, 8], seed=3)
    call = "dhe_bag", IDS, ENDS, *changed, "universal", "relu", "none", 0, None, True
    for tensor in (changed[1][1], changed[2][0]):
        yield call
        yield "add_", tensor, 1
    yield call
    for seed in range(300):
        yield "dhe_bag", IDS, ENDS, *one_decoder(8, 2, seed=seed), 0, None, True
    yield call


def bad_calls():
    """What both refuse in the same words."""
    one, many = (TABLES[0], IDS, ENDS), (TABLES, IDS, ENDS)
    for name, arguments in (("embedding_bag", one), ("embedding_bag_multi", many)):
        first, indices, ends = arguments
        for wrong in (torch.tensor([0, 3, 2, 3, 3, 3, 9]), ENDS + 1, ENDS[:-1], torch.tensor([0, -1, 2, 3, 4, 5, 9])):
            yield name, first, indices, wrong, 0, None, *((True,) if name == "embedding_bag" else ())
        for wrong in (indices - 20, indices + 20, torch.full_like(indices, -1), indices.float(), indices.view(3, 3)):
            yield name, first, wrong, ends
        for wrong in (PSW[1:], PSW.double(), PSW.view(3, 3), PSW.half()):
            yield name, first, indices, ends, 0, wrong
        yield name, first, indices, ends, 3
        yield name, first, indices, ends, -1
        yield name, first, indices, ends, 2, PSW
        yield name, first, indices, ends[:0], 0, None, *((True,) if name == "embedding_bag" else ())
        yield name, first, indices, ends.double()
    yield "embedding_bag", TABLES[0][0], IDS, ENDS
    yield "embedding_bag", TABLES[0].long(), IDS, ENDS
    yield "embedding_bag_multi", [TABLES[0], TABLES[1].half()], IDS, ENDS
    yield "embedding_bag_multi", [TABLES[0], TABLES[1][0]], IDS, ENDS
    yield "embedding_bag_multi", [], IDS, ENDS
    for features, count in (([0], 2), ([0, 2], 2), ([0, -1], 2), ([0, 1], 0), (None, 3), (None, -1), ([1, 1], 2)):
        yield "embedding_bag_multi", TABLES, IDS + (features == [1, 1]) * 7, ENDS, 0, None, features, count
        yield "dhe_bag_multi", IDS - 8 * (features == [1, 1]), ENDS, *several(*STACKS), 0, None, features, count
    for rows, bits in (
        ([], []),
        ([TABLES[0]], [8, 8]),
        ([TABLES[0].byte(), TABLES[1]], [3, 0]),
        ([TABLES[0], TABLES[1].byte()], [0, 8]),
        ([TABLES[0], TABLES[1].long()], [0, 0]),
        ([TABLES[0], TABLES[1].double()], [0, 0]),
        ([TABLES[0][0], TABLES[1]], [0, 0]),
    ):
        yield "quantized_embedding_bag_multi", rows, bits, IDS, ENDS
    yield "quantized_embedding_bag_multi", TABLES, [0, 0], IDS + 20, ENDS
    yield "quantized_embedding_bag_multi", [t.half() for t in TABLES], [0, 0], IDS, ENDS, 0, PSW.half()
    hashes, weights, biases = decoder([8, 3, 2])
    names = "universal", "relu", "none"
    for stack in (
        (hashes, weights, biases, "universe", "relu", "none"),
        (hashes, weights, biases, "universal", "elu", "none"),
        (hashes, weights, biases, "universal", "relu", "elu"),
        (hashes.long(), weights, biases, *names),
        (hashes[:2], weights, biases, *names),
        (hashes[:, :0], weights, biases, *names),
        (hashes[0], weights, biases, *names),
        (hashes - 2**30, weights, biases, *names),
        (hashes, weights[:1], biases, *names),
        (hashes, [], [], *names),
        (hashes, [weights[0], weights[0]], biases, *names),
        (hashes, weights, biases[::-1], *names),
        (hashes, [weights[0], weights[1][0]], biases, *names),
        (hashes, [weights[0], weights[1].half()], biases, *names),
        (hashes, weights, [biases[0], biases[1].half()], *names),
        (hashes, [weights[0].int(), weights[1]], biases, *names),
    ):
        yield "dhe_bag", IDS, ENDS, *stack, 0, None, True
        lists, options = stack[1:3], stack[3:]
        both = [*weights, *lists[0]], [*biases, *lists[1]]
        yield "dhe_bag_multi", IDS, ENDS, [hashes, stack[0]], *both, [2, len(both[0]) - 2], *options
    for wrong in (ENDS + 1, ENDS[:-1], ENDS[:0]):
        yield "dhe_bag", IDS, wrong, hashes, weights, biases, *names, 0, None, True
    for layers in ([], [2], [2, 1], [4, -1], [2**62, 2**62]):
        yield "dhe_bag_multi", IDS, ENDS, [hashes] * 2, weights * 2, biases * 2, layers, *names
    for precision in ("half", "int8", "lut"):
        stacks = several(*STACKS, options=("artifact" if precision == "lut" else "sign", "relu", "none"))
        hashes_of = [coefficients(h.shape[1], stacks[4]) for h in stacks[0]]
        yield "packed_dhe_bag_multi", IDS, ENDS, hashes_of, *stacks[1:], [precision] * 2
    x = torch.randn(3, 6)
    for call in (
        (x[0], *MLP, "relu", "none"),
        (x.int(), *MLP, "relu", "none"),
        (x[:, :5], *MLP, "relu", "none"),
        (x, MLP[0], MLP[1][:1], "relu", "none"),
        (x, [], [], "relu", "none"),
        (x.double(), *MLP, "relu", "none"),
        (x, MLP[0], MLP[1][::-1], "relu", "none"),
        (x, *MLP, "gelu", "none"),
        (x, *MLP, "relu", "gelu"),
    ):
        yield "mlp", *call
    yield "dot_interaction", x
    yield "dot_interaction", x.int()[None]
    # Offsets and IDs of any kind: an error or the same result, and never memory of others.
    g = torch.Generator().manual_seed(0)
    for _ in range(100):
        ends = torch.randint(-2, 13, (int(torch.randint(0, 9, (), generator=g)),), generator=g)
        if torch.rand((), generator=g) < 0.5:
            ends = ends.sort().values
        indices = torch.randint(-1, 12, (int(torch.randint(0, 12, (), generator=g)),), generator=g)
        yield "embedding_bag_multi", TABLES, indices, ends
        yield "dhe_bag_multi", indices, ends, *several(*STACKS)
        yield "embedding_bag", TABLES[0], indices, ends


def only_in_python():
    """What Python serves by plain torch, and what this library says to it."""
    yield r"weight: .*only float32, float16 and bfloat16", "embedding_bag", TABLES[0].double(), IDS, ENDS
    yield r"indices: .*only int64 and int32.*torch.int16", "embedding_bag", TABLES[0], IDS.short(), ENDS
    yield r"weights\[1\]: expected rows of adjacent", "embedding_bag_multi", [TABLES[0], TABLES[0].t()], IDS % 8, ENDS
    wide = one_decoder(8, 3, dtype=torch.float64)
    yield r"weights\[0\]: .*only float32.*torch.float64", "dhe_bag", IDS, ENDS, *wide, 0, None, True
    mlp = [[t.double() for t in tensors] for tensors in MLP]
    yield r"weights\[0\]: .*only float32.*torch.float64", "mlp", torch.randn(3, 6).double(), *mlp, "relu", "none"
    yield r"vectors: .*only float32.*torch.float64", "dot_interaction", torch.randn(2, 3, 4).double()
    yield r"vectors: .*1 to 4096 vectors", "dot_interaction", torch.randn(2, 0, 4)


def outcome(name, *arguments):
    """The result, or what the exception says."""
    if name == "add_":
        return arguments[0].add_(arguments[1])
    try:
        return getattr(torch.ops.mprec, name)(*arguments)
    except Exception as error:
        return f"{error}"


#: Takes the library, a file of calls, and where to write their outcomes and the schemas.
CHILD = f"""
import sys
import torch
torch.ops.load_library(sys.argv[1])
{inspect.getsource(outcome)}
calls = torch.load(sys.argv[2])
found = [outcome(*call) for call in calls]
names = sorted({{name for name, *_ in calls}} - {{"add_"}})
schemas = {{name: str(getattr(torch.ops.mprec, name).default._schema) for name in names}}
torch.save((found, schemas), sys.argv[3])
assert not [name for name in sys.modules if name.startswith("mprec")]
"""


def outcomes(calls, folder):
    """Those of mprec, and those of a process that has the library alone; the schemas there."""
    torch.save(list(calls), folder / "calls.pt")
    run(sys.executable, "-I", "-c", CHILD, LIBRARY, folder / "calls.pt", folder / "outcomes.pt")
    calls = torch.load(folder / "calls.pt")
    found, schemas = torch.load(folder / "outcomes.pt")
    assert len(found) == len(calls)
    return calls, [outcome(*call) for call in calls], found, schemas


def same(a, b):
    return a == b if isinstance(a, str) or isinstance(b, str) else a.dtype == b.dtype and torch.equal(a, b)


@needs_library
def test_results_are_those_of_python_bit_for_bit(tmp_path):
    calls, expected, found, schemas = outcomes(good_calls(), tmp_path)
    assert not [said for said in expected if isinstance(said, str)]
    different = [call for call, a, b in zip(calls, expected, found, strict=True) if not same(a, b)]
    assert not different, (len(different), different[0])
    assert schemas == {name: str(OPS[name].overload._schema) for name in schemas}
    assert len(schemas) == 8


@needs_library
def test_errors_are_those_of_python_word_for_word(tmp_path):
    calls, expected, found, _ = outcomes(bad_calls(), tmp_path)
    assert all(isinstance(said, str) for said in expected[:-300])
    for call, a, b in zip(calls, expected, found, strict=True):
        assert same(a, b), (call, a, b)
    errors = {re.sub(r"-?\d+", "#", said) for said in found if isinstance(said, str)}
    assert len(errors) > 60, errors


@needs_library
def test_what_only_python_serves_is_refused_by_name(tmp_path):
    cases = list(only_in_python())
    _, _, found, _ = outcomes([call for _, *call in cases], tmp_path)
    for (pattern, *_), said in zip(cases, found, strict=True):
        assert isinstance(said, str), pattern
        assert re.search(pattern, said), (pattern, said)


# ------------------------------------------------------------------------------ beside mprec's Python package

BESIDE = """
import sys
import torch
import mprec.ops
names = [name for name in mprec.ops._table.OPS]
def kernels():
    return [torch._C._dispatch_dump(f"mprec::{name}") for name in names]
before = kernels()
torch.ops.load_library(sys.argv[1])
assert kernels() == before
table, ids = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([[1, 2], [4, 0]])
out = mprec.ops.embedding_bag(ids, table, mode="sum")
assert torch.equal(out, table[ids].sum(1))
out.sum().backward()
assert table.grad is not None
"""

BEFORE = """
import sys
import torch
torch.ops.load_library(sys.argv[1])
try:
    import mprec.ops
except RuntimeError as error:
    assert "mprec::embedding_bag" in str(error) and "multiple times" in str(error), error
else:
    raise AssertionError("mprec was imported")
"""


@needs_library
@pytest.mark.parametrize("code", [BESIDE, BEFORE], ids=["after mprec", "before mprec"])
def test_the_library_changes_nothing_of_mprec(code):
    run(sys.executable, "-c", code, LIBRARY)


# ------------------------------------------------------------------------------------------- without Python


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A folder with the example's program and package, and a function that runs the program there."""
    folder = tmp_path_factory.mktemp("aoti")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert cmake, "cmake is not installed: pip install mprec[test]"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    run(cmake, "-S", ROOT / "examples/aoti", "-B", folder / "build", "-DCMAKE_BUILD_TYPE=Release", prefix)
    run(cmake, "--build", folder / "build")
    cache = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    run(sys.executable, ROOT / "examples/aoti/export_model.py", folder, env=cache)

    def score(*files):
        command = [folder / "build/score", LIBRARY, folder / "model.pt2", *files]
        # Nothing of this process's environment; the loader tells what it loads.
        return subprocess.run(command, env={"LD_DEBUG": "files"}, capture_output=True, text=True)

    return folder, score


@needs_library
def test_a_package_is_scored(scored):
    folder, score = scored
    sizes = sorted(int(path.stem.removeprefix("inputs")) for path in folder.glob("inputs*.pt"))
    assert len(sizes) >= 3
    files = [folder / name for n in sizes for name in (f"inputs{n}.pt", f"out{n}.pt")]
    done = score(*files)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = set(re.findall(r"file=(\S+)", done.stderr))
    assert any("libmprec_ops" in file for file in loaded)
    assert not [file for file in loaded if "python" in Path(file).name]
    for size in sizes:
        expected, found = (torch.load(folder / f"{name}{size}.pt") for name in ("scores", "out"))
        assert found.shape == (size,)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@needs_library
def test_a_bad_id_is_named(scored, tmp_path):
    folder, score = scored
    dense, ids, offsets = torch.load(folder / "inputs7.pt")
    ids[int(offsets[7])] = 50_000  # the first one of the second feature
    torch.save((dense, ids, offsets), tmp_path / "bad.pt")
    done = score(tmp_path / "bad.pt", tmp_path / "out.pt")
    assert done.returncode == 1
    assert re.search(r"indices\[\d+\] \(feature 1, bag \d\) is 50000, not in the valid range \[0, 50000\)", done.stderr)
    assert not (tmp_path / "out.pt").exists()
