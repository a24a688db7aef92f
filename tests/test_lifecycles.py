"""What becomes of modules in torch's tools: functional calls, tracing, compiling, exporting, saving, mapping.

Every kind of module through every tool, against the module itself.
"""

import copy
import io
import pickle

import pytest
import torch
import torch.optim.swa_utils
import torch.package
import torch.utils.checkpoint
from test_exporters import DHE, FEATURES, SERVING, batch, dlrm, hybrid, multi_path
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

import mprec.optim
from mprec import nn
from mprec.cache import CachedDeepHashEmbeddingBag, CachedEmbeddingBagCollection
from mprec.representations import REPRESENTATIONS, SELECT

ROWS = torch.tensor([[1, 5, 3], [0, 0, 8]])
OTHER_ROWS = torch.tensor([[8, 2, 2], [7, 1, 3], [0, 6, 4]])


def collection(representation):
    torch.manual_seed(0)
    return nn.EmbeddingBagCollection(nn.with_representation(FEATURES, representation, DHE, 1))


#: Modules of rows of IDs, of batches of features, and of batches with dense numbers.
OF_ROWS = {
    "bag": lambda: nn.EmbeddingBag(9, 4, mode="sum"),
    "dhe bag": lambda: nn.DeepHashEmbeddingBag(4, DHE),
    "hybrid bag": lambda: nn.HybridEmbeddingBag(9, 4, DHE),
    "low-rank bag": lambda: nn.LowRankEmbeddingBag(9, 4),
    "embedding": lambda: nn.Embedding(9, 4),
    "dhe embedding": lambda: nn.DeepHashEmbedding(9, 4, DHE),
    "low-rank embedding": lambda: nn.LowRankEmbedding(9, 4),
    "cached bag": lambda: CachedDeepHashEmbeddingBag(nn.DeepHashEmbeddingBag(4, DHE), 1 << 14),
}
OF_FEATURES = {
    **{kind: lambda kind=kind: collection(kind) for kind in (*REPRESENTATIONS, SELECT)},
    "mapped": lambda: nn.MappedEmbeddingBagCollection(collection("table"), fresh=True),
    "cached": lambda: CachedEmbeddingBagCollection(hybrid(), 1 << 14),
    **SERVING,
}
OF_SAMPLES = {
    **{f"dlrm, {kind}": lambda kind=kind: dlrm(kind) for kind in ("table", "hybrid", "low_rank")},
    "paths": lambda: multi_path("all"),
}


def make(name):
    """(the module in evaluation, arguments, others of the same shapes, others of another batch size)."""
    torch.manual_seed(0)
    if name in OF_ROWS:
        return OF_ROWS[name]().eval(), (ROWS,), (ROWS.flip(1),), (OTHER_ROWS,)
    start = 1 if name in OF_FEATURES else 0
    module = {**OF_FEATURES, **OF_SAMPLES}[name]().eval()
    dense, indices, offsets = batch(4)
    same = dense.flip(0), indices.flip(0) % 9, offsets
    return module, batch(4)[start:], same[start:], batch(6)[start:]


every = pytest.mark.parametrize("name", [*OF_ROWS, *OF_FEATURES, *OF_SAMPLES])


@every
def test_functional_calls(name):
    module, example, _, other = make(name)
    halves = {key: value.detach() / 2 for key, value in module.named_parameters()}
    twin = copy.deepcopy(module)
    twin.load_state_dict({**twin.state_dict(), **halves})
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            before = module(*example)
            for arguments in (example, other):
                out = torch.func.functional_call(module, halves, arguments)
                torch.testing.assert_close(out, twin(*arguments))
            torch.testing.assert_close(module(*example), before)


@every
@pytest.mark.filterwarnings("ignore")
def test_traced_by_jit_and_loaded(name):
    module, example, same, _ = make(name)
    if name in ("float16 decoders", "int8 decoders"):
        with pytest.raises(RuntimeError, match="unsupported input list type: str"):
            torch.jit.trace(module, example, check_trace=False)
        return
    traced = torch.jit.trace(module, example, check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for arguments in (example, same):
        torch.testing.assert_close(loaded(*arguments), module(*arguments))


@pytest.mark.parametrize("name", ["hot_dhe", "hot_low_rank", "hooks"])
@pytest.mark.filterwarnings("ignore")
def test_a_trace_of_features_one_by_one_refuses_another_division(name):
    """Where features' IDs begin is a constant of the trace."""
    module = collection("table" if name == "hooks" else name)
    if name == "hooks":
        module.tables["a"].register_forward_hook(lambda module, given, out: 2 * out)
    indices, offsets = batch(4)[1:]
    with torch.no_grad():
        traced = torch.jit.trace(module, (indices, offsets), check_trace=False)
        torch.testing.assert_close(traced(indices.flip(0) % 9, offsets), module(indices.flip(0) % 9, offsets))
        moved = offsets.clone()
        moved[4] -= 1  # one ID of the first feature becomes the second one's
        for other in ((indices % 9, moved), batch(6)[1:]):
            with pytest.raises(RuntimeError, match=r"InvalidOffsetsError|out of bounds"):
                traced(*other)


@pytest.mark.parametrize("tool", [torch.jit.script, torch.fx.symbolic_trace])
@pytest.mark.parametrize("name", ["bag", "embedding"])
def test_tables_are_scripted_and_traced_symbolically(tool, name):
    module, example, _, other = make(name)
    made = tool(module)
    for arguments in (example, other):
        assert torch.equal(made(*arguments), module(*arguments))


@every
def test_compiled_whole(name):
    module, example, _, other = make(name)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for arguments in (example, other):
            torch.testing.assert_close(compiled(*arguments), module(*arguments))
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not module(*example).requires_grad:
        assert name in SERVING
        return
    for arguments in (example, other):
        grads = [
            torch.autograd.grad(m(*arguments).square().sum(), parameters, allow_unused=True)
            for m in (compiled, module)
        ]
        assert any(g is not None and g.abs().sum() > 0 for g in grads[1])
        for ours, plain in zip(*grads, strict=True):
            torch.testing.assert_close(ours, plain)


@every
def test_exported_saved_and_loaded(name):
    module, example, _, other = make(name)
    with torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=({0: Dim.DYNAMIC},) * len(example))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for arguments in (example, other):
        torch.testing.assert_close(loaded(*arguments), module(*arguments).detach())


def exported(module, example):
    return torch.export.export(module, example, dynamic_shapes=({0: Dim.DYNAMIC},) * len(example)).module()


def traced(module, example):
    return torch.jit.trace(module, example, check_trace=False)


def counted(module, example):
    def call(*arguments):
        with FlopCounterMode(display=False):
            return module(*arguments)

    return call


NOT_TRACED = {"float16 decoders", "int8 decoders"}
#: Where an ID beyond the vocabulary is an ID: deep hash embeddings take any, and means answer what is unseen.
TAKE_ANY_ID = {"dhe", "select", "means for unseen", "means, int8"}


@pytest.mark.parametrize("tool", [exported, traced, counted])
@pytest.mark.parametrize("name", OF_FEATURES)
@pytest.mark.filterwarnings("ignore")
def test_bad_batches_are_refused_under_every_tool(name, tool):
    """Checks that a call makes by itself are not made there; look-ups have to refuse."""
    if tool is traced and name in NOT_TRACED:
        pytest.skip("is not traced")
    module, example, _, _ = make(name)
    with torch.no_grad():
        made = tool(module, example)
        torch.testing.assert_close(made(*example), module(*example))
        for at, place, bad in (
            (0, 0, -1),  # an ID
            (0, 0, FEATURES[0].num_embeddings),
            (1, 0, 1),  # an offset
            (1, -1, len(example[0]) - 1),
        ):
            if bad == FEATURES[0].num_embeddings and name in TAKE_ANY_ID:
                continue
            arguments = [tensor.clone() for tensor in example]
            arguments[at][place] = bad
            for call in (module, made):
                with pytest.raises((IndexError, RuntimeError, ValueError)):
                    call(*arguments)


def test_a_collection_of_one_feature_is_exported_for_any_number_of_ids():
    for kind in REPRESENTATIONS:
        module = nn.EmbeddingBagCollection(nn.with_representation(FEATURES[:1], kind, DHE)).eval()
        indices, offsets = batch(4)[1:]
        program = exported(module, (indices[:12], offsets[:5]))
        torch.testing.assert_close(program(indices[:6], offsets[:3]), module(indices[:6], offsets[:3]))


class Leaves(torch.fx.Tracer):
    def is_leaf_module(self, module, name):
        return type(module).__module__.startswith("mprec") or super().is_leaf_module(module, name)


@every
def test_traced_as_leaves_by_fx(name):
    module, example, _, other = make(name)
    model = torch.nn.Sequential(torch.nn.Identity(), module) if len(example) == 1 else Around(module)
    graph = torch.fx.GraphModule(model, Leaves().trace(model))
    for arguments in (example, other):
        torch.testing.assert_close(graph(*arguments), module(*arguments))


class Around(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.inner = module

    def forward(self, first, second, third=None):
        return self.inner(first, second) if third is None else self.inner(first, second, third)


@every
def test_weights_from_a_mapped_file(name, tmp_path):
    """``torch.load(mmap=True)`` with ``assign=True``: no copy, and the outputs of what was saved."""
    module, example, _, other = make(name)
    file = tmp_path / "state.pt"
    torch.save(module.state_dict(), file)
    fresh = make(name)[0]
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.add_(1.0)
        fresh(*example)  # decoders packed, rows cached
    state = torch.load(file, mmap=True, weights_only=True)
    fresh.load_state_dict(state, assign=True)
    if isinstance(module, nn.MeanForUnseen):
        fresh.refresh()
    with torch.no_grad():
        for arguments in (example, other):
            torch.testing.assert_close(fresh(*arguments), module(*arguments))


def test_a_table_over_a_file(tmp_path):
    file = tmp_path / "rows"
    rows = torch.randn(9, 4)
    rows.numpy().tofile(file)
    mapped = torch.from_file(str(file), shared=False, size=36, dtype=torch.float32).view(9, 4)
    bag = nn.EmbeddingBag.from_pretrained(mapped, mode="sum")
    assert torch.equal(bag(ROWS), rows[ROWS].sum(1))
    assert bag.weight.data_ptr() == mapped.data_ptr()


def test_a_compiled_collection_goes_past_its_cache():
    """The graph decodes: what the cache holds and counts, stays."""
    cached = CachedEmbeddingBagCollection(hybrid(), 1 << 14)
    arguments = batch(4)[1:]
    with torch.no_grad():
        cached(*arguments)
        before = cached.stats()
        torch._dynamo.reset()
        compiled = torch.compile(cached, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), cached(*arguments))
        assert cached.stats().calls == before.calls + 1  # the call that was not compiled


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["bag", "dhe bag", "hybrid bag", "embedding"])
def test_activation_checkpoints(name, reentrant):
    module, (rows,), _, _ = make(name)
    top = torch.nn.Linear(1, 1)
    grads = []
    for checkpointed in (False, True):
        seed = torch.ones(1, requires_grad=True)

        def run(seed):
            return module(rows).sum() * top(seed)

        out = (
            torch.utils.checkpoint.checkpoint(run, seed, use_reentrant=reentrant)
            if checkpointed
            else run(seed)
        )
        out.backward()
        grads.append([p.grad.clone() for p in module.parameters()])
        module.zero_grad()
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_frozen_model_may_hold_quantised_rows_but_keeps_their_precision():
    """Casting the whole would leave the collection's output in float32 before layers in bfloat16."""
    model = torch.nn.Sequential(nn.QuantizedEmbeddingBagCollection(hybrid()), torch.nn.Linear(16, 1))
    with pytest.raises(TypeError, match="a quantised collection keeps its precisions"):
        model.to(torch.bfloat16)


@pytest.mark.parametrize("make_optimizer", ["SGD", "Adagrad", "RowWiseAdagrad", "Adam"])
def test_groups_closures_and_schedules_of_optimizers(make_optimizer):
    torch.manual_seed(0)
    tables = [nn.EmbeddingBag(9, 4, mode="sum") for _ in range(2)]
    twins = copy.deepcopy(tables)
    kind = getattr(mprec.optim, make_optimizer)
    groups = [{"params": tables[0].parameters(), "lr": 0.5}, {"params": tables[1].parameters()}]
    one = kind(groups, lr=0.1)
    alone = [kind(twins[0].parameters(), lr=0.5), kind(twins[1].parameters(), lr=0.1)]

    def loss(modules):
        return sum((m(ROWS) - 1).square().sum() for m in modules)

    def closure():
        one.zero_grad()
        found = loss(tables)
        found.backward()
        return found

    for _ in range(3):
        expected = loss(twins)
        expected.backward()
        assert torch.equal(one.step(closure), expected)
    del alone
    for ours, twin in zip(tables, twins, strict=True):
        assert torch.equal(ours.weight, twin.weight)
    if make_optimizer in ("Adagrad", "RowWiseAdagrad"):
        with pytest.raises(ValueError, match="momentum"):  # as torch's Adagrad
            torch.optim.lr_scheduler.OneCycleLR(one, 0.1, total_steps=10)
        torch.optim.lr_scheduler.OneCycleLR(one, 0.1, total_steps=10, cycle_momentum=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["dlrm, table", "dlrm, hybrid", "int8 rows", "means for unseen", "cached"])
def test_compiled_ahead_of_time_for_any_batch(name, tmp_path):
    module, example, _, other = make(name)
    with torch.no_grad():
        program = torch.export.export(module, example, dynamic_shapes=({0: Dim.DYNAMIC},) * len(example))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "m.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        for arguments in (example, other):
            torch.testing.assert_close(loaded(*arguments), module(*arguments))


@every
def test_packaged_and_loaded(name):
    module, arguments, *_ = make(name)
    file = io.BytesIO()
    with torch.package.PackageExporter(file) as package:
        package.extern(["mprec.**", "torch.**", "numpy.**"])
        package.save_pickle("made", "module.pkl", module)
    file.seek(0)
    loaded = torch.package.PackageImporter(file).load_pickle("made", "module.pkl")
    with torch.no_grad():
        torch.testing.assert_close(loaded(*arguments), module(*arguments))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "save": lambda module: saved_and_loaded(module),
    "average": lambda module: torch.optim.swa_utils.AveragedModel(module).module,
    "share": lambda module: copy.deepcopy(module).share_memory(),
}


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every
@pytest.mark.parametrize("way", COPIES)
@torch.no_grad()
def test_copies(name, way):
    if name == "float8 decoders" and way == "pickle":
        pytest.skip("torch does not unpickle float8 tensors")
    module, example, _, other = make(name)
    expected = [module(*arguments).clone() for arguments in (example, other)]
    twin = COPIES[way](module)
    for _ in range(2):  # what a cache holds, too
        for arguments, output in zip((example, other), expected, strict=True):
            torch.testing.assert_close(twin(*arguments), output)
    for tensor in twin.parameters():
        tensor.add_(1.0)
    if name not in SERVING:
        assert not torch.allclose(twin(*example), expected[0])
    torch.testing.assert_close(module(*example), expected[0])


@every
def test_states_of_distributed_checkpoints(name):
    module, arguments, *_ = make(name)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        set_model_state_dict(other, get_model_state_dict(module))
        torch.testing.assert_close(other(*arguments), module(*arguments))
