"""Gradients of deep hash embeddings on the device, against float64 sums over the device's encodings."""

import pytest
import torch
from mprec.triton_kernels.dhe_gradient import first_layer_gradient
from mprec.triton_kernels.hashing import hash_encode
from test_device_dhe import TOLERANCE, ids_of
from test_device_hashing import coefficients_of


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("n", "width", "k"), [(0, 8, 32), (1, 8, 32), (70, 33, 70), (600, 16, 64)])
def test_first_layer(n, width, k, dtype, device):
    ids, c = ids_of(n, device, wide=n == 70), coefficients_of("universal", k).to(device)
    upstream = torch.randn(n, width, device=device).to(dtype)
    got = first_layer_gradient(ids, c, upstream, "universal")
    want = upstream.double().T @ hash_encode(ids, c, "universal").to(dtype).double()
    bound = TOLERANCE[dtype] * max(1, n) ** 0.5
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE[dtype], atol=bound)
    assert torch.equal(got, first_layer_gradient(ids, c, upstream, "universal"))


@pytest.mark.parametrize("family", ["artifact", "sign", "u7", "artifact_gaussian"])
def test_families(family, device):
    ids, c = ids_of(40, device), coefficients_of(family, 48).to(device)
    upstream = torch.randn(40, 20, device=device)
    got = first_layer_gradient(ids, c, upstream, family)
    want = upstream.double().T @ hash_encode(ids, c, family).double()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
