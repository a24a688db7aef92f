"""Rows in FBGEMM's inference layout, in FBGEMM's own inference tables."""

import logging

import pytest
import torch

import mprec.nn
from mprec.nn import FeatureConfig
from mprec.row_formats import ROW_FORMATS, from_inference_rows, to_inference_rows

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
configs = pytest.importorskip("fbgemm_gpu.split_embedding_configs", exc_type=ImportError)
common = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_common", exc_type=ImportError)
inference = pytest.importorskip(
    "fbgemm_gpu.split_table_batched_embeddings_ops_inference", exc_type=ImportError
)
SIZES, DIM = [9, 4], 12


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def theirs(precision, alignment):
    kind, host = configs.SparseType[precision.upper()], common.EmbeddingLocation.HOST
    tables = inference.IntNBitTableBatchedEmbeddingBagsCodegen(
        [(f"t{t}", size, DIM, kind, host) for t, size in enumerate(SIZES)],
        device="cpu",
        output_dtype=configs.SparseType.FP32,
        row_alignment=alignment,
    )
    tables.fill_random_weights()
    return tables


@pytest.mark.parametrize("alignment", [1, 16])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_fbgemm_pools_what_is_written_as_mprec_does(precision, alignment):
    torch.manual_seed(0)
    collection = mprec.nn.EmbeddingBagCollection(
        [FeatureConfig(f"t{t}", n, DIM) for t, n in enumerate(SIZES)]
    )
    ours = mprec.nn.QuantizedEmbeddingBagCollection(collection, tables=precision)
    tables = theirs(precision, alignment)
    weights = tables.split_embedding_weights(split_scale_shifts=False)
    for t, (into, _) in enumerate(weights):
        into.copy_(to_inference_rows(ours.tables[f"t{t}"].rows, DIM, precision, alignment))
    indices, offsets = torch.tensor([8, 0, 3, 1, 1]), torch.tensor([0, 2, 3, 5, 5])
    expected = tables(indices.int(), offsets.int())
    torch.testing.assert_close(
        ours(indices, offsets), expected, atol=6e-3 if precision == "int8" else 1e-5, rtol=0
    )
    # Read back, scale and bias are FBGEMM's, and so is every number.
    for t, (rows, _) in enumerate(weights):
        ours.tables[f"t{t}"].rows.copy_(from_inference_rows(rows, DIM, precision, alignment))
    torch.testing.assert_close(ours(indices, offsets), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 8, 16, 17, 64, 100])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_rows_are_fbgemms_byte_for_byte(precision, dim):
    """Those of its row-wise operators: also its rows of numbers that encoding refuses are read as it does."""
    if precision == "int4" and dim % 4:
        pytest.skip("FBGEMM packs four numbers of int4 at least")
    generator = torch.Generator().manual_seed(dim)
    rows = torch.randn(64, dim, generator=generator)
    rows[0], rows[1], rows[2], rows[3] = 0, -3.25, 1e-42, torch.linspace(1, 1 + 1e-6, dim)
    rows[4], rows[5], rows[6] = 1e30, torch.linspace(-1e38, 1e38, dim), 60000
    if precision == "int4":
        rows[4:6] = 1
    fbgemm = torch.ops.fbgemm
    if precision == "int8":
        encode, decode = fbgemm.FloatToFused8BitRowwiseQuantized, fbgemm.Fused8BitRowwiseQuantizedToFloat
    else:
        encode = lambda r: fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(r, 4)  # noqa: E731
        decode = lambda r: fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat(r, 4)  # noqa: E731
    form = ROW_FORMATS[precision]
    assert torch.equal(form.encode(rows), encode(rows))
    assert torch.equal(form.decode(encode(rows)), decode(encode(rows)))
    rows[7], rows[8, 0] = torch.nan, torch.inf
    torch.testing.assert_close(
        form.decode(encode(rows)), decode(encode(rows)), equal_nan=True, rtol=0, atol=0
    )


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_what_fbgemm_fills_is_read(precision):
    tables = theirs(precision, 16)
    indices = torch.arange(SIZES[0])
    offsets = torch.cat([torch.arange(SIZES[0] + 1), torch.full((SIZES[0],), SIZES[0])])
    expected = tables(indices.int(), offsets.int())[:, :DIM]
    rows, _ = tables.split_embedding_weights(split_scale_shifts=False)[0]
    found = ROW_FORMATS[precision].decode(from_inference_rows(rows, DIM, precision))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
