"""A whole path as captured graphs: buckets, padding, faults, and what makes a graph be captured anew. Graphs
are fakes here; tests/triton has the real ones."""

import copy
import pickle
import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
from fake_graphs import FakeGraphs
from test_compiled_path import batch, make
from torch import nn

import mprec
from mprec.bags import Bags
from mprec.data import Batch
from mprec.dispatch import ScoringPath
from mprec.errors import IdOutOfRangeError, InvalidOffsetsError, PathCompileError
from mprec.models import CapturedPath, MultiPathDLRM
from mprec.models.captured import Bucket
from mprec.nn import QuantizedEmbeddingBagCollection
from mprec.serving.executors import CudaExecutor


def captured(model, **options):
    graphs = FakeGraphs()
    return CapturedPath(model, graphs=graphs, **options), graphs


def check(path, *inputs):
    scores = path(*inputs)
    with torch.no_grad():
        want = path.model(*inputs).sigmoid()
    assert (scores.shape, scores.dtype) == ((len(inputs[0]),), torch.float32)
    torch.testing.assert_close(scores, want, rtol=2e-5, atol=2e-6)
    return scores


# ------------------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize(
    ("representation", "hybrid", "interaction"),
    [("table", "both", "dot"), ("dhe", "both", "dot"), ("hybrid", "mean", "dot"), ("hybrid", "both", "cat")],
)
@pytest.mark.parametrize("num_dense", [13, 0])
def test_scores_are_the_models(representation, hybrid, interaction, num_dense):
    model = make(representation, hybrid=hybrid, interaction=interaction, num_dense=num_dense)
    path, graphs = captured(model)
    for samples in (1, 2, 3, 5, 8, 7, 6, 1, 64, 33):
        for longest in (1, 3, 0):
            check(path, *batch(model, samples, longest))
    assert graphs.replays == 30
    assert not path.reasons


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_of_either_type(dtype):
    path, graphs = captured(make())
    check(path, *batch(path.model, 5, dtype=dtype))
    assert graphs.replays == 1


def test_every_path_of_a_multi_path_model():
    plain = make("hybrid", hybrid="mean")
    model = MultiPathDLRM(plain.features, 13, 16, (64, 32), (77, 30)).eval()
    for name in mprec.models.PATHS:
        path, graphs = captured(model.path(name))
        check(path, *batch(model, 3))
        assert graphs.replays == 1


def test_quantised_rows():
    model = make()
    model.embeddings = QuantizedEmbeddingBagCollection(model.embeddings, tables="int8")
    path, graphs = captured(model)
    check(path, *batch(model, 3))
    assert graphs.replays == 1


def test_a_batch_leaves_nothing_to_the_next():
    """Scores are the same bits, whatever larger batch was in the bucket before."""
    path, _ = captured(make("hybrid", hybrid="mean"))
    small, large = batch(path.model, 5, 2), batch(path.model, 8, 3)
    want = path(*small)
    for fill in (float("nan"), float("inf")):
        large[0].fill_(fill)
        path(*large)
        assert torch.equal(path(*small), want)


def test_scores_are_the_callers():
    path, _ = captured(make())
    inputs = batch(path.model, 4)
    first = path(*inputs)
    want = first.clone()
    path(*batch(path.model, 4, seed=9))
    assert torch.equal(first, want)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_any_mode_may_capture_and_any_other_replay(mode):
    path, graphs = captured(make())
    inputs = batch(path.model, 4)
    with mode():
        want = path(*inputs)
    for other in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with other():
            assert torch.equal(path(*inputs), want)
            assert not path(*inputs).requires_grad
    assert (graphs.captures, graphs.replays) == (1, 7)


# ---------------------------------------------------------------------------------------------------- buckets


def test_a_graph_for_each_bucket():
    path, graphs = captured(make())
    sizes = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 100: 128}
    for samples in sizes:
        check(path, *batch(path.model, samples, 1))
    assert graphs.captures == len(set(sizes.values()))
    assert set(path._captured) == {Bucket(size, 4 * size) for size in sizes.values()}


def test_more_ids_have_buckets_of_their_own():
    path, graphs = captured(make())
    dense, _, _ = batch(path.model, 2)
    for each in (1, 2, 3, 5, 64):
        offsets = torch.arange(9) * each
        check(path, dense, torch.zeros(8 * each, dtype=torch.int64), offsets)
    assert set(path._captured) == {Bucket(2, 8 * room) for room in (1, 2, 4, 8, 64)}
    assert graphs.replays == 5


def test_what_no_bucket_holds_goes_to_the_model():
    path, graphs = captured(make(), buckets=(2, 4))
    check(path, *batch(path.model, 5))
    check(path, batch(path.model, 2)[0], torch.zeros(8 * 65, dtype=torch.int64), torch.arange(9) * 65)
    assert graphs.replays == 0
    check(path, *batch(path.model, 1))
    assert set(path._captured) == {Bucket(2, 8)}


@pytest.mark.parametrize("buckets", [(), (0, 1), (2, 1), (1, 1)])
def test_buckets_rise(buckets):
    with pytest.raises(ValueError, match="buckets: expected rising numbers of samples from 1 on"):
        captured(make(), buckets=buckets)


# -------------------------------------------------------------------------------------- what is not captured


def test_bags_alone_and_what_graphs_do_not_take():
    path, graphs = captured(make(modes=("sum",)))
    dense, indices, offsets = batch(path.model, 5)
    bags = Bags(indices, offsets, num_features=4)
    check(path, dense, bags)
    assert graphs.replays == 1
    weighted = bags._replace(per_sample_weights=torch.rand(len(indices)))
    check(path, dense, weighted)
    check(path, dense, indices.to(torch.int16), offsets)
    assert graphs.replays == 1


def test_training_goes_to_the_model():
    path, graphs = captured(make())
    path.model.train()
    scores = check(path, *batch(path.model, 5))
    assert not scores.requires_grad
    assert graphs.captures == 0
    path.model.eval()
    check(path, *batch(path.model, 5))
    assert graphs.captures == 1


def test_what_cannot_be_captured_says_why_once():
    graphs = FakeGraphs(RuntimeError("operation not permitted when stream is capturing"))
    path = CapturedPath(make(), graphs=graphs)
    message = (
        "up to 8 samples and 32 IDs are scored without a CUDA graph: RuntimeError: operation not permitted"
    )
    with pytest.warns(UserWarning, match=message):
        check(path, *batch(path.model, 5, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(path, *batch(path.model, 7, 1))
    assert list(path.reasons) == [Bucket(8, 32)]
    graphs.error = None
    check(path, *batch(path.model, 2, 1))
    assert graphs.replays == 1


def _hooked(model):
    model.top.register_forward_hook(lambda *_: None)


def _half(model):
    model.top.half()


def _elsewhere(model):
    model.top.to("meta")


REFUSED = {
    "forward hooks": (_hooked, "top: has forward hooks"),
    "16 bits": (_half, "dense layers in float32, got torch.float16"),
    "two devices": (_elsewhere, "all weights on one device, got cpu, meta"),
    "of its own": (lambda model: setattr(model, "forward", lambda *_: None), "computes in its own way"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_models_say_why(what):
    change, message = REFUSED[what]
    model = make()
    change(model)
    with pytest.raises(PathCompileError, match=message):
        CapturedPath(model, graphs=FakeGraphs())


def test_refused_precisions():
    with pytest.raises(PathCompileError, match="precision: dense layers in int8 are for the CPU"):
        CapturedPath(make(), "int8", graphs=FakeGraphs())
    with pytest.raises(ValueError, match="precision: expected one of float32, bfloat16, int8, got 'double'"):
        CapturedPath(make(), "double", graphs=FakeGraphs())
    with pytest.raises(PathCompileError, match="model: expected a DLRM, got Linear"):
        CapturedPath(nn.Linear(2, 3), graphs=FakeGraphs())
    with pytest.raises(PathCompileError, match="model: expected one on CUDA, got one on cpu"):
        CapturedPath(make())


def test_compile_path_asks_where_the_model_is(monkeypatch):
    monkeypatch.setattr("mprec.models.captured._graphs_of", lambda device: FakeGraphs())
    model = make()
    assert type(mprec.compile_path(model)) is mprec.models.CompiledPath
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    assert type(mprec.compile_path(model)) is CapturedPath


# ------------------------------------------------------------------------------------------- changed weights


def _replace(model):
    model.top[0].weight = nn.Parameter(torch.randn_like(model.top[0].weight))


def _move(model):
    table = model.embeddings.tables["f1"].weight
    table.data = torch.randn_like(table)


def _shorten(model):
    table = model.embeddings.tables["f3"].weight
    table.data = table.data[:300]


def _layer(model):
    model.top[2] = nn.Linear(77, 30)


def _activation(model):
    model.bottom[1] = nn.Sigmoid()


def _swap(model):
    torch.utils.swap_tensors(model.bottom[0].bias, nn.Parameter(torch.randn(64)))


def _rows(model):
    model.embeddings.tables["f0"] = nn.EmbeddingBag(50, 16)


def _no_bias(model):
    model.top[0].bias = None


def _all(model):
    model.top = copy.deepcopy(model.top)


CHANGES = {
    "weight replaced": _replace,
    "weight moved": _move,
    "rows fewer": _shorten,
    "layer": _layer,
    "activation": _activation,
    "swap_tensors": _swap,
    "table's module": _rows,
    "bias gone": _no_bias,
    "MLP": _all,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_replaced_or_moved_is_captured_anew(change):
    model = make(vocabularies=(50, 7, 300, 1000))
    path, graphs = captured(model)
    inputs = batch(model, 5, 1)
    inputs[1].clamp_(max=6)
    check(path, *inputs)
    CHANGES[change](model)
    for _ in range(2):
        check(path, *inputs)
    assert (graphs.captures, graphs.replays) == (2, 3)


def test_what_is_written_counts_at_once():
    path, graphs = captured(make("hybrid", hybrid="mean"))
    inputs = batch(path.model, 5)
    before = check(path, *inputs)
    with torch.no_grad():
        for parameter in path.model.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(check(path, *inputs), before)
    path.model.load_state_dict({k: v.clone() for k, v in make("hybrid", hybrid="mean").state_dict().items()})
    assert torch.equal(check(path, *inputs), before)
    assert graphs.captures == 1


def test_a_model_that_can_no_longer_be_captured_serves_itself():
    path, graphs = captured(make())
    inputs = batch(path.model, 5)
    check(path, *inputs)
    path.model.top[2] = nn.Linear(77, 30)
    path.model.top.register_forward_hook(lambda *_: None)
    check(path, *inputs)
    path.model.top._forward_hooks.clear()
    check(path, *inputs)
    assert (graphs.captures, graphs.replays) == (2, 2)


# ----------------------------------------------------------------------------------------------------- faults


def _count(faults, position, value, feature):
    """As kernels do."""
    if faults.device_copy[0] == 0:
        faults.device_copy[1:] = torch.tensor([feature, position, value])
    faults.device_copy[0] += 1


def test_an_id_out_of_range_is_told_by_its_own_call():
    path, graphs = captured(make())
    dense, indices, offsets = batch(path.model, 5, 1)
    path(dense, indices, offsets)
    wrong = indices.clone()
    wrong[7] = 7  # feature 1, bag 2
    graphs.on_replay = lambda faults: _count(faults, 7, 7, 1)
    # the fake's operators would raise themselves
    replay = path._captured[Bucket(8, 32)].replay
    path._captured[Bucket(8, 32)].replay = lambda: graphs.on_replay(graphs.faults)
    with pytest.raises(
        IdOutOfRangeError, match=r"indices\[7\] \(feature 1, bag 2\) is 7, not in .* \[0, 7\)"
    ):
        path(dense, wrong, offsets)
    path._captured[Bucket(8, 32)].replay, graphs.on_replay = replay, lambda faults: None
    check(path, dense, indices, offsets)  # told once


def test_a_fault_of_an_earlier_call_is_told_by_the_next():
    path, graphs = captured(make())
    inputs = batch(path.model, 5, 1)
    path(*inputs)
    _count(graphs.faults, 3, -4, 0)
    graphs.faults.start_copy()
    with pytest.raises(IdOutOfRangeError, match=r"1 IDs out of range in an earlier call on cpu .* is -4"):
        path(*inputs)
    check(path, *inputs)


def test_offsets_on_the_host_are_checked():
    path, graphs = captured(make())
    dense, indices, offsets = batch(path.model, 5, 1)
    offsets[3] = 400
    with pytest.raises(InvalidOffsetsError, match=r"offsets\["):
        path(dense, indices, offsets)
    assert graphs.replays == 0


@pytest.mark.parametrize("what", ["dense", "offsets"])
def test_wrong_shapes_are_told_by_the_model(what):
    path, _ = captured(make())
    dense, indices, offsets = batch(path.model, 5, 1)
    wrong = {"dense": (dense[:, :3], indices, offsets), "offsets": (dense, indices, offsets[:-1])}[what]
    with pytest.raises(ValueError, match=what):
        path(*wrong)


# ------------------------------------------------------------------------------------------- threads, copies


def test_threads_take_turns():
    path, graphs = captured(make())
    batches = [batch(path.model, samples, 1, seed=s) for s in range(4) for samples in (1, 3, 8)]
    with torch.no_grad():
        want = [path.model(*inputs).sigmoid() for inputs in batches]
    wrong = []

    def call(first):
        for turn in range(40):
            at = (first + turn) % len(batches)
            if not torch.allclose(path(*batches[at]), want[at], rtol=1e-5, atol=1e-6):
                wrong.append(at)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (graphs.captures, graphs.replays) == (3, 160)


def test_pickles_hold_the_model_alone(monkeypatch):
    monkeypatch.setattr("mprec.models.captured._graphs_of", lambda device: FakeGraphs())
    path, _ = captured(make(), buckets=(4, 8))
    inputs = batch(path.model, 3)
    want = path(*inputs)
    for twin in (pickle.loads(pickle.dumps(path)), copy.deepcopy(path)):
        assert (twin.buckets, twin.model is path.model) == ((4, 8), False)
        torch.testing.assert_close(check(twin, *inputs), want)


# ---------------------------------------------------------------------------------------------------- serving


class _Scores:
    def __init__(self, path):
        self.path, self.is_captured, self.seen = path, path is not None, []

    def __call__(self, batch):
        self.seen.append(batch)
        return torch.zeros(len(batch)) if self.path is None else self.path(batch.dense, batch.bags)


def test_the_executor_leaves_copies_to_a_captured_path(monkeypatch):
    """It pins the batch; a path without graphs gets it on the device."""
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    path, graphs = captured(make())
    models = {"captured": _Scores(path), "eager": _Scores(None)}
    paths = [ScoringPath(name, "table", 0.5, model, "shape") for name, model in models.items()]
    executor = CudaExecutor("gpu", paths, None, "meta")
    executor.start()
    dense, indices, offsets = batch(path.model, 3)
    whole = Batch(dense, Bags(indices, offsets, num_features=4), torch.zeros(3))
    torch.testing.assert_close(executor.run("captured", whole), path(dense, indices, offsets))
    executor.run("eager", whole)
    assert models["captured"].seen[0].dense.is_cpu
    assert models["eager"].seen[0].dense.is_meta
    assert graphs.replays == 2


def test_a_scorer_says_how_it_runs(monkeypatch):
    from mprec.paths.checkpoints import Scorer

    monkeypatch.setattr("mprec.models.captured._graphs_of", lambda device: FakeGraphs())
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: True))
    scorer = Scorer(make())
    monkeypatch.undo()
    assert scorer.is_captured
    assert scorer.program() is None
    dense, indices, offsets = batch(scorer.model, 3)
    whole = Batch(dense, Bags(indices, offsets, num_features=4), torch.zeros(3))
    torch.testing.assert_close(scorer(whole), check(scorer.compiled, dense, indices, offsets))
    assert not Scorer(make()).is_captured
