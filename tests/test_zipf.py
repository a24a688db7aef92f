"""Random batches for measurements: their distribution against the one they are named after."""

import numpy as np
import pytest
import torch

from mprec.data.zipf import EXPONENT, zipf_batches


def test_ids_are_zipf_distributed():
    batch = zipf_batches([3, 1 << 20])(20_000, np.random.default_rng(0))
    first, second = batch.indices.split(20_000)
    assert first.min() >= 0
    assert first.max() < 3
    _, counts = torch.unique(second, return_counts=True)
    shares = counts.sort(descending=True).values.double() / 20_000
    weights = torch.arange(1, (1 << 20) + 1).double() ** -EXPONENT
    assert shares[:100].sum() == pytest.approx(float(weights[:100].sum() / weights.sum()), abs=0.05)


def test_dense_numbers_are_standard_normal():
    dense = zipf_batches([5], num_dense=3)(20_000, np.random.default_rng(0)).dense
    assert dense.dtype == torch.float32
    torch.testing.assert_close(dense.mean(0), torch.zeros(3), atol=0.05, rtol=0)
    torch.testing.assert_close(dense.std(0), torch.ones(3), atol=0.05, rtol=0)


@pytest.mark.parametrize(("vocabularies", "num_dense"), [([1], 0), ([7, 2**40], 2), ([], 3)])
def test_layout_and_determinism(vocabularies, num_dense):
    draw = zipf_batches(vocabularies, num_dense)
    batch, again = (draw(4, np.random.default_rng(1)) for _ in range(2))
    assert batch.dense.shape == (4, num_dense)
    assert batch.labels.shape == (4,)
    assert torch.equal(batch.offsets, torch.arange(4 * len(vocabularies) + 1))
    assert batch.indices.dtype == torch.int64
    assert all(
        ids.min() >= 0 and ids.max() < size
        for ids, size in zip(batch.indices.view(-1, 4), vocabularies, strict=True)
    )
    assert torch.equal(batch.indices, again.indices)
    assert torch.equal(batch.dense, again.dense)


def test_bad_arguments():
    with pytest.raises(ValueError, match="vocabularies: expected sizes of at least 1, got 0"):
        zipf_batches([3, 0])
    with pytest.raises(ValueError, match="num_dense: expected at least 0, got -1"):
        zipf_batches([3], -1)
