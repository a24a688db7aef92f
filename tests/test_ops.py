"""Operators: values against float64 references, gradients, and torch's compilers and checks."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mprec import ops, reference
from mprec.hashing import coefficients
from mprec.ops import _decoders
from mprec.testing import isa, runnable_isas

torch.set_num_threads(1)
MODES = {"sum": 0, "mean": 1, "max": 2}
each_mode = pytest.mark.parametrize("mode", MODES)


def ragged(bags, rows, longest=4, seed=0, dtype=torch.int64):
    """Indices below ``rows`` in ``bags`` bags; offsets with the last one."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (bags,), generator=g)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return torch.randint(0, rows, (int(offsets[-1]),), generator=g).to(dtype), offsets.to(dtype)


def make_decoder(widths, family="universal", dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    weights, biases = [], []
    for inputs, outputs in itertools.pairwise(widths):
        weights.append((torch.randn(outputs, inputs, generator=g) / inputs**0.5).to(dtype).requires_grad_())
        biases.append((torch.randn(outputs, generator=g) / 4).to(dtype).requires_grad_())
    return coefficients(widths[0], family, seed), weights, biases


def gradients(out, inputs, seed=0):
    g = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad(out, inputs, g.to(out.dtype))


# ------------------------------------------------------------------------- embedding_bag against torch's


@st.composite
def bag_calls(draw):
    """Keyword arguments that torch's embedding_bag accepts too."""
    rows, dim = draw(st.integers(1, 9)), draw(st.integers(1, 20))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    mode = draw(st.sampled_from(list(MODES)))
    id_dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    call = {"weight": torch.randn(rows, dim, generator=g), "mode": mode}
    if draw(st.booleans()):
        shape = draw(st.integers(0, 5)), draw(st.integers(1, 4))
        call["input"] = torch.randint(0, rows, shape, generator=g).to(id_dtype)
    else:
        lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=6))
        ends = torch.tensor(lengths).cumsum(0)
        last = draw(st.booleans())
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
        call["input"] = torch.randint(0, rows, (int(ends[-1]),), generator=g).to(id_dtype)
        call["offsets"] = (starts if last else starts[:-1]).to(id_dtype)
        call["include_last_offset"] = last
    if mode == "sum" and draw(st.booleans()):
        call["per_sample_weights"] = torch.randn(call["input"].shape, generator=g)
    if draw(st.booleans()):
        call["padding_idx"] = draw(st.integers(-rows, rows - 1))
    if mode != "max":
        call["sparse"] = draw(st.booleans())
    if draw(st.booleans()):
        call["max_norm"] = draw(st.sampled_from([0.5, 1.0]))
        call["norm_type"] = draw(st.sampled_from([1.0, 2.0]))
    return call


@settings(max_examples=150, deadline=None)
@given(bag_calls())
def test_embedding_bag_is_torchs(call):
    results = []
    for function in (ops.embedding_bag, F.embedding_bag):
        args = dict(call)
        args["weight"] = args["weight"].clone().requires_grad_()
        inputs = [args["weight"]]
        if "per_sample_weights" in args:
            args["per_sample_weights"] = args["per_sample_weights"].clone().requires_grad_()
            inputs.append(args["per_sample_weights"])
        out = function(**args)
        grads = [g.to_dense() for g in gradients(out, inputs)]
        with torch.no_grad():
            plain = function(**args)
        results.append([args["weight"].detach(), out, plain, *grads])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@each_mode
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_other_dtypes_are_rounded_once(mode, dtype, weighted):
    if weighted and mode == "max":
        pytest.skip("max takes no per-sample weights")
    weight = torch.randn(12, 7, dtype=dtype)
    indices, offsets = ragged(6, 12)
    psw = torch.randn(len(indices), dtype=dtype) if weighted else None
    options = {"mode": mode, "include_last_offset": True, "per_sample_weights": psw}
    expected = reference.embedding_bag(weight, indices, offsets, MODES[mode], psw, True)
    for out in (
        ops.embedding_bag(indices, weight, offsets, **options),
        ops.embedding_bag(indices, weight.clone().requires_grad_(), offsets, **options),
        ops.embedding_bag_multi([weight], indices, offsets, mode, psw),
    ):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_scale_grad_by_freq_is_that_of_embedding(mode):
    # Not compared with torch's embedding_bag: on the CPU it divides by the frequency of another ID.
    weight = torch.randn(5, 3, requires_grad=True)
    ids = torch.tensor([[0, 1], [0, 4], [0, 1]])
    rows = F.embedding(ids, weight, scale_grad_by_freq=True)
    (expected,) = gradients(getattr(rows, mode)(1), [weight])
    (got,) = gradients(ops.embedding_bag(ids, weight, mode=mode, scale_grad_by_freq=True), [weight])
    torch.testing.assert_close(got, expected)


def test_weighted_mean_divides_by_the_count():
    weight, psw = torch.tensor([[1.0], [10.0], [100.0]]), torch.tensor([2.0, 3.0, 7.0])
    out = ops.embedding_bag(
        torch.tensor([0, 1, 2]), weight, torch.tensor([0]), per_sample_weights=psw, padding_idx=2
    )
    assert out.tolist() == [[(2 * 1 + 3 * 10) / 2]]


def test_maximum_gradient_goes_to_the_first_of_equals():
    weight = torch.tensor([[5.0, 1.0], [5.0, 2.0]], requires_grad=True)
    ops.embedding_bag(torch.tensor([0, 1]), weight, torch.tensor([0]), mode="max").sum().backward()
    assert weight.grad.tolist() == [[1.0, 0.0], [0.0, 1.0]]


# ------------------------------------------------------------------------------------ every op, every ISA

CALLS = {}


def call(function):
    CALLS[function.__name__] = function
    return function


@call
def embedding_bag(mode, dtype=torch.float32):
    indices, offsets = ragged(5, 9)
    psw = None if mode == 2 else torch.rand(len(indices)).to(dtype).requires_grad_()
    weight = torch.randn(9, 6).to(dtype).requires_grad_()
    return [weight, indices, offsets, mode, psw, True, 2], [weight, psw]


@call
def embedding_bag_multi(mode, dtype=torch.float32):
    indices, offsets = ragged(3 * 4, 8, seed=1)
    psw = None if mode == 2 else torch.rand(len(indices)).to(dtype).requires_grad_()
    weights = [torch.randn(8 + t, dim).to(dtype).requires_grad_() for t, dim in enumerate((6, 3))]
    return [weights, indices, offsets, mode, psw, [2, 0], 3], [*weights, psw]


@call
def dhe_bag(mode, dtype=torch.float32):
    indices, offsets = ragged(5, 2**40)
    psw = None if mode == 2 else torch.rand(len(indices)).to(dtype).requires_grad_()
    hashes, weights, biases = make_decoder((32, 12, 5), dtype=dtype)
    options = ["universal", "mish", "sigmoid", mode, psw, True, int(indices[0])]
    return [indices, offsets, hashes, weights, biases, *options], [*weights, *biases, psw]


@call
def dhe_bag_multi(mode, dtype=torch.float32):
    indices, offsets = ragged(3 * 4, 50, seed=1)
    psw = None if mode == 2 else torch.rand(len(indices)).to(dtype).requires_grad_()
    first, second = make_decoder((32, 12, 5), dtype=dtype), make_decoder((16, 3), dtype=dtype, seed=1)
    hashes, weights, biases = [first[0], second[0]], first[1] + second[1], first[2] + second[2]
    options = [[2, 1], "universal", "relu", "none", mode, psw, [2, 0], 3]
    return [indices, offsets, hashes, weights, biases, *options], [*weights, *biases, psw]


each_op = pytest.mark.parametrize("name", CALLS)
mode_codes = pytest.mark.parametrize("mode", MODES.values())


@each_op
@mode_codes
@pytest.mark.parametrize("which_isa", runnable_isas())
def test_values_and_gradients_against_the_reference(name, mode, which_isa):
    args, inputs = CALLS[name](mode)
    inputs = [x for x in inputs if x is not None]
    expected = getattr(reference, name)(*args)
    with isa(which_isa):
        out = getattr(torch.ops.mprec, name)(*args)
        got = gradients(out, inputs)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@each_op
@mode_codes
def test_gradcheck(name, mode):
    args, inputs = CALLS[name](mode, torch.float64)
    inputs = [x for x in inputs if x is not None]
    positions = {id(x): i for i, x in enumerate(inputs)}

    def run(*values):
        def swap(arg):
            if isinstance(arg, list):
                return [swap(a) for a in arg]
            return values[positions[id(arg)]] if id(arg) in positions else arg

        return getattr(torch.ops.mprec, name)(*swap(args))

    assert torch.autograd.gradcheck(run, inputs)


@each_op
@mode_codes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(name, mode, dtype):
    args, _ = CALLS[name](mode, dtype)
    torch.library.opcheck(getattr(torch.ops.mprec, name), tuple(args))


@each_op
def test_compile_with_dynamic_shapes(name):
    function = getattr(ops, name)
    args, inputs = CALLS[name](0)
    if name == "embedding_bag":
        weight, indices, offsets, _, psw, *_ = args

        def run(indices, offsets, psw):
            return function(
                indices, weight, offsets, mode="sum", per_sample_weights=psw, include_last_offset=True
            )
    elif name == "embedding_bag_multi":
        weights, indices, offsets, _, psw, features, count = args

        def run(indices, offsets, psw):
            return function(weights, indices, offsets, "sum", psw, features=features, num_features=count)
    elif name == "dhe_bag":
        indices, offsets, *decoder, _, psw, _, _ = args

        def run(indices, offsets, psw):
            return function(indices, offsets, *decoder, "sum", psw, True)
    else:
        indices, offsets, *decoder, _, psw, features, count = args

        def run(indices, offsets, psw):
            return function(indices, offsets, *decoder, "sum", psw, features=features, num_features=count)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for copies in (1, 3):  # another batch size must not compile again, let alone fail
        batch = [torch.cat([indices] * copies), None, torch.cat([psw.detach()] * copies).requires_grad_()]
        bags = len(offsets) - 1
        lengths = offsets.diff().view(-1, bags if name in ("embedding_bag", "dhe_bag") else bags // 3)
        lengths = torch.cat([lengths] * copies, dim=1 if len(lengths) > 1 else 0).flatten()
        batch[1] = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        wanted = [*inputs[:-1], batch[2]]
        out, expected = compiled(*batch), run(*batch)
        torch.testing.assert_close(out, expected)
        for a, b in zip(gradients(out, wanted), gradients(expected, wanted), strict=True):
            torch.testing.assert_close(a, b)


@each_op
def test_autocast_changes_nothing(name):
    args, _ = CALLS[name](1)
    op = getattr(torch.ops.mprec, name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = op(*args)
    assert torch.equal(out, op(*args))


def test_direct_path_and_dispatcher_agree():
    args, _ = CALLS["embedding_bag"](1)
    weight, indices, offsets, *_ = args
    with torch.no_grad():
        direct = ops.embedding_bag(indices, weight, offsets, include_last_offset=True)
        dispatched = torch.ops.mprec.embedding_bag(weight, indices, offsets, 1, None, True)
    assert torch.equal(direct, dispatched)


@pytest.mark.parametrize("activation", ["none", "relu", "sigmoid", "mish"])
@pytest.mark.parametrize("last_activation", ["none", "relu", "sigmoid", "mish"])
@pytest.mark.parametrize("widths", [(64, 5), (64, 24, 5), (40, 16, 12, 5)])
@pytest.mark.parametrize("count", [20, 200])
def test_decoder_gradients(activation, last_activation, widths, count):
    hashes, weights, biases = make_decoder(widths, seed=3)
    ids = torch.randint(0, 150, (count,))  # some repeat
    args = ids, torch.arange(count), hashes, weights, biases, "universal", activation, last_activation
    out, expected = ops.dhe_bag(*args), reference.dhe_bag(*args)
    got, wanted = gradients(out, weights + biases), gradients(expected, weights + biases)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_packed_decoders_follow_the_weights():
    indices, offsets = torch.arange(4), torch.arange(5)
    hashes, weights, biases = make_decoder((32, 8, 4))

    def check():
        out = ops.dhe_bag(indices, offsets, hashes, weights, biases, include_last_offset=True)
        expected = reference.dhe(indices, hashes, weights, biases)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)

    with torch.no_grad():
        check()
        check()
        weights[1].mul_(2)
        check()
        biases[0].add_(1)
        check()
        hashes.copy_(coefficients(32, seed=9))
        check()
        weights[0].set_(torch.randn(8, 32))
        check()
        weights[0].data.add_(1)  # behind the version counter's back
        check()
        weights[0].numpy()[:] *= 2
        check()
        weights[0].data[1, 1] += 1  # and where no sample is taken
        ops.clear_decoders()
        check()


def test_frozen_decoders_are_kept_with_grad_mode_on():
    hashes, weights, biases = make_decoder((32, 8, 4))
    frozen = [w.detach() for w in weights], [b.detach() for b in biases]
    options = "universal", "mish", "none"
    assert _decoders.packed_decoder(hashes, *frozen, *options) is _decoders.packed_decoder(
        hashes, *frozen, *options
    )
    wanted = [w.clone().requires_grad_() for w in weights], biases
    first = _decoders.packed_decoder(hashes, *wanted, *options)
    with torch.no_grad():
        wanted[0][0].add_(1)  # a step
    assert _decoders.packed_decoder(hashes, *wanted, *options) is not first


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_features_are_picked_in_any_order_and_number(data):
    count, bags = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 3))
    picked = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=6))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    indices, offsets = ragged(count * bags, 9, seed=data.draw(st.integers(0, 99)), dtype=dtype)
    psw = torch.rand(len(indices)) if data.draw(st.booleans()) else None
    weights = [torch.randn(9, 3) for _ in picked]
    args = weights, indices, offsets, "sum", psw
    out = ops.embedding_bag_multi(*args, features=picked, num_features=count)
    expected = reference.embedding_bag_multi(weights, indices, offsets, 0, psw, picked, count)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
