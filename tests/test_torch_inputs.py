"""Forms of tensors and modules that torch takes: lazy signs, misaligned memory, shared outputs, nested rows,
scripts, compilers, profilers."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.profiler import profile

import mprec.nn
from mprec import ops
from mprec.errors import DtypeError
from mprec.nn import DeepHashEmbeddingBag, DheConfig, EmbeddingBag, EmbeddingBagCollection, FeatureConfig

I, O = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 2])  # noqa: E741
ENDS = torch.tensor([0, 2, 4])
SMALL = DheConfig(k=8, hidden=(4,))
grad_modes = pytest.mark.parametrize("grad", [False, True])


def table():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


# --------------------------------------------------------------------------------- negative bit, alignment


@grad_modes
@pytest.mark.parametrize("which", ["weight", "input", "offsets", "per_sample_weights"])
@pytest.mark.parametrize("multi", [False, True])
def test_lazy_negations_have_their_sign(grad, which, multi):
    arguments = {"weight": table(), "input": I, "offsets": ENDS, "per_sample_weights": torch.rand(4)}
    lazy = dict(arguments)
    lazy[which] = torch._neg_view(-arguments[which])
    assert lazy[which].is_neg()

    def call(weight, input, offsets, per_sample_weights):
        if multi:
            return ops.embedding_bag_multi([weight], input, offsets, "sum", per_sample_weights)
        return ops.embedding_bag(
            input, weight, offsets, mode="sum", per_sample_weights=per_sample_weights,
            include_last_offset=True,
        )  # fmt: skip

    with torch.set_grad_enabled(grad):
        if grad:
            arguments["weight"].requires_grad_()
        torch.testing.assert_close(call(**lazy), call(**arguments))


def test_a_parameter_that_becomes_a_negation():
    module = EmbeddingBag(5, 3, mode="sum", _weight=table()).requires_grad_(False)
    before = module(I, O)
    module.weight.data = torch._neg_view(module.weight.data.clone())
    torch.testing.assert_close(module(I, O), -before)


@torch.no_grad()
@pytest.mark.parametrize("which", [0, 1, 2])
def test_lazy_negations_in_a_batch_of_features(which):
    features = [FeatureConfig("a", 5, 3), FeatureConfig("b", 5, 3, "hybrid", dhe=SMALL)]
    for chosen in (features[:1], features[1:]):
        collection = EmbeddingBagCollection(chosen)
        call = [I, ENDS, torch.rand(4)]
        lazy = [*call]
        lazy[which] = torch._neg_view(-call[which])
        for module in (collection, mprec.nn.QuantizedEmbeddingBagCollection(collection, tables="float32")):
            torch.testing.assert_close(module(*lazy), module(*call))


@torch.no_grad()
@pytest.mark.parametrize("which", ["input", "per_sample_weights", "coefficients", "weight"])
def test_lazy_negations_in_decoders(which):
    module = DeepHashEmbeddingBag(3, SMALL)
    rows, psw = I.view(2, 2), torch.rand(2, 2)
    expected = module(rows, None, psw)
    if which == "coefficients":
        module.coefficients = torch._neg_view(-module.coefficients)
    elif which == "weight":
        module.decoder[0].weight = torch.nn.Parameter(torch._neg_view(-module.decoder[0].weight.data))
    elif which == "input":
        rows = torch._neg_view(-rows)
    else:
        psw = torch._neg_view(-psw)
    torch.testing.assert_close(module(rows, None, psw), expected)


def test_an_output_with_the_negative_bit():
    out = torch._neg_view(torch.zeros(2, 3))
    ops.embedding_bag(I, table(), O, mode="sum", out=out)
    torch.testing.assert_close(out.clone(), ops.embedding_bag(I, table(), O, mode="sum"))


@grad_modes
@pytest.mark.parametrize("which", ["weight", "input", "offsets"])
def test_misaligned_memory(grad, which):
    arguments = {"weight": table(), "input": I, "offsets": O}

    def shifted(t):
        raw = bytearray(b"x" + np.ascontiguousarray(t.numpy()).tobytes())
        return torch.frombuffer(raw, dtype=t.dtype, offset=1).view(t.shape)

    odd = arguments | {which: shifted(arguments[which])}
    if grad:
        odd["weight"].requires_grad_()
    torch.testing.assert_close(
        ops.embedding_bag(mode="sum", **odd).detach(), ops.embedding_bag(mode="sum", **arguments)
    )


# ------------------------------------------------------------------------------------------------- outputs


def test_an_output_used_again_before_backward_is_noticed():
    w, buffer, linear = table(), torch.empty(2, 3), torch.nn.Linear(3, 1)
    loss = 0
    for ids in (torch.tensor([1, 2, 3, 4]), torch.tensor([3, 4, 0, 1])):
        loss = loss + linear(ops.embedding_bag(ids, w, O, mode="sum", out=buffer)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@torch.no_grad()
def test_every_write_into_an_output_raises_its_counter():
    features = [FeatureConfig("a", 5, 3), FeatureConfig("b", 5, 3, "dhe", dhe=SMALL)]
    for chosen in (features[:1], features[1:], features):
        collection = EmbeddingBagCollection(chosen)
        out = torch.empty(2, 3 * len(chosen))
        batch = torch.arange(2 * len(chosen)), torch.arange(2 * len(chosen) + 1)
        for module in (collection, mprec.nn.QuantizedEmbeddingBagCollection(collection)):
            before = out._version
            assert module(*batch, out=out) is out
            assert out._version > before
    out = torch.empty(2, 3)
    ops.embedding_bag_multi([table()], I, ENDS, out=out)
    assert out._version == 1
    with torch.inference_mode():
        kept = torch.empty(2, 3)
        assert ops.embedding_bag(I, table(), O, mode="sum", out=kept) is kept


@torch.no_grad()
def test_tables_updated_by_operators_raise_their_counters():
    w, sums = table(), torch.zeros(5, 1)
    bags = torch.ones(1, 3), torch.tensor([1]), torch.tensor([0, 1]), 0, None, -1, [0], 1, [0]
    torch.ops.mprec.table_sgd_([w], *bags, 0.1)
    assert w._version == 1
    torch.ops.mprec.table_rowwise_adagrad_([w], [sums], *bags, 0.1, 1e-8)
    assert (w._version, sums._version) == (2, 1)


@torch.no_grad()
def test_an_output_that_shares_memory_with_what_is_read():
    w = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    ids, offsets = torch.tensor([1, 2, 4, 5, 4, 3, 2, 9]), torch.tensor([0, 4, 8])
    expected = ops.embedding_bag_multi([w], ids, offsets)
    for call in (
        lambda w, out: ops.embedding_bag_multi([w], ids, offsets, out=out),
        lambda w, out: ops.embedding_bag(ids, w, offsets[:2], mode="sum", out=out),
    ):
        own = w.clone()
        assert call(own, own[3:5]).data_ptr() == own[3:5].data_ptr()
        assert torch.equal(own[3:5], expected)
        assert torch.equal(own[:3], w[:3])
        assert torch.equal(own[5:], w[5:])
    psw = torch.ones(8)
    weighted = ops.embedding_bag(ids, w[:, :1], offsets[:2], mode="sum", per_sample_weights=psw)
    out = psw[2:4].view(2, 1)
    ops.embedding_bag(ids, w[:, :1], offsets[:2], mode="sum", per_sample_weights=psw, out=out)
    assert torch.equal(out, weighted)


# -------------------------------------------------------------------------------------- kinds of arguments


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_nested_rows(mode):
    rows = [torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([0, 4, 4])]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    bag = EmbeddingBag(5, 3, mode=mode)
    offsets = torch.tensor([0, 2, 3])
    expected = bag(torch.cat(rows), offsets)
    out = bag(nested)
    assert torch.equal(out, expected)
    out.sum().backward()
    assert bag.weight.grad is not None
    dhe = DeepHashEmbeddingBag(3, SMALL, mode=mode)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(dhe(nested), dhe(torch.cat(rows), offsets))
            assert torch.equal(bag(nested), expected)
    if mode == "sum":
        weights = torch.nested.nested_tensor([torch.rand(len(r)) for r in rows], layout=torch.jagged)
        flat = bag(torch.cat(rows), offsets, weights.values())
        assert torch.equal(bag(nested, per_sample_weights=weights), flat)
    with pytest.raises(ValueError, match="jagged"):
        bag(torch.nested.nested_tensor(rows, layout=torch.strided))


def test_bools_are_ids_as_in_torch():
    w, ids = table(), torch.tensor([True, False])
    expected = F.embedding_bag(ids, w, torch.tensor([0]), mode="sum")
    assert torch.equal(ops.embedding_bag(ids, w, torch.tensor([0]), mode="sum"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_weights_with_narrow_tables(dtype):
    features = [FeatureConfig("a", 10, 4), FeatureConfig("b", 10, 4, "dhe", dhe=SMALL)]
    collection = EmbeddingBagCollection(features, dtype=dtype)
    ids, ends, psw = torch.tensor([1, 2, 3, 4]), torch.arange(5), torch.rand(4, requires_grad=True)
    with torch.no_grad():
        evaluated = collection(ids, ends, psw)
    trained = collection(ids, ends, psw)
    assert evaluated.dtype == trained.dtype == dtype
    torch.testing.assert_close(evaluated, trained.detach())
    trained.sum().backward()
    assert psw.grad.dtype == torch.float32
    with pytest.raises(DtypeError):  # as torch
        ops.embedding_bag(I, table().to(dtype), O, mode="sum", per_sample_weights=torch.rand(4))


def test_max_norm_of_a_table_made_in_inference_mode():
    with torch.inference_mode():
        w = torch.ones(10, 3)
    out = ops.embedding_bag(torch.tensor([1, 2]), w, torch.tensor([0]), mode="sum", max_norm=0.1)
    assert out[0, 0].item() == pytest.approx(0.1154, abs=1e-3)


def test_numbers_out_of_place_are_named():
    with pytest.raises(ValueError, match="num_features: expected at least 1, got 0"):
        torch.ops.mprec.embedding_bag_multi([table()], I, ENDS, 0, None, None, 0)
    with pytest.raises(ValueError, match="mode has to be one of"):
        ops.embedding_bag(I, table(), O, mode=[])
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(ValueError, match=r"mode: expected 0 \(sum\), .*, got 7"):
            torch.ops.mprec.embedding_bag(table().to(dtype), I, O, 7)
    with pytest.raises(RuntimeError, match="not in the valid range"):  # torch's phrases
        ops.embedding_bag(torch.tensor([9]), table(), torch.tensor([0]))
    with pytest.raises(RuntimeError, match="have the same type as"):
        ops.embedding_bag(I, table(), O, mode="sum", per_sample_weights=torch.ones(4).double())
    with pytest.raises(NotImplementedError, match="only supported for mode='sum'"):
        ops.embedding_bag(I, table(), O, mode="max", per_sample_weights=torch.ones(4))
    with pytest.raises(RuntimeError):
        EmbeddingBag(2**40, 2**20)


def test_the_place_of_an_id_is_that_in_the_whole_batch():
    ids, ends = torch.tensor([9, 9, 1, 7]), torch.arange(5)
    for grad in (False, True):
        w = table().requires_grad_(grad)
        with pytest.raises(IndexError, match=r"indices\[3\] \(feature 1, bag 1\) is 7, .* \[0, 5\)"):
            ops.embedding_bag_multi([w], ids, ends, features=[1], num_features=2)
    module = DeepHashEmbeddingBag(3, SMALL)
    stack = [module.coefficients], module.weights, module.biases, [2]
    for grad in (False, True):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(IndexError, match=r"indices\[2\] \(feature 1, bag 0\)"),
        ):
            ops.dhe_bag_multi(torch.tensor([1, 2, -3, 4]), ends, *stack, features=[1], num_features=2)


# ------------------------------------------------------------------------------------------------- tooling


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "max"},
        {"mode": "sum", "padding_idx": 1},
        {"max_norm": 0.5},
        {"include_last_offset": True},
    ],
)
def test_scripted_modules(options):
    bag = EmbeddingBag(5, 3, _weight=table(), **options)
    plain = torch.nn.EmbeddingBag(5, 3, _weight=table(), **options)
    scripted = torch.jit.script(mprec.nn.swap(torch.nn.Sequential(bag)).model)
    saved = io.BytesIO()
    torch.jit.save(torch.jit.script(bag), saved)
    saved.seek(0)
    loaded = torch.jit.load(saved)
    rows = I.view(2, 2)
    torch.testing.assert_close(scripted(rows), plain(rows))
    offsets = ENDS if bag.include_last_offset else O
    torch.testing.assert_close(loaded(I, offsets), plain(I, offsets))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("multi", [False, True])
def test_compiled_look_ups_with_sparse_gradients(multi, backend):
    torch._dynamo.reset()
    if multi:
        module = EmbeddingBagCollection([FeatureConfig("a", 10, 4)], sparse=True)
        weight, call = module.tables["a"].weight, (torch.tensor([1, 2]), torch.tensor([0, 1, 2]))
    else:
        module = EmbeddingBag(10, 4, mode="sum", sparse=True)
        weight, call = module.weight, (torch.tensor([1, 2]), torch.tensor([0]))
    compiled = torch.compile(module, backend=backend)
    compiled(*call).sum().backward()
    assert weight.grad.is_sparse
    assert torch.equal(weight.grad.to_dense().sum(1), torch.eye(10)[[1, 2]].sum(0) * 4)


@torch.no_grad()
def test_profilers_see_look_ups_without_gradients():
    for call in (
        lambda: ops.embedding_bag(I, table(), O, mode="sum"),
        lambda: DeepHashEmbeddingBag(3, SMALL)(I, O),
        lambda: EmbeddingBagCollection([FeatureConfig("a", 5, 3)])(I, torch.arange(5)),
    ):
        with profile() as seen:
            call()
        assert any("mprec::" in event.key for event in seen.key_averages())
