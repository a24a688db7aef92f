import numpy as np
import pytest
import torch

from mprec import dispatch, tuning
from mprec.bags import Bags
from mprec.cache import CachedEmbeddingBagCollection
from mprec.data import Batch
from mprec.dispatch import Profile
from mprec.errors import IdOutOfRangeError
from mprec.nn import (
    DeepHashEmbeddingBag,
    DheConfig,
    EmbeddingBagCollection,
    FeatureConfig,
    RunOptions,
    option_candidates,
    tune_options,
)

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
        Bags(
            torch.from_numpy(rng.integers(20, size=offsets[-1])),
            torch.from_numpy(offsets),
            num_features=len(FEATURES),
        ),
        torch.zeros(batch_size),
    )


def test_candidates_are_data():
    assert list(option_candidates(True, 1)) == ["1 thread, all IDs", "1 thread, equal IDs once"]
    assert option_candidates(False, 6) == {
        "1 thread": RunOptions(1),
        "2 threads": RunOptions(2),
        "4 threads": RunOptions(4),
        "6 threads": RunOptions(6),
    }
    assert option_candidates(True, 1, has_cache=True) == {
        "1 thread, all IDs": RunOptions(1, False, False),
        "1 thread, equal IDs once": RunOptions(1, True, False),
        "1 thread, cache": RunOptions(1, None, True),
    }
    with pytest.raises(ValueError, match="threads"):
        option_candidates(True, 0)


def test_a_cache_is_chosen_where_it_pays():
    """By a clock on which looking up costs more than decoding, but for large batches."""
    now = [0.0]

    class Timed(CachedEmbeddingBagCollection):
        def forward(self, indices, offsets, per_sample_weights=None):
            size = (len(offsets) - 1) // len(FEATURES)
            options = self.options(size)
            now[0] += 1e-5 + 1e-6 * size if options.cache else 2e-6 * size
            calls = self.stats().calls
            out = super().forward(indices, offsets, per_sample_weights)
            assert (self.stats().calls > calls) == options.cache
            return out

    collection = EmbeddingBagCollection(FEATURES)
    cached = Timed(collection, 1 << 14)
    clock = {"min_rounds": 1, "clock": lambda: now[0]}
    tuned = tune_options(cached, draw, (1, 4, 16, 64), seconds=1e-3, threads=1, **clock)[""]
    assert [tuned(size).cache for size in (1, 9, 11, 1000)] == [False, False, True, True]
    batch = draw(20, np.random.default_rng(0))
    with torch.no_grad():
        torch.testing.assert_close(
            cached(batch.indices, batch.offsets),
            collection(batch.bags),
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.parametrize("batch_size", [1, 7, 300])
def test_options_do_not_change_a_result(batch_size):
    collection = EmbeddingBagCollection(FEATURES)
    batch = draw(batch_size, np.random.default_rng(0))
    asked = []
    with torch.no_grad():
        expected = collection(batch.bags)
        for options in option_candidates(True, 2).values():
            collection.options = lambda samples, options=options: asked.append(samples) or options
            torch.testing.assert_close(collection(batch.bags), expected, rtol=1e-5, atol=1e-6)
    assert asked == [batch_size] * 4  # the options do reach the kernel


def test_the_fastest_candidate_is_used_at_every_size():
    """By a clock on which one thread is fast for small batches and two for large ones."""
    now = [0.0]

    class Timed(EmbeddingBagCollection):
        def forward(self, indices, offsets, per_sample_weights=None):
            size = (len(offsets) - 1) // len(FEATURES)
            options = self.options(size)
            now[0] += (1e-5 if options.threads == 1 else 4e-5) + 1e-6 * size / options.threads
            now[0] += 1e-6 if options.dedupe else 0.0
            return super().forward(indices, offsets, per_sample_weights)

    collection = Timed(FEATURES)
    tuned = tune_options(
        torch.nn.Sequential(collection),
        draw,
        (1, 4, 16, 64, 256),
        seconds=1e-3,
        threads=2,
        min_rounds=1,
        clock=lambda: now[0],
    )["0"]
    assert collection.options is tuned
    assert tuned(1) == RunOptions(1, False)
    assert tuned(59) == RunOptions(1, False)
    assert tuned(61) == RunOptions(2, False)
    assert tuned(10_000) == RunOptions(2, False)
    assert len(tuned.choices) == 256
    assert tuned.profile.curve("2 threads, all IDs").at(64) == pytest.approx(4e-5 + 32e-6)


def test_a_failed_tuning_leaves_the_model_as_it_was():
    collection = EmbeddingBagCollection(FEATURES)

    def broken(batch_size, rng):
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        tune_options(collection, broken, (1, 2))
    assert collection.options is None
    with pytest.raises(ValueError, match="EmbeddingBagCollection"):
        tune_options(torch.nn.Linear(1, 1), draw)


BAG = {"mode": "mean", "include_last_offset": True, "num_embeddings": 1000}


@pytest.mark.parametrize(
    "make",
    [
        lambda options: EmbeddingBagCollection(FEATURES, options=options),
        lambda options: DeepHashEmbeddingBag(8, DHE, options=options, **BAG),
        lambda options: DeepHashEmbeddingBag(8, DHE, options=options, padding_idx=3),
    ],
)
def test_auto_measures_at_the_first_call_without_gradients_and_keeps_the_profile(make, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_AUTO_SECONDS", 0.0)
    monkeypatch.setattr(dispatch, "BATCH_SIZES", (1, 8))
    torch.manual_seed(0)
    module = make("auto")
    torch.manual_seed(0)
    plain = make(None)
    count = len(getattr(module, "features", [0]))
    ids, offsets = torch.randint(50, (count * 5,)) % 20, torch.arange(count * 5 + 1)
    module(ids, offsets).sum().backward()
    assert module.options == "auto"  # training measures nothing
    assert not list(tmp_path.rglob("*.json"))
    with torch.no_grad():
        out, expected = module(ids, offsets), plain(ids, offsets)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    (file,) = tmp_path.rglob("profile-*.json")
    assert len(module.options.choices) == 8

    def measured_again(*args, **options):
        raise AssertionError("a kept profile is not measured again")

    monkeypatch.setattr(Profile, "measure", measured_again)
    again = make("auto")
    with torch.no_grad():
        again(ids, offsets)
        with pytest.raises(IdOutOfRangeError):
            again(-1 - ids, offsets)
    assert again.options.choices == module.options.choices
    assert Profile.load(file).cells == module.options.profile.cells


def test_auto_does_without_a_cache_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tuning, "_AUTO_SECONDS", 0.0)
    monkeypatch.setattr(dispatch, "BATCH_SIZES", (1,))
    collection = EmbeddingBagCollection(FEATURES, options="auto")
    batch = draw(2, np.random.default_rng(0))
    with torch.no_grad():
        collection(batch.bags)
    assert len(collection.options.choices) == 1


def test_what_is_no_kernel():
    for make in (
        lambda k: EmbeddingBagCollection(FEATURES, options=k),
        lambda k: DeepHashEmbeddingBag(8, options=k),
    ):
        with pytest.raises(ValueError, match="options: expected"):
            make("fast")


def test_a_bag_runs_as_its_kernel_says():
    asked = []
    options = lambda samples: asked.append(samples) or RunOptions(2, True)  # noqa: E731
    bag = DeepHashEmbeddingBag(8, DHE, options=options)
    with torch.no_grad():
        bag(torch.tensor([1, 2, 1]), torch.tensor([0, 1]))
        with pytest.raises(ValueError, match="per_sample_weights"):
            bag(torch.tensor([1, 2]), torch.tensor([0, 1]), torch.ones(3))
    assert asked == [2, 2]


def test_a_tuned_model_still_trains_exports_and_copies():
    import copy
    import pickle

    collection = EmbeddingBagCollection(FEATURES)
    expected_keys = list(collection.state_dict())
    tune_options(collection, draw, (1, 8), seconds=0.0, min_rounds=1)
    batch = draw(5, np.random.default_rng(1))
    collection(batch.bags).sum().backward()
    assert all(p.grad is not None for p in collection.parameters())
    assert list(collection.state_dict()) == expected_keys
    for twin in (copy.deepcopy(collection), pickle.loads(pickle.dumps(collection))):
        with torch.no_grad():
            assert torch.equal(twin(batch.bags), collection(batch.bags))
