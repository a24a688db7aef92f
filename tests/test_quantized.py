"""Quantised collections against float64 arithmetic on the numbers that they store."""

import copy
import io

import pytest
import torch

from mprec import reference
from mprec.errors import DeviceError, IdOutOfRangeError, InvalidOffsetsError
from mprec.names import MODES
from mprec.nn import (
    DheConfig,
    EmbeddingBagCollection,
    FeatureConfig,
    QuantizedEmbeddingBagCollection,
    QuantizedTable,
    with_representation,
)

torch.set_num_threads(1)
FEATURES = [
    FeatureConfig("user", 50, 8),
    FeatureConfig("day", 7, 4, mode="mean"),
    FeatureConfig("item", 90, 6),
]
PRECISIONS = ("float32", "float16", "bfloat16", "int8", "int4")


def batch(size, seed=0, dtype=torch.int64):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 4, (len(FEATURES), size), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    ids = [
        torch.randint(0, f.num_embeddings, (int(n),), generator=g)
        for f, n in zip(FEATURES, lengths.sum(1), strict=True)
    ]
    return torch.cat(ids).to(dtype), offsets.to(dtype)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_tables_in_every_precision(precision, weighted):
    collection = EmbeddingBagCollection(FEATURES)
    quantized = QuantizedEmbeddingBagCollection(collection, tables=precision)
    indices, offsets = batch(6)
    psw = torch.rand(len(indices)) if weighted else None
    expected = []
    for i, f in enumerate(FEATURES):
        part = offsets[6 * i : 6 * i + 7]
        inside = slice(int(part[0]), int(part[-1]))
        stored = quantized.tables[f.name].dequantize()
        weights = None if psw is None else psw[inside]
        args = indices[inside], part - part[0], MODES[f.mode], weights, True
        expected.append(reference.embedding_bag(stored, *args))
    out = quantized(indices, offsets, psw)
    assert out.dtype == torch.float32
    assert not out.requires_grad
    torch.testing.assert_close(out.double(), torch.cat(expected, 1), rtol=1e-5, atol=1e-6)
    step = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 1 / 255, "int4": 1 / 15}[precision]
    for f in FEATURES:
        table, weight = quantized.tables[f.name], collection.tables[f.name].weight
        error = (table.dequantize() - weight).abs().max()
        assert error <= step * weight.abs().max() * 2 + 1e-6
        dim = f.embedding_dim
        bytes_of_row = {"float32": 4 * dim, "int8": dim + 8, "int4": dim // 2 + 4}
        assert table.nbytes == f.num_embeddings * bytes_of_row.get(precision, 2 * dim)


@pytest.mark.parametrize(
    ("precision", "family", "bound"),
    [
        ("float16", "universal", 1e-3),
        ("bfloat16", "universal", 1e-2),
        ("int8", "u7", 2e-2),
        ("int8", "universal", 2e-2),
        ("lut", "sign", 5e-2),
    ],
)
@pytest.mark.parametrize("kind", ["dhe", "hybrid", "select"])
def test_decoders_in_every_precision(precision, family, bound, kind):
    config = DheConfig(k=128, hidden=(32,), family=family)
    collection = EmbeddingBagCollection(with_representation(FEATURES, kind, config))
    quantized = QuantizedEmbeddingBagCollection(collection, tables="float32", decoders=precision)
    call = batch(6)
    with torch.no_grad():
        exact = collection(*call)
        out = quantized(*call)
        assert not torch.equal(out, exact)  # the precision is in effect
        torch.testing.assert_close(out, exact, rtol=0, atol=bound * 3)  # bags of up to 3, outputs below 1
        assert torch.equal(collection(*call), exact)  # and leaves the collection's own decoders alone
        next(iter(collection.dhe.values())).decoder[0].weight.mul_(0)
        assert not torch.equal(quantized(*call), out)  # shared decoders are packed anew when they change
    if precision != "lut":  # tables of the sums of four weights are as large as the weights
        assert quantized.nbytes < QuantizedEmbeddingBagCollection(collection, "float32").nbytes


@pytest.mark.parametrize("kind", ["dhe", "hybrid", "select"])
def test_decoders_in_float8(kind):
    torch.manual_seed(0)
    collection = EmbeddingBagCollection(with_representation(FEATURES, kind, DheConfig(k=128, hidden=(32,))))
    quantized = QuantizedEmbeddingBagCollection(collection, tables="float32", decoders="float8")
    call = batch(6)
    with torch.no_grad():
        exact, out = collection(*call), quantized(*call)
        assert not torch.equal(out, exact)
        torch.testing.assert_close(out, exact, rtol=0, atol=0.02 * 3)  # bags of up to 3, outputs below 1
        for f in quantized.features:
            if not f.has_dhe:
                continue
            _, weights, affines = quantized.dhe[f.name].stack()
            for layer, weight, affine in zip(collection.dhe[f.name].decoder, weights, affines, strict=True):
                stored, largest = weight.float() * affine[0, :, None], layer.weight.abs().amax(1)
                assert weight.dtype == torch.float8_e4m3fn
                assert torch.equal(weight.float().abs().amax(1), torch.full((len(weight),), 448.0))
                assert torch.equal(affine[1], layer.bias)
                assert ((stored - layer.weight).abs() <= largest[:, None] * 2**-4).all()
    state = quantized.state_dict()
    assert {state[name].dtype for name in state if ".weight" in name} == {torch.float8_e4m3fn}
    other = QuantizedEmbeddingBagCollection(
        EmbeddingBagCollection(collection.features), tables="float32", decoders="float8"
    )
    other.load_state_dict(copy.deepcopy(state))
    assert torch.equal(other(*call), out)
    assert quantized.nbytes < 0.4 * QuantizedEmbeddingBagCollection(collection, "float32").nbytes


def test_float8_beside_other_precisions():
    """Each precision is a call of its own; every vector arrives in its columns."""
    collection = EmbeddingBagCollection(with_representation(FEATURES, "dhe", DheConfig(k=64, hidden=(32,))))
    choice, call = {"user": "float8", "item": "float8", "day": "float16"}, batch(6)
    out = QuantizedEmbeddingBagCollection(collection, decoders=choice)(*call).split([8, 4, 6], 1)
    for i, f in enumerate(FEATURES):
        alone = QuantizedEmbeddingBagCollection(collection, decoders={f.name: choice[f.name]})(*call)
        assert torch.equal(out[i], alone.split([8, 4, 6], 1)[i])


def test_precision_by_feature():
    collection = EmbeddingBagCollection(
        with_representation(FEATURES, "select", DheConfig(k=32), select_largest=1)
    )
    quantized = QuantizedEmbeddingBagCollection(collection, {"user": "int4"}, {"item": "float16"})
    assert quantized.table_precision == {"user": "int4", "day": "float32"}
    assert quantized.decoder_precision == {"item": "float16"}
    assert quantized(*batch(3)).shape == (3, 18)


def test_saved_copied_and_moved():
    quantized = QuantizedEmbeddingBagCollection(EmbeddingBagCollection(FEATURES), "int8")
    assert list(quantized.state_dict()) == ["tables.user.rows", "tables.day.rows", "tables.item.rows"]
    file = io.BytesIO()
    torch.save(quantized.state_dict(), file)
    file.seek(0)
    other = QuantizedEmbeddingBagCollection(EmbeddingBagCollection(FEATURES), "int8")
    other.load_state_dict(torch.load(file, weights_only=True))
    call = batch(4)
    assert torch.equal(other(*call), quantized(*call))
    assert torch.equal(copy.deepcopy(quantized)(*call), quantized(*call))
    half = QuantizedEmbeddingBagCollection(EmbeddingBagCollection(FEATURES), "float16")
    for move in (half.double, lambda: half.to("meta")):
        with pytest.raises(TypeError, match="keeps its precisions"):
            move()


@pytest.mark.parametrize("precision", ["int8", "int4", "float8", "bfloat16"])
def test_from_rows_without_memory_for_numbers(precision):
    """Made on the meta device, a collection takes the rows that there are as its own."""
    made = QuantizedEmbeddingBagCollection(EmbeddingBagCollection(FEATURES), precision)
    empty = QuantizedEmbeddingBagCollection(EmbeddingBagCollection(FEATURES, device="meta"), precision)
    assert all(buffer.is_meta for buffer in empty.buffers())
    state = made.state_dict()
    empty.load_state_dict(state, assign=True)
    assert all(
        empty.tables[f.name].rows.data_ptr() == state[f"tables.{f.name}.rows"].data_ptr() for f in FEATURES
    )
    assert torch.equal(empty(*batch(4)), made(*batch(4)))


def test_inputs_in_other_forms():
    quantized = QuantizedEmbeddingBagCollection(EmbeddingBagCollection(FEATURES), "int8")
    indices, offsets = batch(4)
    expected = quantized(indices, offsets)
    for other in (torch.int32, torch.int16):
        assert torch.equal(quantized(indices.to(other), offsets.to(other)), expected)
    strided = torch.stack([indices, indices], 1)[:, 0]
    assert torch.equal(quantized(strided, offsets), expected)
    assert torch.equal(torch.compile(quantized)(indices, offsets), expected)
    none = torch.empty(0, dtype=torch.int64)
    assert quantized(none, torch.tensor([0])).shape == (0, 18)


def test_bad_input():
    collection = EmbeddingBagCollection(with_representation(FEATURES, "hybrid", DheConfig(k=32)))
    with pytest.raises(ValueError, match="tables: feature 'user': precision: expected one of"):
        QuantizedEmbeddingBagCollection(collection, "int2")
    with pytest.raises(ValueError, match="no feature 'users' with any"):
        QuantizedEmbeddingBagCollection(collection, {"users": "int8"})
    with pytest.raises(ValueError, match="feature 'user': lut is for hash families sign, got universal"):
        QuantizedEmbeddingBagCollection(collection, decoders="lut")
    with pytest.raises(ValueError, match="odd 3"):
        QuantizedTable(torch.zeros(2, 3), "int4")
    quantized = QuantizedEmbeddingBagCollection(EmbeddingBagCollection(FEATURES))
    with pytest.raises(IdOutOfRangeError, match=r"indices\[1\] \(feature 'day', bag 0\) is 7"):
        quantized(torch.tensor([1, 7, 1]), torch.tensor([0, 1, 2, 3]))
    with pytest.raises(InvalidOffsetsError):
        quantized(torch.tensor([1, 2, 1]), torch.tensor([0, 1, 2, 4]))
    with pytest.raises(InvalidOffsetsError):
        quantized(torch.tensor([1, 2, 1]), torch.tensor([0, 1, 3]))
    with pytest.raises(TypeError, match="indices: expected integers"):
        quantized(torch.tensor([1.0, 2, 1]), torch.tensor([0, 1, 2, 3]))
    with pytest.raises(DeviceError, match="indices is on meta"):
        quantized(torch.empty(3, dtype=torch.int64, device="meta"), torch.tensor([0, 1, 2, 3]))


@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
def test_numbers_beyond_a_precision_are_refused(precision):
    largest = {"float16": 65504.0, "int8": 3e38, "int4": 65504.0}[precision]
    rows = torch.zeros(3, 4)
    rows[1, 2] = largest
    table = QuantizedTable(rows, precision)
    assert table.dequantize().isfinite().all()
    rows[1, 2] = float("nan") if precision == "int8" else 1e6
    rows[0, 0] = -1e6
    with pytest.raises(ValueError, match=precision):
        QuantizedTable(rows, precision)
    collection = EmbeddingBagCollection(FEATURES[:1])
    with torch.no_grad():
        weight = next(iter(collection.tables._modules.values())).weight
        weight[1, 2] = float("inf") if precision == "int8" else -7e4
    with pytest.raises(ValueError, match=f"tables: feature '{FEATURES[0].name}': precision: {precision}"):
        QuantizedEmbeddingBagCollection(collection, precision)


def test_infinities_stay_what_they_are_in_float16():
    rows = torch.tensor([[1.0, float("inf")], [float("nan"), -float("inf")]])
    torch.testing.assert_close(QuantizedTable(rows, "float16").dequantize(), rows, equal_nan=True)


@torch.no_grad()
def test_decoders_beyond_float16_are_refused():
    features = with_representation(FEATURES[:1], "dhe", DheConfig(k=32))
    collection = EmbeddingBagCollection(features)
    layer = collection.dhe._modules[FEATURES[0].name].decoder[0]
    quantized = QuantizedEmbeddingBagCollection(collection, decoders="float16")
    call = torch.arange(3), torch.arange(4)
    quantized(*call)
    layer.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match="float16 holds numbers up to 65504"):
        quantized(*call)
    with pytest.raises(ValueError, match=f"feature '{FEATURES[0].name}': float16"):
        QuantizedEmbeddingBagCollection(collection, decoders="float16")
