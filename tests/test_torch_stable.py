"""``libmprec_ops.so``, the operators on torch's stable ABI: without mprec's package, and without Python.

The library takes minutes to build. Tests that need it run where ``MPREC_OPS_LIBRARY`` says where it is::

    cmake -S . -B build/torch_stable -DMPREC_PYTHON=OFF -DMPREC_STABLE_ABI=ON -DCMAKE_PREFIX_PATH=...
    cmake --build build/torch_stable --parallel 2 --target mprec_ops
    MPREC_OPS_LIBRARY=$PWD/build/torch_stable/libmprec_ops.so pytest -m slow tests/test_torch_stable.py
"""

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import stable_calls
import torch
from torch.export import Dim

from mprec import nn
from mprec.ops._table import OPS

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/aoti"
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


# -------------------------------------------------------------------------------------- one call at a time


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
    calls, expected, found, schemas = outcomes(stable_calls.good(), tmp_path)
    assert not [said for said in expected if isinstance(said, str)]
    different = [call for call, a, b in zip(calls, expected, found, strict=True) if not same(a, b)]
    assert not different, (len(different), different[0])
    assert schemas == {name: str(OPS[name].overload._schema) for name in schemas}
    assert len(schemas) == 8


@needs_library
def test_errors_are_those_of_python_word_for_word(tmp_path):
    calls, expected, found, _ = outcomes(stable_calls.bad(), tmp_path)
    assert all(isinstance(said, str) for said in expected[: -stable_calls.OF_ANY_KIND])
    for call, a, b in zip(calls, expected, found, strict=True):
        assert same(a, b), (call, a, b)
    errors = {re.sub(r"-?\d+", "#", said) for said in found if isinstance(said, str)}
    assert len(errors) > 60, errors


@needs_library
def test_what_only_python_serves_is_refused_by_name(tmp_path):
    cases = list(stable_calls.only_in_python())
    _, _, found, _ = outcomes([call for _, *call in cases], tmp_path)
    for (pattern, *_), said in zip(cases, found, strict=True):
        assert isinstance(said, str), pattern
        assert re.search(pattern, said), (pattern, said)


RESIZED = """
import sys
import torch
torch.ops.load_library(sys.argv[1])
ids, ends = torch.tensor([8, 0, 1]), torch.tensor([0, 2, 3])
for shorter in (0, 7):  # of table, IDs, offsets
    for name in ("table", "ids", "ends"):
        call = {"table": torch.randn(9, 4), "ids": ids.clone(), "ends": ends.clone()}
        call[name].untyped_storage().resize_(shorter)
        try:
            torch.ops.mprec.embedding_bag(*call.values(), 0, None, True)
        except ValueError as error:
            assert "expected memory for all elements" in str(error), error
        else:
            raise AssertionError(name)
"""

THREADS = """
import sys
from concurrent.futures import ThreadPoolExecutor
import torch
torch.ops.load_library(sys.argv[1])
x = torch.randn(5, 8)
stacks = [([torch.randn(16, 8), torch.randn(3, 16)], [torch.randn(16), torch.randn(3)]) for _ in range(300)]
def run(i):
    (first, second), (bias, last) = weights, biases = stacks[i % len(stacks)]
    found = torch.ops.mprec.mlp(x, weights, biases, "relu", "none")
    torch.testing.assert_close(found, (x @ first.T + bias).relu() @ second.T + last, rtol=1e-4, atol=1e-4)
with ThreadPoolExecutor(4) as pool:
    list(pool.map(run, range(3000)))
"""


@needs_library
@pytest.mark.parametrize("code", [RESIZED, THREADS], ids=["resized storages", "several threads"])
def test_in_a_process_of_its_own(code):
    run(sys.executable, "-I", "-c", code, LIBRARY)


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
    assert "(mprec::" in str(error) and "multiple times" in str(error), error
else:
    raise AssertionError("mprec was imported")
"""


@needs_library
@pytest.mark.parametrize("code", [BESIDE, BEFORE], ids=["after mprec", "before mprec"])
def test_the_library_changes_nothing_of_mprec(code):
    run(sys.executable, "-c", code, LIBRARY)


# ------------------------------------------------------------------------------------------- without Python


@pytest.fixture(scope="module")
def score(tmp_path_factory):
    """Builds the example's program; ``score(folder, *files)`` runs it on the package in a folder."""
    build = tmp_path_factory.mktemp("build")
    cmake = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert cmake, "cmake is not installed: pip install mprec[test]"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    run(cmake, "-S", EXAMPLE, "-B", build, "-DCMAKE_BUILD_TYPE=Release", prefix)
    run(cmake, "--build", build)

    def score(folder, *files):
        command = [build / "score", LIBRARY, folder / "model.pt2", *(folder / file for file in files)]
        # Nothing of this process's environment; the loader tells what it loads.
        return subprocess.run(command, env={"LD_DEBUG": "files"}, capture_output=True, text=True)

    return score


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with what the example's script writes."""
    folder = tmp_path_factory.mktemp("exported")
    cache = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    run(sys.executable, EXAMPLE / "export_model.py", folder, env=cache)
    return folder


def check_scores(folder, sizes, done):
    assert done.returncode == 0, done.stderr[-3000:]
    for size in sizes:
        expected, found = (torch.load(folder / f"{name}{size}.pt") for name in ("scores", "out"))
        assert found.shape == (size,)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@needs_library
def test_a_package_is_scored(score, exported):
    sizes = sorted(int(path.stem.removeprefix("inputs")) for path in exported.glob("inputs*.pt"))
    assert len(sizes) >= 3
    done = score(exported, *(f"{name}{n}.pt" for n in sizes for name in ("inputs", "out")))
    check_scores(exported, sizes, done)
    loaded = set(re.findall(r"file=(\S+)", done.stderr))
    assert any("libmprec_ops" in file for file in loaded)
    assert not [file for file in loaded if "python" in Path(file).name]


@needs_library
def test_a_bad_id_is_named(score, exported):
    dense, ids, offsets = torch.load(exported / "inputs7.pt")
    ids[int(offsets[7])] = 50_000  # the first one of the second feature
    torch.save((dense, ids, offsets), exported / "bad.pt")
    done = score(exported, "bad.pt", "nothing.pt")
    assert done.returncode == 1
    said = r"indices\[\d+\] \(feature 1, bag \d\) is 50000, not in the valid range \[0, 50000\)"
    assert re.search(said, done.stderr), done.stderr[-3000:]
    assert not (exported / "nothing.pt").exists()


U7 = nn.DheConfig(k=32, hidden=(16,), family="u7")
FEATURES = [
    nn.FeatureConfig("a", 50, 8),
    nn.FeatureConfig("b", 30, 8, "hybrid", dhe=U7),
    nn.FeatureConfig("c", 9, 8, "dhe", dhe=U7),
]


class Serving(torch.nn.Module):
    """Calls the operators that the example's model does not."""

    def __init__(self):
        super().__init__()
        collection = nn.EmbeddingBagCollection(FEATURES)
        rows, decoders = {"a": "int8", "b": "float16"}, {"b": "int8", "c": "float16"}
        self.embeddings = nn.QuantizedEmbeddingBagCollection(collection, rows, decoders)
        self.bag, self.hashed = nn.EmbeddingBag(20, 8, mode="mean"), nn.DeepHashEmbeddingBag(8, U7)
        self.bottom, self.top = nn.MLP([4, 16, 8], last_activation="relu"), nn.MLP([8 + 21, 16, 1])
        self.interaction = nn.DotInteraction()

    def forward(self, dense, indices, offsets, ids):
        vectors = self.embeddings(indices, offsets).unflatten(1, (-1, 8))
        vectors = torch.cat([vectors, self.bag(ids)[:, None], self.hashed(ids)[:, None]], dim=1)
        return self.top(self.interaction(self.bottom(dense), vectors)).squeeze(1)


def serving_batch(size):
    indices = torch.cat([torch.randint(f.num_embeddings, (2 * size,)) for f in FEATURES])
    return torch.randn(size, 4), indices, torch.arange(0, 6 * size + 1, 2), torch.randint(20, (size, 3))


@needs_library
@torch.no_grad()
def test_serving_modules_are_scored(score, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = Serving().eval()
    program = torch.export.export(model, serving_batch(8), dynamic_shapes=({0: Dim.DYNAMIC},) * 4)
    called = {str(node.target).split(".")[1] for node in program.graph.nodes if "mprec" in str(node.target)}
    assert called == {
        "embedding_bag", "quantized_embedding_bag_multi", "dhe_bag", "packed_dhe_bag_multi", "mlp",
        "dot_interaction",
    }  # fmt: skip
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    for size in (1, 5):
        inputs = serving_batch(size)
        torch.save(inputs, tmp_path / f"inputs{size}.pt")
        torch.save(model(*inputs), tmp_path / f"scores{size}.pt")
    check_scores(tmp_path, (1, 5), score(tmp_path, "inputs1.pt", "out1.pt", "inputs5.pt", "out5.pt"))
