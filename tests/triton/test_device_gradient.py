"""Gradients of embedding bags and fused optimizers on the device, against float64 autograd."""

import pytest
import torch
from mprec.triton_kernels import gradient as g
from test_device_embedding_bag import MODES, batch_of, torch_bag


def setup(rows, dims, batch, device, dtype=torch.float32, hot=0):
    indices, offsets = batch_of(rows, batch, device)
    if hot:  # many entries of one row, so that its segment is cut into chunks
        indices = torch.cat([indices.new_full((hot,), 1), indices])
        offsets = torch.cat([offsets[:1], offsets[1:] + hot])
    weights = [torch.randn(n, d, device=device).to(dtype) for n, d in zip(rows, dims, strict=True)]
    columns = [sum(dims[:t]) for t in range(len(dims))]
    upstream = torch.randn(batch, sum(dims) + 3, device=device)[:, : sum(dims)]
    return indices, offsets, weights, columns, upstream


def exact_gradients(weights, indices, offsets, batch, mode, psw, columns, upstream, features, padding=None):
    grads = []
    for weight, feature, column in zip(weights, features, columns, strict=True):
        w = weight.detach().double().cpu().requires_grad_()
        out = torch_bag(w, indices, offsets, feature, batch, mode, psw, padding)
        out.backward(upstream[:, column : column + w.shape[1]].double().cpu())
        grads.append(w.grad)
    return grads


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("hot", [0, 64, 200])
def test_dense_gradients(hot, weighted, mode, device):
    rows, dims, batch = [9, 4, 30], (8, 5, 16), 6
    indices, offsets, weights, columns, upstream = setup(rows, dims, batch, device, hot=hot)
    psw = torch.rand(len(indices), device=device) if weighted else None
    features, padding = ([0, 1, 2], -1) if hot else ([2, 0, 1], 3)
    rows = [rows[f] for f in features]
    weights = [torch.randn(n, d, device=device) for n, d in zip(rows, dims, strict=True)]
    segments = g.sort_entries(rows, indices, offsets, batch, features, 3, MODES.index(mode), psw, padding)
    got = g.weight_gradients(weights, segments, upstream, columns)
    want = exact_gradients(
        weights, indices, offsets, batch, mode, psw, columns, upstream, features,
        None if padding < 0 or weighted else padding,
    ) if not (weighted and padding >= 0) else None  # fmt: skip
    if want is None:  # torch's oracle has no padding with weights: give those entries weight 0 (sum only)
        if mode == "mean":
            return
        zeroed = torch.where(indices == padding, 0.0, psw)
        want = exact_gradients(weights, indices, offsets, batch, mode, zeroed, columns, upstream, features)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-5, atol=1e-5)
    again = g.weight_gradients(weights, segments, upstream, columns)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_bad_ids_take_no_gradient(device):
    weight, upstream = torch.randn(4, 8, device=device), torch.randn(2, 8, device=device)
    indices, offsets = torch.tensor([1, 4, -1, 3], device=device), torch.tensor([0, 2, 4], device=device)
    segments = g.sort_entries([4], indices, offsets, 2, [0], 1, 0, None, -1)
    (got,) = g.weight_gradients([weight], segments, upstream, [0])
    want = torch.zeros_like(weight)
    want[1], want[3] = upstream[0], upstream[1]
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
@pytest.mark.parametrize("hot", [0, 150])
def test_fused_optimizers(hot, optimizer, dtype, device):
    rows, dims, batch = [9, 30], (8, 12), 6
    indices, offsets, weights, columns, upstream = setup(rows, dims, batch, device, dtype, hot)
    grads = exact_gradients(weights, indices, offsets, batch, "sum", None, columns, upstream, [0, 1])
    states = [torch.rand(n, device=device) for n in rows]
    want = []
    for weight, state, grad in zip(weights, states, grads, strict=True):
        step = 0.1 * grad
        if optimizer == "rowwise_adagrad":
            step = step / ((state.double().cpu() + grad.pow(2).mean(1)).sqrt() + 1e-8)[:, None]
        want.append(weight.double().cpu() - step)
    sums = [state.double().cpu() + grad.pow(2).mean(1) for state, grad in zip(states, grads, strict=True)]
    segments = g.sort_entries(rows, indices, offsets, batch, [0, 1], 2, 0, None, -1)
    if optimizer == "sgd":
        g.sgd_(weights, segments, upstream, columns, 0.1)
    else:
        g.rowwise_adagrad_(weights, states, segments, upstream, columns, 0.1, 1e-8)
        for state, total in zip(states, sums, strict=True):
            torch.testing.assert_close(state.double().cpu(), total, rtol=1e-5, atol=1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for weight, expected in zip(weights, want, strict=True):
        torch.testing.assert_close(weight.double().cpu(), expected, rtol=tolerance, atol=tolerance)
