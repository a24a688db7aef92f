"""Operators behind modules, on the CPU: optimizers in place, quantised rows, decoders behind a cache."""

import pytest
import torch
from mprec.triton_kernels import row_cache
from test_ops import make_decoder, ragged
from torch._subclasses.fake_tensor import FakeTensorMode

import mprec.nn
from mprec import optim, reference
from mprec.cache import DeviceCachedDeepHashEmbeddingBag
from mprec.ops._table_calls import dims_of


def bags():
    indices, offsets = ragged(3 * 4, 9, seed=1)
    return torch.randn(4, 9), indices, offsets, 1, torch.rand(len(indices)), -1, [2, 0], 3, [0, 6]


def packed():
    rows = [torch.ops.quantized.embedding_bag_byte_prepack(torch.randn(9, 6)), torch.randn(9, 3).half()]
    return [rows, [8, 8], *bags()[1:5], [2, 0], 3]


def cached(mode=1):
    indices, offsets = ragged(5, 20)
    hashes, weights, biases = make_decoder((32, 12, 5))
    cache = row_cache.build(torch.arange(0, 20, 2), torch.randn(10, 5))
    stack = hashes, [w.detach() for w in weights], [b.detach() for b in biases]
    return [*cache, indices, offsets, *stack, "universal", "relu", "sigmoid", mode, None, True, -1]


def in_float8():
    hashes, weights, biases = make_decoder((32, 12, 5))
    affines = [torch.stack([torch.rand(len(b)), b.detach()]) for b in biases]
    arguments = [[hashes], [reference.float8(w.detach()) for w in weights], affines, [2]]
    return [*bags()[1:3], *arguments, "universal", "relu", "sigmoid", *bags()[3:5], [2], 3]


def tables():
    return [torch.randn(9, 6), torch.randn(9, 3)]


CALLS = {
    "table_sgd_": lambda: (tables(), *bags(), 0.1),
    "table_rowwise_adagrad_": lambda: (tables(), [torch.rand(9, 1), torch.rand(9, 1)], *bags(), 0.1, 1e-8),
    "quantized_embedding_bag_multi": packed,
    "quantized_dhe_bag_multi": in_float8,
    "cached_dhe_bag": cached,
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "quantized_dhe_bag_multi":
        checks = checks[1:]  # the check of schemas multiplies float8 tensors, which torch cannot
    torch.library.opcheck(getattr(torch.ops.mprec, name), tuple(CALLS[name]()), test_utils=checks)


def test_optimizers_are_those_of_the_module():
    """The operators against gradients by autograd and the rule in float64."""
    grad, indices, offsets, mode, psw, _, features, count, _ = bags()
    weights = [w.double().requires_grad_() for w in tables()]
    reference.embedding_bag_multi(weights, indices, offsets, mode, psw, features, count).backward(
        grad.double()
    )
    for rule in ("table_sgd_", "table_rowwise_adagrad_"):
        got, sums = [w.detach().float() for w in weights], [torch.full((9, 1), 0.5) for _ in weights]
        states = [sums] if "adagrad" in rule else []
        rest = (grad, indices, offsets, mode, psw, -1, features, count, [0, 6], 0.1)
        getattr(torch.ops.mprec, rule)(got, *states, *rest, *([1e-8] if states else []))
        for w, updated, s in zip(weights, got, sums, strict=True):
            step = 0.1 * w.grad
            if states:
                total = 0.5 + w.grad.pow(2).mean(1, keepdim=True)
                torch.testing.assert_close(s.double(), total, rtol=1e-5, atol=1e-6)
                step = step / (total.sqrt() + 1e-8)
            torch.testing.assert_close(updated.double(), w.detach() - step, rtol=1e-5, atol=1e-5)


def test_optimizers_say_what_they_take():
    with pytest.raises(ValueError, match=r"SGD expects tables .* on cpu or .* on cuda, got .* meta"):
        optim.SGD([torch.nn.Parameter(torch.empty(3, 2, device="meta"))])
    with pytest.raises(ValueError, match=r"Adam expects tables .* on cpu, got"):
        optim.Adam([torch.nn.Parameter(torch.empty(3, 2, device="meta"))])


def test_bad_rows():
    with pytest.raises(TypeError, match=r"rows\[0\]: expected \[N, bytes\] of uint8"):
        dims_of([torch.zeros(3, 4, dtype=torch.int32)], [8])
    with pytest.raises(ValueError, match=r"bits\[0\]: expected 8 or 4 or 43, got 2"):
        dims_of([torch.zeros(3, 12, dtype=torch.uint8)], [2])
    with pytest.raises(ValueError, match=r"rows\[0\]: 8 bytes hold no row of int8"):
        dims_of([torch.zeros(3, 8, dtype=torch.uint8)], [8])


def test_device_cache_follows_the_weights():
    bag = mprec.nn.DeepHashEmbeddingBag(8)
    held = DeviceCachedDeepHashEmbeddingBag(bag, torch.arange(30, 0, -1), 10)
    assert sorted(held.keys[held.keys >= 0].tolist()) == list(range(10))
    indices, offsets = torch.randint(0, 30, (50,)), torch.arange(0, 50, 5)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(held(indices, offsets), bag(indices, offsets))
            bag.decoder[0].weight.mul_(1.5)
            assert not torch.equal(held.rows[held.slots], bag.materialize(10))
    out = held(indices, offsets)
    out.sum().backward()  # with gradients, the bag itself
    assert bag.decoder[0].weight.grad is not None
    with pytest.raises(ValueError, match="rows: expected at least 1, got 0"):
        DeviceCachedDeepHashEmbeddingBag(bag, torch.arange(30), 0)


def test_a_quantised_collection_keeps_decoders_of_few_bits_on_the_cpu():
    features = [mprec.nn.FeatureConfig("a", 20, 8, "dhe"), mprec.nn.FeatureConfig("b", 20, 8)]
    collection = mprec.nn.EmbeddingBagCollection(features)
    quantized = mprec.nn.QuantizedEmbeddingBagCollection(collection, decoders="float16")
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        pytest.raises(TypeError, match="float16 are for the CPU"),
    ):
        quantized._apply(lambda tensor: torch.empty_like(tensor, device="cuda"))
