"""Table-batched embedding bags on the device against torch's own, table by table, in float64."""

import numpy as np
import pytest
import torch
from mprec.triton_kernels import embedding_bag as eb
from mprec.triton_kernels import faults

from mprec.errors import IdOutOfRangeError

MODES = ["sum", "mean", "max"]


def batch_of(rows, batch, device, longest=7, dtype=torch.int64):
    """Feature-major CSR over tables with `rows` rows; some bags are empty."""
    lengths = torch.randint(0, longest, (len(rows) * batch,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    parts = [
        torch.randint(0, n, (int(lengths[t * batch : (t + 1) * batch].sum()),)) for t, n in enumerate(rows)
    ]
    return torch.cat(parts).to(dtype).to(device), offsets.to(dtype).to(device)


def torch_bag(weight, indices, offsets, t, batch, mode, psw=None, padding=None):
    begin, end = int(offsets[t * batch]), int(offsets[(t + 1) * batch])
    out = torch.nn.functional.embedding_bag(
        indices[begin:end].long().cpu(),
        weight.double().cpu(),
        offsets[t * batch : (t + 1) * batch + 1].long().cpu() - begin,
        mode="sum" if psw is not None else mode,
        per_sample_weights=None if psw is None else psw[begin:end].double().cpu(),
        include_last_offset=True,
        padding_idx=padding,
    )
    if psw is not None and mode == "mean":
        counts = offsets[t * batch : (t + 1) * batch + 1].long().cpu().diff().clamp(min=1)
        out = out / counts[:, None]
    return out


def run(weights, indices, offsets, features, batch, mode, psw=None, padding=-1, kind=eb.FLOAT, pad=0):
    dims = [eb.row_dim(weight, kind) for weight in weights]
    columns = np.cumsum([0, *dims])
    dtype = torch.float32 if kind != eb.FLOAT else weights[0].dtype
    out = torch.full((batch, int(columns[-1]) + pad), torch.nan, dtype=dtype, device=indices.device)
    eb.embedding_bag_grouped(
        weights, indices, offsets, batch, features, MODES.index(mode), psw, padding, out,
        columns[:-1].tolist(), kind,
    )  # fmt: skip
    faults.check(indices.device)
    return out[:, : columns[-1]].split(dims, dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dims", "batch"), [((16, 16), 9), ((5, 48, 1), 70), ((64,), 1)], ids=str)
def test_forward(dims, batch, mode, dtype, device):
    rows = [11, 1, 40][: len(dims)]
    indices, offsets = batch_of(rows, batch, device, dtype=torch.int32 if batch == 9 else torch.int64)
    weights = [torch.randn(n, d).to(dtype).to(device) for n, d in zip(rows, dims, strict=True)]
    got = run(weights, indices, offsets, range(len(dims)), batch, mode, pad=3)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for t, weight in enumerate(weights):
        want = torch_bag(weight, indices, offsets, t, batch, mode)
        torch.testing.assert_close(got[t].double().cpu(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_per_sample_weights_and_a_choice_of_features(mode, device):
    indices, offsets = batch_of([9, 9, 9], 6, device)
    psw = torch.rand(len(indices), device=device)
    weights = [torch.randn(9, 8, device=device) for _ in range(2)]
    got = run(weights, indices, offsets, [2, 0], 6, mode, psw)
    for weight, t, part in zip(weights, [2, 0], got, strict=True):
        want = torch_bag(weight, indices, offsets, t, 6, mode, psw)
        torch.testing.assert_close(part.double().cpu(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_padding_and_empty_bags(mode, device):
    indices = torch.tensor([3, 3, 1, 3, 0, 2], device=device)
    offsets = torch.tensor([0, 2, 4, 4, 6], device=device)
    weight = torch.randn(4, 8, device=device)
    (got,) = run([weight], indices, offsets, [0], 4, mode, padding=3)
    torch.testing.assert_close(
        got.double().cpu(), torch_bag(weight, indices, offsets, 0, 4, mode, padding=3), rtol=1e-6, atol=1e-6
    )


def test_max_keeps_nan_as_torch_does(device):
    weight = torch.tensor([[torch.nan, 1.0], [2.0, torch.nan]], device=device)
    indices, offsets = torch.tensor([0, 1, 1, 0], device=device), torch.tensor([0, 2, 4], device=device)
    (got,) = run([weight], indices, offsets, [0], 2, "max")
    want = torch.nn.functional.embedding_bag(
        indices.cpu(), weight.cpu(), offsets.cpu(), mode="max", include_last_offset=True
    )
    torch.testing.assert_close(got.cpu(), want, equal_nan=True)


def quantise(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FBGEMM's fused rows, and what they stand for (float64)."""
    low, levels = weight.min(1, keepdim=True)[0], 2**bits - 1
    parameter = torch.float32 if bits == 8 else torch.float16
    scale, bias = ((weight.max(1, keepdim=True)[0] - low) / levels).to(parameter), low.to(parameter)
    q = ((weight - bias.float()) / scale.float()).round().clamp(0, levels).to(torch.uint8)
    packed = q if bits == 8 else q[:, 0::2] | (q[:, 1::2] << 4)
    row = torch.cat([packed, torch.cat([scale, bias], 1).view(torch.uint8)], 1)
    return row, q.double() * scale.double() + bias.double()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", [4, 20, 64])
def test_quantised_rows(dim, bits, mode, device):
    rows, meaning = quantise(torch.randn(13, dim), bits)
    indices, offsets = batch_of([13], 10, device)
    kind = eb.INT8 if bits == 8 else eb.INT4
    (got,) = run([rows.to(device)], indices, offsets, [0], 10, mode, kind=kind)
    want = torch_bag(meaning, indices, offsets, 0, 10, mode)
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-5, atol=1e-5)


def test_ids_out_of_range_are_left_out_and_reported(device):
    weight = torch.randn(5, 4, device=device)
    indices = torch.tensor([1, 5, 2, -1, 2**40], device=device)
    offsets = torch.tensor([0, 3, 5], device=device)
    out = torch.empty(2, 4, device=device)
    eb.embedding_bag_grouped([weight], indices, offsets, 2, [0], 0, None, -1, out, [0])
    torch.testing.assert_close(out, torch.stack([weight[1] + weight[2], torch.zeros(4, device=device)]))
    with pytest.raises(IdOutOfRangeError, match=r"3 IDs out of range .* of table 0"):
        faults.check(device)
    faults.check(device)  # said once
    eb.embedding_bag_grouped([weight], indices, offsets, 2, [0], 0, None, -1, out, [0])
    if device.type == "cuda":
        torch.cuda.synchronize()
    with pytest.raises(IdOutOfRangeError):  # the next call looks
        eb.embedding_bag_grouped([weight], indices[:1], offsets[:1], 1, [0], 0, None, -1, out, [0])


def test_bad_offsets_are_not_followed(device):
    weight, out = torch.randn(5, 4, device=device), torch.full((3, 4), torch.nan, device=device)
    indices, offsets = torch.tensor([1, 2], device=device), torch.tensor([-3, 1, 0, 1 << 40], device=device)
    eb.embedding_bag_grouped([weight], indices, offsets, 3, [0], 0, None, -1, out, [0])
    want = torch.stack([weight[1], torch.zeros(4, device=device), weight[1] + weight[2]])
    torch.testing.assert_close(out, want)


def test_pooling_of_vectors(device):
    vectors = torch.randn(6, 12, device=device)
    offsets, out = torch.tensor([0, 4, 4, 6], device=device), torch.empty(3, 8, device=device)
    ids = torch.tensor([1, 9, 9, 1, 1, 1], device=device)
    eb.pool_grouped(vectors, [8], ids, offsets, 3, [0], 1, None, 9, out, [0])
    want = torch.stack([vectors[[0, 3], :8].mean(0), torch.zeros(8, device=device), vectors[4:, :8].mean(0)])
    torch.testing.assert_close(out, want)
