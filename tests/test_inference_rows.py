"""FBGEMM's inference layout against the same layout spelled out in NumPy, row by row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mprec.nn import EmbeddingBagCollection, FeatureConfig, QuantizedEmbeddingBagCollection
from mprec.row_formats import ROW_FORMATS, from_inference_rows, inference_row_bytes, to_inference_rows

SHAPES = [("int8", 8), ("int8", 5), ("int8", 16), ("int4", 8), ("int4", 6), ("int4", 64)]


def numbers(count, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator) * 3 - 1


def written(row: bytes, dim: int, precision: str, alignment: int) -> bytes:
    """A row of the inference layout from one of mprec."""
    codes = dim if precision == "int8" else dim // 2
    affine = np.frombuffer(row[codes:], "<f4" if precision == "int8" else "<f2")
    packed = affine.astype("<f2").tobytes() + row[:codes]
    return packed + bytes(-len(packed) % alignment)


def stands_for(row: bytes, dim: int, precision: str) -> np.ndarray:
    """The numbers of a row of the inference layout, in float64."""
    scale, bias = np.frombuffer(row[:4], "<f2").astype(np.float64)
    if precision == "int8":
        codes = list(row[4 : 4 + dim])
    else:
        codes = [half for byte in row[4 : 4 + dim // 2] for half in (byte & 15, byte >> 4)]
    return scale * np.array(codes) + bias


@pytest.mark.parametrize("alignment", [1, 16, 128])
@pytest.mark.parametrize(("precision", "dim"), SHAPES)
def test_written_as_spelled_out_and_read_back(precision, dim, alignment):
    form = ROW_FORMATS[precision]
    rows = form.encode(numbers(7, dim))
    made = to_inference_rows(rows, dim, precision, alignment)
    assert made.shape == (7, inference_row_bytes(dim, precision, alignment))
    assert made.shape[1] % alignment == 0
    for ours, theirs in zip(rows, made, strict=True):
        assert bytes(theirs.tolist()) == written(bytes(ours.tolist()), dim, precision, alignment)
    made[:, 4 + dim * form.bits // 8 :] = 0xFF  # padding is not looked at
    back = from_inference_rows(made, dim, precision, alignment)
    expected = np.stack([stands_for(bytes(row.tolist()), dim, precision) for row in made])
    np.testing.assert_allclose(form.decode(back).numpy(), expected, rtol=1e-6, atol=1e-6)
    if precision == "int4":
        assert torch.equal(back, rows)
    assert torch.equal(from_inference_rows(to_inference_rows(back, dim, precision), dim, precision), back)


@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=12).filter(
        lambda v: len(v) % 2 == 0
    ),
    precision=st.sampled_from(["int8", "int4"]),
)
@settings(max_examples=60, deadline=None)
def test_numbers_move_by_no_more_than_is_said(values, precision):
    form, dim = ROW_FORMATS[precision], len(values)
    spread = max(values) - min(values)
    if 0 < spread < 0.1:  # scales below float16's normal numbers are rounded more coarsely
        return
    rows = form.encode(torch.tensor([values]))
    moved = form.decode(from_inference_rows(to_inference_rows(rows, dim, precision), dim, precision))
    # scale <= spread / codes; the last term is float32's own rounding
    bound = (abs(min(values)) + spread) / 2048 + 1e-5 * (1 + spread)
    assert float((moved - form.decode(rows)).abs().max()) <= (0 if precision == "int4" else bound)


@pytest.mark.parametrize(
    ("precision", "dim", "alignment"), [("int8", 16, 16), ("int8", 5, 1), ("int4", 16, 16), ("int4", 6, 16)]
)
def test_one_layout_as_the_other_is_told_by_its_size(precision, dim, alignment):
    rows = ROW_FORMATS[precision].encode(numbers(3, dim))
    made = to_inference_rows(rows, dim, precision, alignment)
    with pytest.raises(ValueError, match=f"{rows.shape[1]} bytes are those of the row-wise layout"):
        from_inference_rows(rows, dim, precision, alignment)
    with pytest.raises(ValueError, match=f"{made.shape[1]} bytes are those of the inference layout"):
        to_inference_rows(made, dim, precision, alignment)


@pytest.mark.parametrize(("precision", "dim", "alignment"), [("int8", 8, 16), ("int4", 8, 1)])
def test_rows_of_one_size_are_told_by_what_they_hold(precision, dim, alignment):
    rows = ROW_FORMATS[precision].encode(torch.linspace(1, 0, dim).repeat(3, 1))  # the highest code is first
    assert rows.shape[1] == inference_row_bytes(dim, precision, alignment)
    with pytest.raises(ValueError, match=r"rows\[0\]: scale .* in the row-wise layout\?"):
        from_inference_rows(rows, dim, precision, alignment)


@pytest.mark.parametrize(("precision", "dim", "alignment"), [("int8", 8, 16), ("int4", 8, 1)])
def test_a_state_dict_of_the_other_layout_is_refused(precision, dim, alignment):
    """Both have rows of one size here. Rows in their own layout are taken, those in the other one read."""
    collection = EmbeddingBagCollection([FeatureConfig("f1", 100, dim)])
    with torch.no_grad():
        collection.tables["f1"].weight.copy_(numbers(100, dim))
    module = QuantizedEmbeddingBagCollection(collection, precision)
    own = module.tables["f1"].rows.clone()
    other = to_inference_rows(own, dim, precision, alignment)
    assert other.shape == own.shape
    with pytest.raises(RuntimeError, match=r"tables\.f1\.rows\[\d+\]: scale .* in the inference layout\?"):
        module.load_state_dict({"tables.f1.rows": other})
    assert torch.equal(module.tables["f1"].rows, own)
    module.load_state_dict({"tables.f1.rows": from_inference_rows(other, dim, precision, alignment)})
    module.load_state_dict({"tables.f1.rows": own})
    assert torch.equal(module.tables["f1"].rows, own)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([0.0, 3e7], r"rows\[1\]: .* cannot hold the scale 117647"),
        ([-7e4, -7e4 + 1], r"rows\[1\]: .* cannot hold the bias -70000"),
        ([1.0, 1 + 1e-6], r"rows\[1\]: .* cannot hold the scale 3\."),
    ],
)
def test_what_float16_cannot_hold_is_refused(row, message):
    rows = ROW_FORMATS["int8"].encode(torch.tensor([[0.0, 1.0], row]))
    with pytest.raises(ValueError, match=message):
        to_inference_rows(rows, 2, "int8")


def test_bad_arguments():
    rows = ROW_FORMATS["int8"].encode(numbers(2, 8))
    with pytest.raises(ValueError, match="precision: expected one of int8, int4, got 'float16'"):
        to_inference_rows(rows, 8, "float16")
    with pytest.raises(ValueError, match="odd 5"):
        inference_row_bytes(5, "int4")
    with pytest.raises(ValueError, match="alignment: expected at least 1, got 0"):
        inference_row_bytes(8, "int8", 0)
    with pytest.raises(ValueError, match="dim: expected at least 1, got 0"):
        inference_row_bytes(0, "int8")
    with pytest.raises(TypeError, match=r"rows: expected a uint8 tensor, got torch\.float32"):
        from_inference_rows(rows.float(), 8, "int8")
    with pytest.raises(ValueError, match=r"rows: expected \[N, 16\], got \[32\]"):
        to_inference_rows(rows.flatten(), 8, "int8")
    assert to_inference_rows(rows[:0], 8, "int8").shape == (0, 16)
