"""What torch.ops.mprec.* runs on a GPU, against the same operators' native CPU kernels."""

import sys

import cuda_kernels
import pytest
import torch
from mprec.triton_kernels import dhe, faults, row_cache, tuning
from test_device_dhe import assert_close_but_for_steps, decoder, decoder_in_float8, group_of
from test_device_embedding_bag import batch_of
from test_device_hashing import coefficients_of
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import mprec.ops
from mprec import reference
from mprec.errors import IdOutOfRangeError

MODES = {"sum": 0, "mean": 1, "max": 2}


def assert_same(got, want):
    faults.check(got.device)
    torch.testing.assert_close(got.cpu(), want, rtol=2e-5, atol=2e-5)


def on(device, *values):
    return [
        on(device, *value) if isinstance(value, list | tuple) else None if value is None else value.to(device)
        for value in values
    ]


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("include_last_offset", [False, True])
def test_embedding_bag(include_last_offset, mode, device):
    weight, indices = torch.randn(20, 12), torch.randint(0, 20, (17,), dtype=torch.int32)
    offsets = torch.tensor([0, 3, 3, 9, 17][: 5 if include_last_offset else 4])
    psw = None if mode == 2 else torch.rand(17)
    want = torch.ops.mprec.embedding_bag(weight, indices, offsets, mode, psw, include_last_offset, 3)
    w, i, o, p = on(device, weight, indices, offsets, psw)
    assert_same(cuda_kernels.embedding_bag(w, i, o, mode, p, include_last_offset, 3), want)


def test_embedding_bag_of_a_transposed_table(device):
    weight = torch.randn(12, 20).t()
    indices, offsets = torch.arange(20), torch.arange(0, 20, 2)
    want = torch.ops.mprec.embedding_bag(weight, indices, offsets)
    assert_same(cuda_kernels.embedding_bag(*on(device, weight, indices, offsets)), want)


@pytest.mark.parametrize("features", [None, [2, 0, 1]])
def test_embedding_bag_multi(features, device):
    rows = [7, 3, 30]
    indices, offsets = batch_of(rows, 11, torch.device("cpu"))
    weights = [torch.randn(rows[f], d) for f, d in zip(features or range(3), (4, 16, 5), strict=True)]
    want = torch.ops.mprec.embedding_bag_multi(weights, indices, offsets, 1, None, features, 3)
    got = cuda_kernels.embedding_bag_multi(*on(device, weights, indices, offsets), 1, None, features, 3)
    assert_same(got, want)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_dhe_bag(mode, device):
    c, (weights, biases) = coefficients_of("universal", 48), decoder(48, (24, 6), torch.float32, "cpu")
    indices, offsets = torch.randint(0, 2**40, (30,)), torch.tensor([0, 0, 7, 20])
    indices[5:9] = 77
    options = ("universal", "mish", "sigmoid", mode, None, False, 77)
    want = torch.ops.mprec.dhe_bag(indices, offsets, c, weights, biases, *options)
    assert_same(cuda_kernels.dhe_bag(*on(device, indices, offsets, c, weights, biases), *options), want)


@pytest.mark.parametrize("family", ["universal", "artifact", "artifact_gaussian", "sign", "u7"])
def test_dhe_bag_multi_with_decoders_of_two_shapes(family, device):
    shapes = [(48, (24, 6)), (32, (16, 20, 9)), (48, (24, 6))]
    coefficients, weights, biases = group_of(shapes, family, torch.float32, "cpu")
    indices, offsets = batch_of([2**40] * 4, 5, torch.device("cpu"))
    flat = [tensor for stack in weights for tensor in stack], [tensor for stack in biases for tensor in stack]
    psw = torch.rand(len(indices))
    options = ([2, 3, 2], family, "relu", "sigmoid", 0)
    want = torch.ops.mprec.dhe_bag_multi(indices, offsets, coefficients, *flat, *options, psw, [3, 1, 0], 4)
    i, o, c, w, b, p = on(device, indices, offsets, coefficients, *flat, psw)
    assert_same(cuda_kernels.dhe_bag_multi(i, o, c, w, b, *options, p, [3, 1, 0], 4), want)


def test_negative_ids_are_left_out_and_reported(device):
    c, (weights, biases) = coefficients_of("universal", 32), decoder(32, (8,), torch.float32, "cpu")
    indices, offsets = torch.tensor([4, -9, 5]), torch.tensor([0, 2])
    arguments = on(device, indices, offsets, c, weights, biases)
    got = cuda_kernels.dhe_bag(*arguments, "universal", "relu", "none")
    want = torch.ops.mprec.dhe_bag(indices[[0, 2]], torch.tensor([0, 1]), c, weights, biases, "universal",
                                   "relu", "none")  # fmt: skip
    torch.testing.assert_close(got.cpu(), want, rtol=2e-5, atol=2e-5)
    with pytest.raises(IdOutOfRangeError, match="-9, of table 0, at position 1"):
        faults.check(device)


@pytest.mark.parametrize("mode", [0, 1])
def test_embedding_bag_backward(mode, device):
    weight, indices, offsets = torch.randn(9, 6), torch.randint(0, 9, (20,)), torch.tensor([0, 4, 4, 11])
    options = (mode, torch.rand(20) if mode == 0 else None, False, 2, False, False, True, False)
    grad = torch.randn(4, 6)
    want, _ = torch.ops.mprec.embedding_bag_backward(grad, weight, indices, offsets, *options)
    arguments = on(device, grad, weight, indices, offsets)
    got, _ = cuda_kernels.embedding_bag_backward(*arguments, mode, *on(device, options[1]), *options[2:])
    assert_same(got, want)


def test_embedding_bag_multi_backward(device):
    indices, offsets = batch_of([7, 3, 30], 11, torch.device("cpu"))
    weights, grad = [torch.randn(30, 4), torch.randn(7, 16)], torch.randn(11, 20)
    options = (1, None, [2, 0], 3, False, False)
    want, _ = torch.ops.mprec.embedding_bag_multi_backward(grad, weights, indices, offsets, *options)
    got, _ = cuda_kernels.embedding_bag_multi_backward(*on(device, grad, weights, indices, offsets), *options)
    for a, b in zip(got, want, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize(
    ("mode", "activation"), [(0, "none"), (0, "relu"), (1, "sigmoid"), (1, "mish"), (2, "relu")]
)
def test_dhe_bag_backward(mode, activation, device):
    c, (weights, biases) = coefficients_of("universal", 48), decoder(48, (24, 10, 6), torch.float32, "cpu")
    indices, offsets, grad = torch.randint(0, 2**40, (30,)), torch.tensor([0, 0, 7, 20]), torch.randn(4, 6)
    psw = torch.rand(30) if mode == 0 else None
    options = ("universal", activation, "sigmoid", mode)
    want = torch.ops.mprec.dhe_bag_backward(
        grad, indices, offsets, c, weights, biases, *options, psw, False, int(indices[3]), False
    )
    got = cuda_kernels.dhe_bag_backward(
        *on(device, grad, indices, offsets, c, weights, biases), *options, *on(device, psw), False,
        int(indices[3]), False,
    )  # fmt: skip
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("mode", [0, 1])
def test_dhe_bag_multi_backward(mode, device):
    """Decoders of two shapes; a feature without one; a feature with two; weights per sample."""
    shapes = [(48, (24, 10, 6)), (32, (9,)), (48, (24, 10, 6)), (32, (9,))]
    coefficients, weights, biases = group_of(shapes, "sign", torch.float32, "cpu")
    indices, offsets = batch_of([2**40] * 4, 5, torch.device("cpu"))
    flat = [tensor for stack in weights for tensor in stack], [tensor for stack in biases for tensor in stack]
    psw, features = torch.rand(len(indices)), [2, 0, 3, 2]
    options = [3, 1, 3, 1], "sign", "mish", "sigmoid", mode
    grad = torch.randn(5, 30)
    want = torch.ops.mprec.dhe_bag_multi_backward(
        grad, indices, offsets, coefficients, *flat, *options, psw, features, 4, False
    )
    arguments = on(device, grad, indices, offsets, coefficients, *flat)
    got = cuda_kernels.dhe_bag_multi_backward(*arguments, *options, psw.to(device), features, 4, True)
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert_same(a, b)
    unscaled = psw.clone().requires_grad_()
    out = reference.dhe_bag_multi(
        indices, offsets, coefficients, *flat, *options, unscaled, features, 4, dtype=torch.float64
    )
    out.backward(grad.double())
    assert_same(got[2], unscaled.grad)


@pytest.mark.parametrize("operator", ["embedding_bag_multi", "dhe_bag_multi"])
def test_a_feature_may_be_served_twice(operator, device):
    indices, offsets = batch_of([9, 9], 4, torch.device("cpu"))
    if operator == "embedding_bag_multi":
        weights, grad = [torch.randn(9, 4), torch.randn(9, 8), torch.randn(9, 4)], torch.randn(4, 16)
        arguments, options = (weights, indices, offsets), (0, None, [1, 0, 1], 2)
        backward = (grad, weights, indices, offsets, 0, None, [1, 0, 1], 2, False, False)
        want, _ = torch.ops.mprec.embedding_bag_multi_backward(*backward)
        got, _ = cuda_kernels.embedding_bag_multi_backward(*on(device, *backward[:4]), *backward[4:])
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)
        implementation = cuda_kernels.embedding_bag_multi
    else:
        coefficients, weights, biases = group_of([(32, (8,))] * 3, "universal", torch.float32, "cpu")
        flat = [w for ws in weights for w in ws], [b for bs in biases for b in bs]
        arguments = (indices, offsets, coefficients, *flat)
        options = ([1, 1, 1], "universal", "relu", "none", 0, None, [1, 0, 1], 2)
        implementation = cuda_kernels.dhe_bag_multi
    want = getattr(torch.ops.mprec, operator)(*arguments, *options)
    assert_same(implementation(*on(device, *arguments), *options), want)


@pytest.mark.parametrize("mode", [0, 1])
def test_quantized_embedding_bag_multi(mode, device):
    indices, offsets = batch_of([9, 9, 9, 9], 5, torch.device("cpu"))
    rows = [
        torch.ops.quantized.embedding_bag_byte_prepack(torch.randn(9, 12)),
        torch.randn(9, 6).half(),
        torch.ops.quantized.embedding_bag_4bit_prepack(torch.randn(9, 8)),
        torch.randn(9, 4),
    ]
    options = (mode, torch.rand(len(indices)), [3, 1, 0, 2], 4)
    want = torch.ops.mprec.quantized_embedding_bag_multi(rows, [8, 8, 4, 8], indices, offsets, *options)
    r, i, o, p = on(device, rows, indices, offsets, options[1])
    got = cuda_kernels.quantized_embedding_bag_multi(r, [8, 8, 4, 8], i, o, mode, p, *options[2:])
    assert got.dtype == torch.float32
    assert_same(got, want)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_quantized_dhe_bag_multi(mode, device):
    if device.type == "cuda" and tuning.target_of(device) not in dhe.FLOAT8_TARGETS:
        pytest.skip("this GPU has no float8 products")
    indices, offsets = batch_of([2**40] * 4, 5, torch.device("cpu"))
    shapes = [(48, (24, 6)), (32, (16, 20, 9)), (48, (24, 6))]
    coefficients = [coefficients_of("universal", k, t) for t, (k, _) in enumerate(shapes)]
    stacks = [decoder_in_float8(*shape, "cpu") for shape in shapes]
    flat = [w for ws, _ in stacks for w in ws], [a for _, affines in stacks for a in affines]
    psw = None if mode == 2 else torch.rand(len(indices))
    arguments = (indices, offsets, coefficients, *flat)
    options = ([2, 3, 2], "universal", "relu", "sigmoid", mode)
    want = torch.ops.mprec.quantized_dhe_bag_multi(*arguments, *options, psw, [3, 1, 0], 4)
    got = cuda_kernels.quantized_dhe_bag_multi(
        *on(device, *arguments), *options, *on(device, psw), [3, 1, 0], 4
    )
    assert got.dtype == torch.float32
    assert_close_but_for_steps(got, want)
    wrong = [*flat[0][:2], flat[0][2].float(), *flat[0][3:]]
    with pytest.raises(TypeError, match=r"decoder 1: layer 0: expected weight torch\.float8_e4m3fn"):
        cuda_kernels.quantized_dhe_bag_multi(indices, offsets, coefficients, wrong, flat[1], *options)


@pytest.mark.parametrize("name", ["table_sgd_", "table_rowwise_adagrad_"])
def test_fused_optimizers(name, device):
    indices, offsets = batch_of([9, 4, 30], 6, torch.device("cpu"))
    tables, grad = [[torch.randn(30, 8), torch.randn(9, 5)]], torch.randn(6, 16)
    if name == "table_rowwise_adagrad_":
        tables.append([torch.rand(30, 1), torch.rand(9, 1)])
    options = (1, None, -1, [2, 0], 3, [3, 11], 0.1) + ((1e-8,) if len(tables) == 2 else ())
    copies = [[tensor.clone() for tensor in kind] for kind in tables]
    getattr(torch.ops.mprec, name)(*tables, grad, indices, offsets, *options)
    moved = on(device, *copies, grad, indices, offsets)
    getattr(cuda_kernels, name)(*moved, *options)
    for got, want in zip(moved[: len(tables)], tables, strict=True):
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)


def test_cached_dhe_bag(device):
    c, (weights, biases) = coefficients_of("universal", 32), decoder(32, (16, 6), torch.float32, "cpu")
    indices, offsets = torch.randint(0, 20, (40,)), torch.tensor([0, 3, 3, 20])
    cache = row_cache.build(torch.arange(0, 20, 2), torch.randn(10, 6))  # not what a decoder would make
    options = ("universal", "relu", "sigmoid", 1, None, False, 4)
    arguments = (indices, offsets, c, weights, biases)
    want = torch.ops.mprec.cached_dhe_bag(*cache, *arguments, *options)
    got = cuda_kernels.cached_dhe_bag(
        *on(device, cache.keys, cache.rows), cache.probes, *on(device, *arguments), *options
    )
    assert_same(got, want)
    plain = torch.ops.mprec.dhe_bag(indices | 1, offsets, c, weights, biases, *options)
    odd = torch.ops.mprec.cached_dhe_bag(*cache, indices | 1, *arguments[1:], *options)
    torch.testing.assert_close(odd, plain)


def test_modules_have_the_same_values_here(device):
    """On a GPU, the modules themselves; by the interpreter, the operators they call."""
    if device.type == "cpu":
        pytest.skip("no GPU: see test_triton_routing for what the modules call")
    bag = mprec.nn.DeepHashEmbeddingBag(8)
    indices, offsets = torch.randint(0, 2**40, (50,)), torch.arange(0, 50, 5)
    want = bag(indices, offsets)
    assert_same(bag.to(device)(indices.to(device), offsets.to(device)), want)


class NoValues(TorchDispatchMode):
    """Fails on operators whose result, or its shape, the host must wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waiting = (
            "_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "equal.default",
            "repeat_interleave.Tensor",
        )  # fmt: skip
        masked = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        assert not masked, "a mask as an index waits for the device"
        assert not any(name in str(func) for name in waiting), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


class NoLooking(TorchFunctionMode):
    """Fails where Python asks a tensor for its values: `tolist` and `cpu` reach no operator here."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        looks = (
            "item",
            "tolist",
            "cpu",
            "numpy",
            "__array__",
            "__bool__",
            "__int__",
            "__float__",
            "__index__",
        )
        if getattr(func, "__name__", "") in looks:
            # Triton's interpreter is made of NumPy: what it does on the host, a device does by itself;
            # faults looks at a copy on the host once it has arrived
            asker = sys._getframe(1).f_globals["__name__"]
            allowed = asker.startswith("triton.") or asker == "mprec.triton_kernels.faults"
            assert allowed, f"{asker}: {func.__name__} waits for the device"
        return func(*args, **(kwargs or {}))


def test_no_operator_waits_for_the_device(device, monkeypatch):
    """Forward, gradients, optimizers and cache: so they can be captured in CUDA graphs."""
    # the interpreter itself is in numpy; a mode is not a trace here
    monkeypatch.setattr("mprec.triton_kernels.faults.traced", lambda: False)
    monkeypatch.setattr("mprec.triton_kernels.launch_arguments.traced", lambda: False)
    monkeypatch.setattr("mprec.triton_kernels.launching.traced", lambda: False)
    coefficients, weights, biases = group_of([(48, (24, 6)), (32, (9,))], "universal", torch.float32, device)
    flat = [t for stack in weights for t in stack], [t for stack in biases for t in stack]
    indices, offsets = batch_of([30, 30], 5, device)
    tables, grad = [torch.randn(30, d, device=device) for d in (6, 9)], torch.randn(5, 15, device=device)
    sums = [torch.zeros(30, 1, device=device) for _ in tables]
    cache = row_cache.build(torch.arange(10), torch.randn(10, 6, device=device))
    rows = [table.half() for table in tables]
    faults.counter(device)
    faults.check(device)
    options, bags = ("universal", "relu", "sigmoid"), (indices, offsets)
    with NoLooking(), NoValues():
        mode = 1
        cuda_kernels.embedding_bag_multi(tables, *bags, mode)
        cuda_kernels.embedding_bag_multi_backward(grad, tables, *bags, mode, None, [0, 1], 2, False, False)
        cuda_kernels.quantized_embedding_bag_multi(rows, [16, 16], *bags, mode)
        update = (*bags, mode, None, -1, [0, 1], 2, [0, 6])
        cuda_kernels.table_sgd_(tables, grad, *update, 0.1)
        cuda_kernels.table_rowwise_adagrad_(tables, sums, grad, *update, 0.1, 1e-8)
        many = (*bags, coefficients, *flat, [2, 1], *options, mode, None)
        cuda_kernels.dhe_bag_multi(*many)
        cuda_kernels.dhe_bag_multi_backward(grad, *many, [0, 1], 2, True)
        one = (indices, offsets[:-1], coefficients[0], weights[0], biases[0], *options, mode, None)
        cuda_kernels.dhe_bag(*one)
        cuda_kernels.dhe_bag_backward(grad[:1, :6].expand(10, 6), *one, False, 3, False)
        cuda_kernels.cached_dhe_bag(cache.keys, cache.rows, cache.probes, *one)


@pytest.mark.parametrize(
    "look",
    [
        lambda offsets: offsets[-1].item(),
        lambda offsets: offsets.tolist(),
        lambda offsets: int(offsets[0]),
        lambda offsets: bool(offsets.any()),
        lambda offsets: torch.arange(8, device=offsets.device)[offsets > 1],
        lambda offsets: torch.equal(offsets, offsets + 1),
        lambda offsets: offsets.repeat_interleave(offsets),
        lambda offsets: offsets.unique(),
        lambda offsets: offsets.cpu(),
    ],
)
def test_waiting_would_be_noticed(look, device):
    """An operator that did one of these would fail the test above."""
    offsets = torch.arange(8, device=device)
    with NoLooking(), NoValues(), pytest.raises(AssertionError, match="waits for the device"):
        look(offsets)
