"""Compilers and exporters: dynamic batches, modules for serving, ONNX, operations counted, profiles."""

import pytest
import torch
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

from mprec import nn
from mprec.models import DLRM, MultiPathDLRM

DHE = nn.DheConfig(k=8, hidden=(4,))
FEATURES = [nn.FeatureConfig("a", 20, 4), nn.FeatureConfig("b", 9, 4)]
DYNAMIC = {0: Dim.DYNAMIC}


def batch(size, length=3):
    torch.manual_seed(size)
    indices = torch.cat([torch.randint(0, f.num_embeddings, (size * length,)) for f in FEATURES])
    return torch.randn(size, 2), indices, torch.arange(0, 2 * size * length + 1, length)


def dlrm(representation):
    torch.manual_seed(0)
    return DLRM(nn.with_representation(FEATURES, representation, DHE, 1), 2, 4, (8,), (8,)).eval()


def multi_path(name):
    torch.manual_seed(0)
    model = MultiPathDLRM(nn.with_representation(FEATURES, "hybrid", DHE), 2, 4, (8,), (8,)).eval()
    return model if name == "all" else model.path(name)


@pytest.mark.parametrize("dim", [Dim.DYNAMIC, Dim.AUTO])
@pytest.mark.parametrize("representation", ["table", "dhe", "hybrid", "low_rank", "select"])
def test_a_model_is_exported_for_any_batch(representation, dim):
    check_export(dlrm(representation), batch(8), batch(5), dim)


@pytest.mark.parametrize("name", ["all", "table", "dhe", "select"])
def test_paths_are_exported_for_any_batch(name):
    check_export(multi_path(name), batch(8), batch(5))


def check_export(module, example, other, dim=Dim.DYNAMIC):
    program = torch.export.export(module, example, dynamic_shapes=({0: dim},) * len(example))
    for arguments in (example, other):
        torch.testing.assert_close(program.module()(*arguments), module(*arguments))
    with pytest.raises(Exception, match=r"size|shape|Guard|offsets"):
        program.module()(*example[:-1], other[-1])


def hybrid():
    torch.manual_seed(0)
    return nn.EmbeddingBagCollection(nn.with_representation(FEATURES, "hybrid", DHE))


def low_rank():
    torch.manual_seed(0)
    tables = {
        f.name: nn.LowRankTable(torch.randn(f.num_embeddings, 2), torch.randn(2, 4), torch.randn(4))
        for f in FEATURES
    }
    return nn.LowRankEmbeddingBagCollection(FEATURES, tables)


SERVING = {
    "int8 rows": lambda: nn.QuantizedEmbeddingBagCollection(hybrid()),
    "int4 rows": lambda: nn.QuantizedEmbeddingBagCollection(hybrid(), "int4"),
    "float16 decoders": lambda: nn.QuantizedEmbeddingBagCollection(hybrid(), "float16", "float16"),
    "int8 decoders": lambda: nn.QuantizedEmbeddingBagCollection(hybrid(), decoders={"b": "int8"}),
    "float8 decoders": lambda: nn.QuantizedEmbeddingBagCollection(hybrid(), decoders="float8"),
    "means for unseen": lambda: nn.MeanForUnseen(hybrid(), {"a": torch.arange(5), "b": torch.tensor([1])}),
    "means, int8": lambda: nn.MeanForUnseen(SERVING["int8 rows"](), {"a": torch.arange(5)}),
    "low rank": low_rank,
}


def test_inductor_calls_kernels_where_it_refuses_what_it_might_decompose(monkeypatch):
    """It does wherever the environment names ``CI``."""
    import torch._inductor.lowering as lowering

    monkeypatch.setenv("CI", "true")
    for op in (torch.ops.mprec.embedding_bag_multi.default, torch.ops.mprec.dhe_bag_multi.default):
        monkeypatch.delitem(lowering.lowerings, op, raising=False)
    module = multi_path("all").embeddings.eval()
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(module, fullgraph=True, dynamic=True)
        torch.testing.assert_close(compiled(*batch(8)[1:]), module(*batch(8)[1:]))


@pytest.mark.parametrize("name", SERVING)
@pytest.mark.parametrize("weighted", [False, True])
def test_serving_modules_compile_whole_and_are_exported(name, weighted):
    module = SERVING[name]().eval()
    example, other = batch(8)[1:], batch(5)[1:]
    if weighted:
        example, other = ((*a, torch.rand(len(a[0]))) for a in (example, other))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for arguments in (example, other):
        torch.testing.assert_close(compiled(*arguments), module(*arguments))
    program = torch.export.export(module, example, dynamic_shapes=(DYNAMIC,) * len(example))
    torch.testing.assert_close(program.module()(*other), module(*other))
    bad = other[0].clone()
    bad[-1] = -1
    with pytest.raises((IndexError, RuntimeError)):
        program.module()(bad, *other[1:])
    if name in ("low rank", "int8 rows"):  # beyond the feature's table is an error, not another feature's row
        bad[0], bad[-1] = 20, 0
        with pytest.raises((IndexError, RuntimeError)):
            program.module()(bad, *other[1:])
    assert torch.is_grad_enabled()
    assert not module(*other).requires_grad or name == "means for unseen"


def swapped():
    model = torch.nn.Sequential(torch.nn.EmbeddingBag(20, 4, mode="sum"), torch.nn.Linear(4, 1))
    nn.swap(model)
    return model


ONNX = {
    "swapped": (swapped(), (torch.randint(20, (5, 3)),), (torch.randint(20, (7, 3)),)),
    "bag": (nn.EmbeddingBag(20, 4, mode="sum"), (torch.randint(20, (5, 3)),), (torch.randint(20, (7, 3)),)),
    "mean, padding": (
        nn.EmbeddingBag(20, 4, padding_idx=2),
        (torch.tensor([[2, 1], [2, 2], [7, 9], [2, 3]]),),
        (torch.tensor([[2, 1], [5, 2], [2, 2]]),),
    ),
    "max": (
        nn.EmbeddingBag(20, 4, mode="max", include_last_offset=True),
        (torch.tensor([1, 2, 3, 3]), torch.tensor([0, 2, 2, 3, 4])),
        (torch.tensor([4, 5, 6, 1, 0]), torch.tensor([0, 0, 2, 5])),
    ),
    "embedding": (nn.Embedding(20, 4), (torch.randint(20, (5, 3)),), (torch.randint(20, (7, 3)),)),
    "low rank": (nn.LowRankEmbedding(20, 4), (torch.randint(20, (5, 3)),), (torch.randint(20, (7, 3)),)),
    "mlp": (nn.MLP([4, 8, 2]), (torch.randn(3, 4),), (torch.randn(5, 4),)),
    "dot": (
        nn.DotInteraction(),
        (torch.randn(3, 4), torch.randn(3, 2, 4)),
        (torch.randn(5, 4), torch.randn(5, 2, 4)),
    ),
    **{
        f"dhe, {family}": (
            nn.DeepHashEmbedding(None, 4, nn.DheConfig(k=8, hidden=(4,), family=family)),
            (torch.randint(2**40, (5, 3)),),
            (torch.randint(2**62, (7, 3)),),
        )
        for family in ("universal", "sign", "u7", "artifact")
    },
    **{f"dlrm, {r}": (dlrm(r), batch(8), batch(5)) for r in ("table", "dhe", "hybrid", "low_rank")},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ONNX)
def test_onnx(name):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    module, example, other = ONNX[name]
    module.eval()
    program = torch.onnx.export(
        module, example, dynamo=True, dynamic_shapes=(DYNAMIC,) * len(example), verbose=False
    )
    session = runtime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for arguments in (example, other):
        feed = {put.name: a.numpy() for put, a in zip(session.get_inputs(), arguments, strict=True)}
        got = torch.from_numpy(session.run(None, feed)[0])
        with torch.no_grad():
            torch.testing.assert_close(got, module(*arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["int8 rows", "means for unseen", "low rank", "hot_dhe", "hot_low_rank"])
def test_what_onnx_cannot_say_is_refused(name):
    pytest.importorskip("onnxscript")
    module = SERVING[name]() if name in SERVING else dlrm(name).embeddings
    with pytest.raises(torch.onnx.OnnxExporterError):
        torch.onnx.export(module.eval(), batch(8)[1:], dynamo=True, verbose=False)


@pytest.mark.parametrize("name", ["bag", "mean, padding", "max", "mlp", "dot", "dhe, sign", "dlrm, hybrid"])
def test_decompositions_leave_only_aten(name):
    module, example, other = ONNX[name]
    program = torch.export.export(module.eval(), example, dynamic_shapes=(DYNAMIC,) * len(example))
    table = torch.export.default_decompositions() | {
        op: f
        for op, f in torch._decomp.decomposition_table.items()
        if getattr(op, "namespace", "") == "mprec"
    }
    plain = program.run_decompositions(table)
    targets = {str(node.target) for node in plain.graph.nodes if node.op == "call_function"}
    assert not [target for target in targets if target.startswith("mprec")]
    torch.testing.assert_close(plain.module()(*other), module(*other), rtol=1e-4, atol=1e-5)


def test_floating_point_operations_are_counted():
    bag = nn.DeepHashEmbeddingBag(4, nn.DheConfig(k=16, hidden=(8,)))
    ids = torch.randint(100, (5, 3))
    with FlopCounterMode(display=False) as counter:
        out = bag(ids)
    forward = 15 * 2 * (16 * 8 + 8 * 4)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bag(ids)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 3 * forward - 15 * 2 * 16 * 8
    collection = nn.EmbeddingBagCollection(
        [nn.FeatureConfig("a", 20, 4, "dhe", dhe=DHE), nn.FeatureConfig("b", 9, 6, "dhe", dhe=DHE)]
    )
    indices, offsets = torch.zeros(7, dtype=torch.int64), torch.tensor([0, 2, 2, 4, 7])  # 2 of a, 5 of b
    once = 2 * 2 * (8 * 4 + 4 * 4) + 5 * 2 * (8 * 4 + 4 * 6)
    with FlopCounterMode(display=False) as counter:
        out = collection(indices, offsets)
    assert counter.get_total_flops() == once
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 3 * once - 7 * 2 * 8 * 4
    with FlopCounterMode(display=False) as counter:
        nn.MLP([4, 8, 2])(torch.randn(3, 4))
        nn.DotInteraction()(torch.randn(3, 4), torch.randn(3, 2, 4))
    assert counter.get_total_flops() == 3 * 2 * (4 * 8 + 8 * 2) + 3 * 3 * 2 * 4


@pytest.mark.parametrize("name", ["bag", "dhe, universal", "dlrm, hybrid"])
def test_a_profile_has_our_names_without_gradients(name):
    module, example, _ = ONNX[name]
    with torch.no_grad(), torch.profiler.profile() as profile:
        module(*example)
    assert [event.key for event in profile.key_averages() if event.key.startswith("mprec::")]
