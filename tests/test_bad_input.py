"""Bad input to operators and modules: a Python exception that says what is wrong, or a defined result."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mprec import ops
from mprec.errors import DeviceError, DtypeError, IdOutOfRangeError, InvalidOffsetsError
from mprec.hashing import coefficients
from mprec.nn import (
    DeepHashEmbedding,
    DeepHashEmbeddingBag,
    DheConfig,
    EmbeddingBag,
    EmbeddingBagCollection,
    FeatureConfig,
)

torch.set_num_threads(1)
I = torch.tensor  # noqa: E741
SMALL = DheConfig(k=16, hidden=(8,))
modes = pytest.mark.parametrize("mode", ["sum", "mean", "max"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
grad_modes = pytest.mark.parametrize("grad", [False, True])  # the direct path and torch's dispatcher


@pytest.fixture(params=["table", "dhe"])
def bag(request):
    """Called as bag(input, offsets, **options)."""
    torch.manual_seed(0)
    weight = torch.randn(10, 4)
    decoder = DeepHashEmbeddingBag(4, SMALL)

    def table_bag(input, offsets, **options):
        return ops.embedding_bag(input, weight, offsets, **options)

    def dhe_bag(input, offsets, **options):
        stack = [w.detach() for w in decoder.weights], [b.detach() for b in decoder.biases]
        return ops.dhe_bag(input, offsets, decoder.coefficients, *stack, **options)

    return table_bag if request.param == "table" else dhe_bag


# ---------------------------------------------------------------------------------------------------- IDs


@modes
@dtypes
@grad_modes
@pytest.mark.parametrize("bad", [10, -1, 2**40, -(2**63)])
def test_id_outside_the_table(mode, dtype, grad, bad):
    weight = torch.randn(10, 4, dtype=dtype, requires_grad=grad)
    with pytest.raises(IdOutOfRangeError, match=str(bad)) as error:
        ops.embedding_bag(I([1, bad]), weight, I([0]), mode=mode)
    assert isinstance(error.value, IndexError)
    assert isinstance(error.value, RuntimeError)  # as torch
    if abs(bad) < 2**31:
        with pytest.raises(IdOutOfRangeError):
            ops.embedding_bag(I([1, bad], dtype=torch.int32), weight, I([0]), mode=mode)


def test_max_norm_checks_ids_before_it_writes():
    weight = torch.full((3, 2), 9.0)
    with pytest.raises(IdOutOfRangeError, match="3"):
        ops.embedding_bag(I([0, 3]), weight, I([0]), max_norm=1.0)
    assert torch.equal(weight, torch.full((3, 2), 9.0))


@grad_modes
def test_negative_id_of_a_deep_hash_embedding(grad):
    bag = DeepHashEmbeddingBag(4, SMALL)
    with torch.set_grad_enabled(grad), pytest.raises(IdOutOfRangeError, match="-7"):
        bag(I([1, -7]), I([0]))


def test_padding_may_be_any_id(bag):
    assert torch.equal(bag(I([1, 2]), I([0]), padding_idx=2, mode="sum"), bag(I([1]), I([0]), mode="sum"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_ids_that_are_no_integers(bag, dtype):
    with pytest.raises(DtypeError, match="expected integers, got") as error:
        bag(I([1, 2]).to(dtype), I([0]))
    assert isinstance(error.value, RuntimeError)  # as torch
    with pytest.raises(DtypeError, match="offsets: expected integers"):
        bag(I([1, 2]), I([0]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16])
def test_narrow_ids_are_widened(bag, dtype):
    assert torch.equal(bag(I([1, 2], dtype=dtype), I([0])), bag(I([1, 2]), I([0])))


def test_mixed_id_dtypes(bag):
    assert torch.equal(bag(I([1, 2], dtype=torch.int32), I([0])), bag(I([1, 2]), I([0])))
    assert torch.equal(bag(I([1, 2]), I([0], dtype=torch.int32)), bag(I([1, 2]), I([0])))


# ------------------------------------------------------------------------------------------------ offsets

BAD_OFFSETS = {
    "first not 0": (I([1]), False),
    "falling": (I([0, 3, 1]), False),
    "beyond the end": (I([0, 5]), False),
    "negative": (I([0, -1]), False),
    "none at all": (torch.empty(0, dtype=torch.int64), False),
    "none at all, last included": (torch.empty(0, dtype=torch.int64), True),
    "short last offset": (I([0, 2]), True),
    "long last offset": (I([0, 2, 5]), True),
}


@modes
@pytest.mark.parametrize("case", BAD_OFFSETS)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_bad_offsets(bag, mode, case, id_dtype):
    offsets, last = BAD_OFFSETS[case]
    with pytest.raises(InvalidOffsetsError, match="offsets") as error:
        bag(I([1, 2, 3, 4]), offsets.to(id_dtype), mode=mode, include_last_offset=last)
    assert isinstance(error.value, RuntimeError)  # as torch


@dtypes
@pytest.mark.parametrize("case", BAD_OFFSETS)
def test_bad_offsets_in_every_dtype_and_with_gradient(dtype, case):
    offsets, last = BAD_OFFSETS[case]
    weight = torch.randn(10, 4, dtype=dtype, requires_grad=True)
    with pytest.raises(InvalidOffsetsError, match="offsets"):
        ops.embedding_bag(I([1, 2, 3, 4]), weight, offsets, include_last_offset=last)


@pytest.mark.parametrize("case", [*BAD_OFFSETS, "not a multiple"])
@pytest.mark.parametrize("kind", ["table", "dhe"])
@grad_modes
def test_bad_offsets_of_a_collection(case, kind, grad):
    features = [FeatureConfig("a", 10, 4), FeatureConfig("b", 10, 4, kind, SMALL)]
    collection = EmbeddingBagCollection(features)
    offsets, last = (I([0, 1]), True) if case == "not a multiple" else BAD_OFFSETS[case]
    if case != "not a multiple":
        offsets = torch.cat([offsets] if last or not len(offsets) else [offsets, I([4])])
        if len(offsets) % 2 == 0 and len(offsets):
            offsets = torch.cat([offsets[:1], offsets])
    with torch.set_grad_enabled(grad), pytest.raises(InvalidOffsetsError, match="offsets"):
        collection(I([1, 2, 3, 4]), offsets)


# ------------------------------------------------------------------------------------------ empty things


@modes
@grad_modes
def test_empty_batch(bag, mode, grad):
    none = torch.empty(0, dtype=torch.int64)
    with torch.set_grad_enabled(grad):
        assert bag(none, none, mode=mode).shape == (0, 4)
        assert bag(none, I([0]), mode=mode, include_last_offset=True).shape == (0, 4)


@modes
def test_empty_bags_give_zeros(bag, mode):
    none = torch.empty(0, dtype=torch.int64)
    assert torch.equal(bag(none, I([0, 0, 0]), mode=mode), torch.zeros(3, 4))
    out = bag(I([1]), I([0, 0, 1]), mode=mode)
    assert torch.equal(out[[0, 2]], torch.zeros(2, 4))
    assert out[1].abs().sum() > 0


@grad_modes
@pytest.mark.parametrize("kind", ["table", "dhe", "hybrid"])
def test_empty_batch_and_bags_of_a_collection(kind, grad):
    collection = EmbeddingBagCollection([FeatureConfig(n, 9, 4, kind, SMALL) for n in "abc"])
    none = torch.empty(0, dtype=torch.int64)
    with torch.set_grad_enabled(grad):
        assert collection(none, I([0])).shape == (0, sum(collection.output_dims))
        assert torch.equal(collection(none, I([0] * 7)), torch.zeros(2, sum(collection.output_dims)))
    if grad:
        collection(none, I([0])).sum().backward()
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in collection.parameters())


def test_two_dimensional_input_without_columns():
    weight = torch.randn(3, 2)
    empty = torch.empty(4, 0, dtype=torch.int64)
    assert torch.equal(ops.embedding_bag(empty, weight), torch.zeros(4, 2))
    assert torch.equal(DeepHashEmbeddingBag(2, SMALL)(empty), torch.zeros(4, 2))


@modes
@dtypes
def test_table_without_rows(mode, dtype):
    weight = torch.empty(0, 4, dtype=dtype)
    none = torch.empty(0, dtype=torch.int64)
    assert torch.equal(ops.embedding_bag(none, weight, I([0, 0]), mode=mode), torch.zeros(2, 4, dtype=dtype))
    with pytest.raises(IdOutOfRangeError):
        ops.embedding_bag(I([0]), weight, I([0]), mode=mode)


# ---------------------------------------------------------------------------------------- values, strides


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_nan_and_infinity_in_a_table_propagate(mode):
    weight = torch.ones(4, 2)
    weight[1, 0], weight[2, 1] = torch.nan, torch.inf
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        out = ops.embedding_bag(I([[0, 1], [2, 3], [0, 3]]), weight.to(dtype), mode=mode)
        assert out.isnan().tolist() == [[True, False], [False, False], [False, False]]
        assert out.isinf().tolist() == [[False, False], [False, True], [False, False]]


def test_nan_in_the_maximum_is_torchs():
    weight = I([[torch.nan], [1.0]])
    for ids in ([[0, 1]], [[1, 0]]):
        got, expected = (
            ops.embedding_bag(I(ids), weight, mode="max"),
            F.embedding_bag(I(ids), weight, mode="max"),
        )
        torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("layer", [0, 1])
@grad_modes
def test_nan_in_a_decoder_propagates(layer, grad):
    bag = DeepHashEmbeddingBag(4, SMALL)
    with torch.no_grad():
        bag.decoder[layer].bias[0] = torch.nan
    with torch.set_grad_enabled(grad):
        out = bag(I([1, 2]), I([0]))
    assert out.isnan().any()
    assert out.isnan().all() == (layer == 0)


def test_tensors_that_are_not_contiguous(bag):
    ids, offsets = torch.arange(8), I([0, 9, 2, 9, 3, 9])
    assert torch.equal(bag(ids[::2], offsets[::2]), bag(ids[::2].clone(), offsets[::2].clone()))
    psw = torch.rand(8)
    assert torch.equal(
        bag(ids[::2], I([0]), per_sample_weights=psw[::2], mode="sum"),
        bag(ids[::2].clone(), I([0]), per_sample_weights=psw[::2].clone(), mode="sum"),
    )


@modes
@grad_modes
def test_weights_that_are_not_contiguous(mode, grad):
    weight = torch.randn(4, 10, requires_grad=grad).t()
    ids = I([[1, 2], [9, 0]])
    assert torch.equal(
        ops.embedding_bag(ids, weight, mode=mode), ops.embedding_bag(ids, weight.clone(), mode=mode)
    )
    rows = torch.randn(10, 8)[:, :4]
    assert torch.equal(
        ops.embedding_bag(ids, rows, mode=mode), ops.embedding_bag(ids, rows.clone(), mode=mode)
    )
    multi = ops.embedding_bag_multi([weight, rows], I([1, 2, 9, 0]), I([0, 1, 2, 3, 4]), mode=mode)
    assert torch.equal(multi[:, :4], weight[[1, 2]])
    layers = [torch.randn(16, 8).t(), torch.randn(4, 16)[:, ::2]]
    biases = [torch.randn(16)[::2], torch.randn(4)]
    out = ops.dhe_bag(ids[0], I([0]), coefficients(16), layers, biases)
    assert torch.equal(
        out, ops.dhe_bag(ids[0], I([0]), coefficients(16), [w.clone() for w in layers], biases)
    )


# ------------------------------------------------------------------------------------------------ devices


def test_tensors_on_different_devices(bag):
    meta = torch.device("meta")
    with pytest.raises(RuntimeError, match=r"(?s)meta.*cpu|cpu.*meta|Expected all tensors"):
        bag(I([1, 2]).to(meta), I([0]))
    with pytest.raises(RuntimeError, match=r"(?s)meta.*cpu|cpu.*meta|Expected all tensors"):
        bag(I([1, 2]), I([0]).to(meta))


def test_modules_on_another_device_than_the_batch():
    meta = torch.device("meta")
    batch = I([1, 2]), I([0, 1, 2])
    for module, call in (
        (EmbeddingBag(10, 4, device=meta), batch),
        (DeepHashEmbeddingBag(4, SMALL, device=meta), batch),
        (EmbeddingBagCollection([FeatureConfig(n, 9, 4) for n in "ab"], device=meta), batch),
        (EmbeddingBagCollection([FeatureConfig(n, 9, 4, "dhe", SMALL) for n in "ab"], device=meta), batch),
    ):
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(DeviceError, match="is on"):
                module(*call)


def test_modules_on_the_meta_device_infer_shapes():
    collection = EmbeddingBagCollection(
        [
            FeatureConfig(n, 9, 4, kind, SMALL)
            for n, kind in zip("abc", ("table", "dhe", "hybrid"), strict=True)
        ],
        device="meta",
    )
    out = collection(
        torch.empty(6, dtype=torch.int64, device="meta"), torch.empty(7, dtype=torch.int64, device="meta")
    )
    assert out.shape == (2, 16)
    assert out.device.type == "meta"


def test_stand_ins_have_no_bounds_to_check():
    bag = DeepHashEmbedding(10, 4, SMALL)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert bag(mode.from_tensor(I([[1, 2]]))).shape == (1, 2, 4)
    with FlopCounterMode(display=False), pytest.raises(IdOutOfRangeError):
        bag(I([10]))


# ---------------------------------------------------------------------- dtypes, shapes, modes: as torch

W = torch.randn(10, 4)
ONE = {"input": I([1]), "weight": W, "offsets": I([0])}
AS_TORCH = {
    "ids 3-D": {"input": torch.zeros(1, 1, 1, dtype=torch.int64)},
    "no offsets": {"offsets": None},
    "2-D and offsets": {"input": I([[1, 2]])},
    "offsets 2-D": {"offsets": I([[0]])},
    "weight 1-D": {"weight": W[0]},
    "float ids": {"input": I([1.0])},
    "weighted max": {"mode": "max", "per_sample_weights": torch.ones(1)},
    "weights' dtype": {"mode": "sum", "per_sample_weights": torch.ones(1).double()},
    "weights' shape": {"mode": "sum", "per_sample_weights": torch.ones(2)},
    "mode": {"mode": "avg"},
    "sparse max": {"mode": "max", "sparse": True},
    "scaled max": {"mode": "max", "scale_grad_by_freq": True},
    "padding beyond": {"padding_idx": 10},
    "padding below": {"padding_idx": -11},
    "integer table": {"weight": W.to(torch.int8)},
    "first offset": {"offsets": I([1])},
    "last offset": {"offsets": I([0, 2])},
    "ID too large": {"input": I([10])},
}


@pytest.mark.parametrize("case", AS_TORCH)
def test_exceptions_are_torchs(case):
    with pytest.raises(Exception) as theirs:
        F.embedding_bag(**{**ONE, **AS_TORCH[case]})
    with pytest.raises(theirs.type):
        ops.embedding_bag(**{**ONE, **AS_TORCH[case]})


def test_swapped_arguments_are_taken_with_a_warning():
    with pytest.warns(UserWarning, match="swap"):
        out = ops.embedding_bag(W, I([1, 2]), I([0]))
    assert torch.equal(out, ops.embedding_bag(I([1, 2]), W, I([0])))


def test_decoders_that_do_not_fit():
    ids, offsets, hashes = I([1]), I([0]), coefficients(16)
    good = torch.randn(4, 16), torch.randn(4)
    cases = [
        (ValueError, r"layer 0: expected weight \[out, 16\]", {"weights": [torch.randn(4, 15)]}),
        (ValueError, "layer 0: .* bias", {"biases": [torch.randn(3)]}),
        (ValueError, "one of each per layer", {"biases": []}),
        (ValueError, "at least one layer", {"weights": [], "biases": []}),
        (TypeError, "layer 0: .* bias torch.float64", {"biases": [good[1].double()]}),
        (TypeError, "coefficients: expected int32", {"coefficients": hashes.long()}),
        (ValueError, r"coefficients: expected \[2, k\]", {"family": "artifact"}),
        (ValueError, "family: expected one of", {"family": "md5"}),
        (ValueError, "last_activation: expected one of", {"last_activation": "tanh"}),
        (ValueError, "mode has to be", {"mode": "avg"}),
        (NotImplementedError, "max", {"mode": "max", "per_sample_weights": torch.ones(1)}),
        (ValueError, "per_sample_weights: expected", {"per_sample_weights": torch.ones(2)}),
    ]
    for error, message, change in cases:
        arguments = {"coefficients": hashes, "weights": [good[0]], "biases": [good[1]]}
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
                ops.dhe_bag(ids, offsets, **{**arguments, **change})


def test_multi_arguments_that_do_not_fit():
    ids, offsets = I([1, 2]), I([0, 1, 2])
    with pytest.raises(ValueError, match="at least one table"):
        ops.embedding_bag_multi([], ids, offsets)
    with pytest.raises(TypeError, match=r"weights\[1\]: expected torch.float32"):
        ops.embedding_bag_multi([W, W.double()], ids, offsets)
    with pytest.raises(ValueError, match=r"features\[1\]: expected in \[0, 2\), got 2"):
        ops.embedding_bag_multi([W, W], ids, offsets, features=[0, 2])
    with pytest.raises(ValueError, match="features: expected one for each of 2"):
        ops.embedding_bag_multi([W, W], ids, offsets, features=[0])
    with pytest.raises(ValueError, match=r"weights\[1\] has to be a 2D"):
        ops.embedding_bag_multi([W, W[0]], ids, offsets)
    with pytest.raises(ValueError, match="layers: "):
        ops.dhe_bag_multi(
            ids, offsets, [coefficients(16)] * 2, [torch.randn(4, 16)], [torch.randn(4)], [1, 1]
        )


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda f, **more: EmbeddingBagCollection([f], **more), "output_dtype"),
        (lambda f, **more: EmbeddingBagCollection([f], **more), "bounds_check_mode"),
        (lambda f, **more: FeatureConfig("b", 5, 4, **more), "padding_idx"),
        (lambda f, **more: FeatureConfig("b", 5, 4, **more), "init_fn"),
    ],
)
def test_what_only_peers_have_is_refused_by_name(make, name):
    """docs/limits.md lists it."""
    with pytest.raises(TypeError, match=name):
        make(FeatureConfig("a", 5, 4), **{name: 0})
