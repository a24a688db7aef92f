import numpy as np
import pytest
import torch

from mprec.data import Batch
from mprec.dispatch import kernel_candidates, tune_kernels
from mprec.nn import DheConfig, EmbeddingBagCollection, FeatureConfig, KernelOptions

DHE = DheConfig(k=32, hidden=(16,))
FEATURES = [
    FeatureConfig("a", 50, 8),
    FeatureConfig("b", 1000, 8, "dhe", DHE),
    FeatureConfig("c", 20, 8, "hybrid", DHE),
]


def draw(batch_size, rng):
    """Bags of one or two IDs, some repeated."""
    lengths = rng.integers(1, 3, size=len(FEATURES) * batch_size)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Batch(
        torch.zeros(batch_size, 0),
        torch.from_numpy(rng.integers(20, size=offsets[-1])),
        torch.from_numpy(offsets),
        torch.zeros(batch_size),
    )


def test_candidates_are_data():
    assert list(kernel_candidates(True, 1)) == ["1 thread, all IDs", "1 thread, equal IDs once"]
    assert kernel_candidates(False, 6) == {
        "1 thread": KernelOptions(1),
        "2 threads": KernelOptions(2),
        "4 threads": KernelOptions(4),
        "6 threads": KernelOptions(6),
    }
    with pytest.raises(ValueError, match="threads"):
        kernel_candidates(True, 0)


@pytest.mark.parametrize("batch_size", [1, 7, 300])
def test_options_do_not_change_a_result(batch_size):
    collection = EmbeddingBagCollection(FEATURES)
    batch = draw(batch_size, np.random.default_rng(0))
    asked = []
    with torch.no_grad():
        expected = collection(batch.indices, batch.offsets)
        for options in kernel_candidates(True, 2).values():
            collection.kernel = lambda samples, options=options: asked.append(samples) or options
            torch.testing.assert_close(
                collection(batch.indices, batch.offsets), expected, rtol=1e-5, atol=1e-6
            )
    assert asked == [batch_size] * 4  # the options do reach the kernel


def test_the_fastest_candidate_is_used_at_every_size():
    """By a clock on which one thread is fast for small batches and two for large ones."""
    now = [0.0]
    collection = EmbeddingBagCollection(FEATURES)
    real = EmbeddingBagCollection.forward

    def timed(self, indices, offsets, per_sample_weights=None):
        size = (len(offsets) - 1) // len(FEATURES)
        options = self.kernel(size)
        now[0] += (1e-5 if options.threads == 1 else 4e-5) + 1e-6 * size / options.threads
        now[0] += 1e-6 if options.dedupe else 0.0
        return real(self, indices, offsets, per_sample_weights)

    collection.forward = timed.__get__(collection)
    tuned = tune_kernels(
        torch.nn.Sequential(collection),
        draw,
        (1, 4, 16, 64, 256),
        seconds=1e-3,
        threads=2,
        min_rounds=1,
        clock=lambda: now[0],
    )["0"]
    assert collection.kernel is tuned
    assert tuned(1) == KernelOptions(1, False)
    assert tuned(59) == KernelOptions(1, False)
    assert tuned(61) == KernelOptions(2, False)
    assert tuned(10_000) == KernelOptions(2, False)
    assert len(tuned.choices) == 256
    assert tuned.profile.curve("2 threads, all IDs").at(64) == pytest.approx(4e-5 + 32e-6)


def test_a_failed_tuning_leaves_the_model_as_it_was():
    collection = EmbeddingBagCollection(FEATURES)

    def broken(batch_size, rng):
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        tune_kernels(collection, broken, (1, 2))
    assert collection.kernel is None
    with pytest.raises(ValueError, match="EmbeddingBagCollection"):
        tune_kernels(torch.nn.Linear(1, 1), draw)


def test_a_tuned_model_still_trains_exports_and_copies():
    import copy
    import pickle

    collection = EmbeddingBagCollection(FEATURES)
    expected_keys = list(collection.state_dict())
    tune_kernels(collection, draw, (1, 8), seconds=0.0, min_rounds=1)
    batch = draw(5, np.random.default_rng(1))
    collection(batch.indices, batch.offsets).sum().backward()
    assert all(p.grad is not None for p in collection.parameters())
    assert list(collection.state_dict()) == expected_keys
    for twin in (copy.deepcopy(collection), pickle.loads(pickle.dumps(collection))):
        with torch.no_grad():
            assert torch.equal(twin(batch.indices, batch.offsets), collection(batch.indices, batch.offsets))
