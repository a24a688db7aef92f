"""The lists of row formats and hash families: native code, Python and Triton agree about them."""

import numpy as np
import pytest
import torch

from mprec import reference
from mprec._native import _C
from mprec.errors import IdOutOfRangeError
from mprec.hashing import check_family, coefficient_rows, coefficients, families_for
from mprec.names import FAMILIES
from mprec.nn import FeatureConfig, QuantizedTable
from mprec.planner import Option
from mprec.row_formats import ROW_FORMATS, quantised_format, row_format


def test_python_has_every_native_row_format():
    assert list(ROW_FORMATS) == [entry["name"] for entry in _C.row_formats()]
    codes = [found.code for found in ROW_FORMATS.values() if found.quantised]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("name", ROW_FORMATS)
@pytest.mark.parametrize("dim", [2, 4, 16, 62])
def test_sizes_are_those_of_the_rows(name, dim):
    """One formula: a row's bytes as native code, the planner and a table of that precision have them."""
    found, weight = row_format(name), torch.randn(5, dim, generator=torch.Generator().manual_seed(dim))
    table = QuantizedTable(weight, name)
    assert table.rows[0].nbytes == found.row_bytes(dim) == table.nbytes // 5
    assert found.dim(table.rows.shape[1]) == dim
    assert Option("table", FeatureConfig("f", 5, dim), precision=name).nbytes == table.nbytes
    out = torch.empty(5, dim)  # native code finds the same number of columns in such a row
    ids, offsets = torch.arange(5), torch.arange(6)
    _C.embedding_bag(table.rows, ids, offsets, None, 0, True, -1, out, 1, found.code or None)
    torch.testing.assert_close(out, table.dequantize(), rtol=1e-6, atol=1e-6)


def test_odd_rows_do_not_fit_int4():
    for make in (
        lambda: QuantizedTable(torch.zeros(2, 3), "int4"),
        lambda: row_format("int4").row_bytes(3),
        lambda: Option("table", FeatureConfig("f", 2, 3), precision="int4"),
    ):
        with pytest.raises(ValueError, match="odd 3 numbers"):
            make()


def test_names_and_codes_that_are_none():
    with pytest.raises(ValueError, match="precision: expected one of float32, float16, bfloat16, int8, int4"):
        row_format("int2")
    with pytest.raises(ValueError, match=r"bits\[1\]: expected 8 or 4"):
        quantised_format(2, "bits[1]")


def test_families_keep_their_numbers():
    """Packed decoders and kernels know families by number."""
    assert list(FAMILIES)[:5] == ["universal", "artifact", "artifact_gaussian", "sign", "u7"]
    assert families_for("int8") == ("universal", "u7")
    assert families_for("lut") == ("sign",)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_hashes_as_its_reference(family):
    hashes = coefficients(32, family, seed=3)
    assert hashes.shape == (coefficient_rows(family), 32)
    ids = torch.tensor([0, 1, 2**30 - 1, 2**30, 2**31 - 2, 2**31 - 1, 2**31, 2**43, 2**60, 2**63 - 1])
    out = torch.empty(len(ids), 32)
    _C.hash_encode(hashes, ids, FAMILIES[family], out)
    expected = reference.encode(hashes, ids, family)
    if family == "artifact_gaussian":
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    else:
        assert torch.equal(out, expected)
    if bits := check_family(family, 0).level_bits:
        levels = (out.double() + 1) / 2 * (2**bits - 1)
        np.testing.assert_allclose(levels, levels.round(), atol=1e-4)
        assert len(torch.unique(out)) > 2 ** (bits - 2)
    with pytest.raises(IdOutOfRangeError):
        _C.hash_encode(hashes, ids - 1, FAMILIES[family], out)
