"""A whole path by the kernels: captured graphs on a GPU; by the interpreter, graphs that are fakes."""

import pytest
import torch
from fake_graphs import FakeGraphs
from mprec.triton_kernels import capturing, faults, grouped

import mprec
from mprec.errors import IdOutOfRangeError
from mprec.models import DLRM, CapturedPath
from mprec.nn import DheConfig, FeatureConfig, QuantizedEmbeddingBagCollection
from mprec.ops._table import Op

DHE = DheConfig(k=32, hidden=(16,))
KINDS = {
    "tables": ("table", "table", "table"),
    "decoders": ("dhe", "dhe", "dhe"),
    "both": ("hybrid", "table", "dhe"),
}


def model_of(kind):
    features = [
        FeatureConfig(f"f{t}", rows, 8, representation, mode=("sum", "mean", "sum")[t], dhe=DHE)
        for t, (rows, representation) in enumerate(zip((30, 7, 11), KINDS[kind], strict=True))
    ]
    return DLRM(features, 5, 8, (16,), (24,)).eval()


def batch_of(samples, longest):
    """IDs below 7 for 3 features, bags of 0 to ``longest``."""
    lengths = torch.randint(0, longest + 1, (3 * samples,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.randn(samples, 5), torch.randint(0, 7, (int(offsets[-1]),)), offsets


@pytest.fixture
def path_of(device, monkeypatch):
    """The path of a model on the device; on a CPU its operators run the kernels too."""
    if device.type == "cuda":
        return lambda model: mprec.compile_path(model.to(device))
    serve = Op.serve

    def make(model):
        monkeypatch.setattr(Op, "serve", lambda op, call, device=None: serve(op, call, "cuda"))
        return CapturedPath(model, graphs=FakeGraphs())

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_scores(kind, path_of, device):
    model, batches = (
        model_of(kind),
        [batch_of(samples, longest) for samples, longest in ((3, 2), (4, 1), (1, 5))],
    )
    with torch.no_grad():
        want = [model(*inputs).sigmoid() for inputs in batches]
    path = path_of(model)
    for _ in range(2):
        for inputs, scores in zip(batches, want, strict=True):
            torch.testing.assert_close(path(*inputs), scores, rtol=1e-4, atol=1e-5)
            there = path(*(tensor.to(device) for tensor in inputs))
            assert there.device.type == device.type
            torch.testing.assert_close(there.cpu(), scores, rtol=1e-4, atol=1e-5)
    assert not path.reasons
    assert {bucket.samples for bucket in path._captured} == {1, 4}


def test_quantised_rows(path_of, device):
    model = model_of("tables")
    model.embeddings = QuantizedEmbeddingBagCollection(model.embeddings, tables="int8")
    inputs = batch_of(3, 2)
    want = model(*inputs).sigmoid().detach()
    path = path_of(model)
    torch.testing.assert_close(path(*inputs), want, rtol=1e-4, atol=1e-5)
    assert not path.reasons


@pytest.mark.parametrize("kind", KINDS)
def test_an_id_out_of_range_is_told_by_its_own_call(kind, path_of):
    path = path_of(model_of(kind))
    dense, indices, offsets = torch.randn(3, 5), torch.arange(9) % 7, torch.arange(10)
    want = path(dense, indices, offsets)
    wrong = indices.clone()
    wrong[4] = -5
    with pytest.raises(IdOutOfRangeError, match=r"indices\[4\] \(feature 1, bag 1\) is -5"):
        path(dense, wrong, offsets)
    torch.testing.assert_close(path(dense, indices, offsets), want)


def test_a_replaced_weight_is_captured_anew(path_of, device):
    path = path_of(model_of("both"))
    inputs = batch_of(3, 2)
    path(*inputs)
    weight = path.model.embeddings.tables["f1"].weight
    weight.data = torch.randn_like(weight)
    with torch.no_grad():
        want = path.model(*(tensor.to(device) for tensor in inputs)).sigmoid().cpu()
    torch.testing.assert_close(path(*inputs), want, rtol=1e-4, atol=1e-5)


def test_a_graph_keeps_its_tables_of_addresses_and_counts_for_itself(device, monkeypatch):
    monkeypatch.setattr(grouped, "_tables", type(grouped._tables)())
    monkeypatch.setattr(grouped, "_CAPACITY", 1)
    own = torch.zeros(4, dtype=torch.int64, device=device)
    capture = capturing.Capture(own, [])
    with capturing.capturing(capture):
        first = grouped.device_table([[1, 2]], device)
        grouped.device_table([[3, 4]], device)
        assert faults.counter(device) is own
    assert len(grouped._tables) == 1
    assert [table.tolist() for table in capture.tables] == [[[1, 2]], [[3, 4]]]
    assert capture.tables[0] is first
    assert capturing.current() is None
    assert faults.counter(device) is not own
