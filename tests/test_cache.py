"""Cached modules against the modules they stand in for; budgets; codebooks against their stated error."""

import threading

import pytest
import torch
from torch.nn.functional import embedding_bag

from mprec._native import _C
from mprec.cache import (
    CachedDeepHashEmbeddingBag,
    CachedEmbeddingBagCollection,
    Codebook,
    CodebookEmbeddingBag,
    CodebookError,
    materialize,
    split_budget,
)
from mprec.cache.budget import hottest
from mprec.cache.centroids import CentroidEmbeddingBag
from mprec.errors import IdOutOfRangeError, InvalidOffsetsError
from mprec.nn import DeepHashEmbeddingBag, DheConfig, EmbeddingBagCollection, FeatureConfig

SMALL = DheConfig(k=32, hidden=(24,))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def skewed(n: int, vocabulary: int) -> torch.Tensor:
    return (torch.rand(n) ** 4 * vocabulary).to(torch.int64)


def small_bag(**options) -> DeepHashEmbeddingBag:
    return DeepHashEmbeddingBag(16, SMALL, include_last_offset=True, **options)


def small_collection(seed: int = 0) -> EmbeddingBagCollection:
    torch.manual_seed(seed)
    return EmbeddingBagCollection(
        [
            FeatureConfig("city", 500, 8, "dhe", SMALL),
            FeatureConfig("tag", 50, 8, "table"),
            FeatureConfig("item", 3000, 8, "hybrid", SMALL),
            FeatureConfig("words", 800, 8, "dhe", SMALL, mode="mean"),
            FeatureConfig("user", 3000, 4, "dhe", DheConfig(k=16, hidden=(), family="sign")),
        ]
    )


def batch_of(collection, bags: int, longest: int = 3):
    sizes = torch.randint(0, longest + 1, (len(collection.features) * bags,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    parts = sizes.view(len(collection.features), bags).sum(1).tolist()
    ids = [skewed(n, f.num_embeddings) for n, f in zip(parts, collection.features, strict=True)]
    return torch.cat(ids), offsets


# ------------------------------------------------------------------------------------------- one feature


@torch.no_grad()
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_bag_equals_the_uncached(mode, padding_idx):
    bag = small_bag(mode=mode, padding_idx=padding_idx)
    cached = CachedDeepHashEmbeddingBag(bag, 20_000)
    for step in range(5):
        ids = skewed(300, 1000)
        offsets = torch.arange(0, 301, 1 if step % 2 else 3)
        close(cached(ids, offsets), bag(ids, offsets))
        close(cached(ids.view(100, 3)), bag(ids.view(100, 3)))
        if mode != "max":
            weights = torch.rand(300)
            close(cached(ids, offsets, weights), bag(ids, offsets, weights))
    stats = cached.stats().features[""]
    assert stats.hits > 0
    assert stats.nbytes == cached.nbytes <= 20_000


@torch.no_grad()
def test_filled_rows_equal_the_uncached_to_the_bit():
    bag = small_bag()
    cached = CachedDeepHashEmbeddingBag(bag, 100_000, admit=False)
    assert cached.fill(torch.ones(500)) == 500
    ids = skewed(256, 500)
    offsets = torch.arange(257)
    assert torch.equal(cached(ids, offsets), bag(ids, offsets))
    assert cached.stats().hit_rate == 1
    assert cached.stats().decoded == 0


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda bag: bag.decoder[0].weight.mul_(1.5),
        lambda bag: bag.decoder[-1].bias.add_(1),
        lambda bag: setattr(bag.decoder[0].weight, "data", bag.decoder[0].weight.data + 0.1),
        lambda bag: setattr(bag.decoder[0], "bias", torch.nn.Parameter(torch.ones(24))),
        lambda bag: bag.load_state_dict(small_bag().state_dict()),
        lambda bag: bag.coefficients.copy_(
            DeepHashEmbeddingBag(16, DheConfig(32, (24,), seed=9)).coefficients
        ),
    ],
    ids=["in place", "bias", "data", "replaced", "load_state_dict", "coefficients"],
)
def test_no_row_outlives_its_weights(change):
    bag = small_bag()
    cached = CachedDeepHashEmbeddingBag(bag, 100_000)
    ids, offsets = torch.arange(300), torch.arange(301)
    before = cached(ids, offsets)
    close(before, bag(ids, offsets))
    change(bag)
    after = bag(ids, offsets)
    assert (after - before).abs().max() > 1e-3
    close(cached(ids, offsets), after)
    close(cached(ids, offsets), after)
    assert cached.stats().calls == 3


def test_an_optimizer_step_invalidates():
    bag = small_bag()
    cached = CachedDeepHashEmbeddingBag(bag, 100_000)
    optimizer = torch.optim.Adam(cached.parameters(), lr=0.1)
    ids, offsets = torch.arange(100), torch.arange(101)
    with torch.no_grad():
        cached(ids, offsets)
    cached(ids, offsets).square().sum().backward()  # with gradients: not through the cache
    assert bag.decoder[0].weight.grad.abs().sum() > 0
    optimizer.step()
    with torch.no_grad():
        close(cached(ids, offsets), bag(ids, offsets))
    assert cached.stats().calls == 2


@torch.no_grad()
def test_refresh_keeps_the_hot_set():
    bag = small_bag()
    cached = CachedDeepHashEmbeddingBag(bag, 100_000)
    held = cached.fill(torch.ones(400))
    bag.decoder[0].weight.mul_(2)
    assert cached.refresh() == held
    cached.reset_stats()
    ids, offsets = torch.arange(400), torch.arange(401)
    assert torch.equal(cached(ids, offsets), bag(ids, offsets))
    assert cached.stats().hit_rate == 1


@torch.no_grad()
def test_refresh_keeps_the_hot_sets_of_all_groups():
    """Features of several modes and hash families are several native calls."""
    collection = small_collection()
    cached = CachedEmbeddingBagCollection(collection, 1 << 20)
    assert len(cached._rows) == 3
    cached.fill({name: torch.ones(50) for name in cached.stats().features})
    collection.dhe["city"].decoder[0].weight.mul_(2)
    assert cached.refresh() == 200
    cached.reset_stats()
    indices, offsets = batch_of(collection, 50)
    close(cached(indices % 50, offsets), collection(indices % 50, offsets))
    assert all(feature.hit_rate == 1 for feature in cached.stats().features.values())


@torch.no_grad()
def test_unwatched_cache_changes_when_told():
    bag = small_bag()
    cached = CachedDeepHashEmbeddingBag(bag, 100_000, watch=False)
    ids, offsets = torch.arange(300), torch.arange(301)
    before = cached(ids, offsets)
    bag.decoder[0].weight.mul_(2)
    assert torch.equal(cached(ids, offsets), before)
    cached.invalidate()
    close(cached(ids, offsets), bag(ids, offsets))


@torch.no_grad()
def test_same_errors_as_the_uncached():
    bag = small_bag(num_embeddings=100)
    cached = CachedDeepHashEmbeddingBag(bag, 100_000)
    ids, offsets = torch.arange(3), torch.arange(4)
    for arguments, error in (
        ((torch.tensor([1, -1, 2]), offsets), IdOutOfRangeError),
        ((torch.tensor([1, 100, 2]), offsets), IdOutOfRangeError),
        ((ids, torch.tensor([0, 2, 1, 3])), InvalidOffsetsError),
        ((ids, torch.tensor([0, 1, 2])), InvalidOffsetsError),
        ((ids,), ValueError),
        ((ids, offsets, torch.ones(2)), ValueError),
        ((ids.float(), offsets), TypeError),
    ):
        for module in (bag, cached):
            with pytest.raises(error):
                module(*arguments)


def test_state_dict_is_that_of_the_module():
    bag = small_bag()
    cached = CachedDeepHashEmbeddingBag(bag, 100_000)
    assert cached.state_dict().keys() == bag.state_dict().keys()
    assert all(a is b for a, b in zip(cached.parameters(), bag.parameters(), strict=True))


def test_what_cannot_be_cached():
    with pytest.raises(ValueError, match=r"float32 decoders on the CPU, got torch\.float64"):
        CachedDeepHashEmbeddingBag(small_bag(dtype=torch.float64), 100_000)
    with pytest.raises(ValueError, match="nbytes: 10 is less than"):
        CachedDeepHashEmbeddingBag(small_bag(), 10)
    with torch.inference_mode():
        bag = small_bag()
    with pytest.raises(ValueError, match="inference_mode"):
        CachedDeepHashEmbeddingBag(bag, 100_000)
    with pytest.raises(ValueError, match="no deep hash embedding to cache"):
        CachedEmbeddingBagCollection(EmbeddingBagCollection([FeatureConfig("a", 5, 4)]), 100_000)


def test_threads_while_weights_change():
    """Every result is that of weights which were current during the call."""
    bag = DeepHashEmbeddingBag(4, DheConfig(k=8, hidden=(), last_activation="none"), include_last_offset=True)
    cached = CachedDeepHashEmbeddingBag(bag, 20_000)
    with torch.no_grad():
        bag.decoder[0].weight.zero_()
        bag.decoder[0].bias.zero_()
    version, stop, wrong = [0], threading.Event(), []

    def read():
        with torch.no_grad():
            while not stop.is_set():
                ids = skewed(700, 5000)
                first = version[0]
                out = cached(ids, torch.arange(701))
                last = version[0] + 1  # the change may come before the version is raised
                if out.min() < first or out.max() > last:
                    wrong.append((first, last, out.min().item(), out.max().item()))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    with torch.no_grad():
        for _ in range(100):
            bag.decoder[0].bias.add_(1)  # the embedding of every ID
            version[0] += 1
            stop.wait(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


# ------------------------------------------------------------------------------------------- collection


@torch.no_grad()
def test_collection_equals_the_uncached():
    collection = small_collection()
    cached = CachedEmbeddingBagCollection(collection, 60_000)
    assert cached.nbytes <= 60_000
    for longest in (1, 3, 1, 3):
        indices, offsets = batch_of(collection, 50, longest)
        close(cached(indices, offsets), collection(indices, offsets))
        weights = torch.rand(len(indices))
        close(cached(indices, offsets, weights), collection(indices, offsets, weights))
        close(cached(indices.int(), offsets.int()), collection(indices, offsets))
    stats = cached.stats()
    assert set(stats.features) == {"city", "item", "words", "user"}
    assert all(f.hits for f in stats.features.values())
    assert 0 < stats.hit_rate < 1
    assert stats.lookup_s > 0
    assert stats.decode_s > 0


@torch.no_grad()
def test_counts_split_the_budget_and_fill_the_caches():
    collection = small_collection()
    counts = {"item": torch.arange(3000, 0, -1), "user": (torch.tensor([7, 5]), torch.tensor([10**6, 10**6]))}
    cached = CachedEmbeddingBagCollection(collection, 40_000, counts, admit=False)
    features = cached.stats().features
    assert set(features) == {"item", "user"}  # nothing is known of the others
    assert features["user"].rows == 2
    assert features["item"].rows > 0.9 * features["item"].capacity
    indices, offsets = batch_of(collection, 40)
    close(cached(indices, offsets), collection(indices, offsets))
    assert set(cached._rows_of["user"].held("user").tolist()) == {5, 7}


@torch.no_grad()
def test_budget_by_feature_and_its_errors():
    collection = small_collection()
    cached = CachedEmbeddingBagCollection(collection, {"item": 5000, "words": 0})
    assert set(cached.stats().features) == {"item"}
    assert 4000 < cached.nbytes <= 5000
    with pytest.raises(ValueError, match="no deep hash embedding 'tag'"):
        CachedEmbeddingBagCollection(collection, {"tag": 5000})
    with pytest.raises(ValueError, match="nbytes: 100 is too little"):
        CachedEmbeddingBagCollection(collection, 100)
    with pytest.raises(ValueError, match="no deep hash embedding 'nobody'"):
        cached.fill({"nobody": torch.ones(3)})


@torch.no_grad()
def test_a_bad_id_is_reported_with_its_feature():
    cached = CachedEmbeddingBagCollection(small_collection(), 60_000)
    indices, offsets = torch.tensor([1, 2, 3, -4, 5]), torch.arange(6)
    with pytest.raises(IdOutOfRangeError, match=r"indices\[3\] \(feature 'words', bag 0\) is -4"):
        cached(indices, offsets)


def test_collection_gradients_do_not_pass_the_cache():
    collection = small_collection()
    cached = CachedEmbeddingBagCollection(collection, 60_000)
    indices, offsets = batch_of(collection, 10)
    cached(indices, offsets).sum().backward()
    assert collection.dhe["city"].decoder[0].weight.grad is not None
    assert cached.stats().calls == 0


@torch.no_grad()
def test_materialized_tables_are_exact():
    collection = small_collection()
    tables = materialize(collection)
    assert [f.representation for f in tables.features] == ["table"] * 5
    assert tables.output_dims == collection.output_dims
    some = materialize(collection, ["item"])
    assert [f.representation for f in some.features] == ["dhe", "table", "table", "dhe", "dhe"]
    indices, offsets = batch_of(collection, 40)
    close(tables(indices, offsets), collection(indices, offsets))
    close(some(indices, offsets), collection(indices, offsets))
    with pytest.raises(ValueError, match="no deep hash embedding 'tag'"):
        materialize(collection, ["tag"])


# ------------------------------------------------------------------------------------------- budgets


def test_split_equals_brute_force():
    """The hottest IDs over all features, by decoder work saved per byte."""
    torch.manual_seed(1)
    dims = {"a": 8, "b": 64, "c": 8}
    hot = {name: hottest(torch.randint(0, 1000, (400,))) for name in dims}
    costs = {"a": 1.0, "b": 4.0, "c": 10.0}
    shares = split_budget(50_000, dims, dict.fromkeys(dims, 400), hot, costs)
    assert sum(shares.values()) <= 50_000
    rows = {name: _C.RowCache(dims[name], share).capacity if share else 0 for name, share in shares.items()}

    def saved(rows):
        return sum(float(hot[n].counts[: int(rows[n] * 0.93)].sum()) * costs[n] for n in dims)

    best = 0.0
    for a in range(0, 400, 12):
        for c in range(0, 400, 12):
            left = 50_000 - sum(_C.RowCache.bytes_for(8, r) for r in (a, c) if r)
            if left < _C.RowCache.bytes_for(64, 1):
                continue
            b = _C.RowCache(64, left).capacity
            best = max(best, saved({"a": a, "b": min(b, 430), "c": c}))
    assert saved(rows) > 0.97 * best


def test_split_without_counts_gives_small_vocabularies_what_they_need():
    dims = dict.fromkeys("abc", 16)
    shares = split_budget(100_000, dims, {"a": 10, "b": None, "c": 100_000})
    assert sum(shares.values()) <= 100_000
    assert shares["a"] < 5000
    assert abs(shares["b"] - shares["c"]) < 10
    assert split_budget(0, dims, dict.fromkeys("abc")) == dict.fromkeys("abc", 0)
    with pytest.raises(ValueError, match="nbytes"):
        split_budget(-1, dims, dict.fromkeys("abc"))


def test_hottest():
    assert hottest(torch.tensor([0, 5, 2, 5])).ids.tolist() == [1, 3, 2]
    assert hottest((torch.tensor([9, 4]), torch.tensor([1, 2]))).ids.tolist() == [4, 9]
    for bad in (
        torch.ones(2, 2),
        (torch.ones(2), torch.ones(3)),
        torch.tensor([-1]),
        (torch.tensor([-3]),) * 2,
    ):
        with pytest.raises(ValueError, match="counts"):
            hottest(bad)


# ------------------------------------------------------------------------------------------- codebooks


def clustered(n: int = 3000, clusters: int = 40, noise: float = 0.02) -> torch.Tensor:
    centres = torch.randn(clusters, 8)
    return centres[torch.randint(0, clusters, (n,))] + noise * torch.randn(n, 8)


def test_codebook_error_is_what_it_says():
    rows = clustered()
    book = Codebook.fit(rows, stages=1, max_error=0.1)
    back = book.rows(torch.arange(len(rows)))
    error = ((back - rows).double().square().sum() / (rows - rows.mean(0)).double().square().sum()).sqrt()
    assert abs(book.error - float(error)) < 1e-6
    assert book.error < 0.1
    assert book.nbytes == len(rows) + 256 * 8 * 4
    two = Codebook.fit(rows, stages=2)
    assert two.error < 0.7 * book.error
    close(
        two.rows(torch.tensor([5]))[0],
        two.centroids[two.codes[5, 0].long()] + two.centroids[256 + two.codes[5, 1].long()],
    )


def test_codebook_refuses_a_larger_error():
    noise = torch.randn(5000, 16)
    with pytest.raises(CodebookError, match=r"error of 1-byte codes is 0\.\d+ .* max_error, 0\.05"):
        Codebook.fit(noise, stages=1, max_error=0.05)
    assert Codebook.fit(noise, stages=1, max_error=None).error > 0.05


def test_few_different_rows_are_exact():
    rows = torch.randn(20, 4)[torch.randint(0, 20, (500,))]
    assert Codebook.fit(rows, max_error=1e-5).error < 1e-5
    assert Codebook.fit(torch.ones(7, 3)).error == 0


def test_weights_move_the_error_to_rare_rows():
    rows = torch.randn(4000, 16)
    weights = torch.where(torch.arange(4000) < 200, 1000.0, 1.0)
    assert Codebook.fit(rows, 1, weights, None).error < 0.6 * Codebook.fit(rows, 1, max_error=None).error


@pytest.mark.parametrize(
    ("rows", "options", "text"),
    [
        (torch.empty(0, 4), {}, "rows: expected"),
        (torch.ones(4), {}, "rows: expected"),
        (torch.tensor([[1.0, torch.nan]]), {}, "finite"),
        (torch.ones(3, 2), {"stages": 0}, "stages: expected 1 to 8, got 0"),
        (torch.ones(3, 2), {"weights": torch.ones(2)}, "weights: expected 3"),
        (torch.ones(3, 2), {"weights": torch.zeros(3)}, "weights"),
    ],
)
def test_codebook_bad_input(rows, options, text):
    with pytest.raises(ValueError, match=text):
        Codebook.fit(rows, **options)


@torch.no_grad()
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_codebook_bag(mode):
    bag = small_bag(mode=mode, num_embeddings=600, padding_idx=2)
    coded = CodebookEmbeddingBag(bag, stages=3, max_error=0.5)
    ids, offsets = torch.randint(0, 600, (90,)), torch.arange(0, 91, 3)
    rows = coded.codebook.rows(torch.arange(600))
    expected = embedding_bag(ids, rows, offsets, mode=mode, include_last_offset=True, padding_idx=2)
    close(coded(ids, offsets), expected)
    assert (coded(ids, offsets) - bag(ids, offsets)).abs().max() < 1
    with pytest.raises(IdOutOfRangeError):
        coded(torch.tensor([-1]), torch.tensor([0, 1]))


@torch.no_grad()
def test_ids_without_a_code_are_decoded():
    bag = small_bag()
    counts = (torch.tensor([10, 20, 30, 40, 50]), torch.tensor([5, 1, 1, 2, 3]))
    coded = CodebookEmbeddingBag(bag, counts=counts)
    assert coded.codebook.error < 1e-4  # five IDs, five centroids
    ids = torch.tensor([30, 31, 7, 50, 99, 10])
    offsets = torch.arange(7)
    close(coded(ids, offsets), bag(ids, offsets))
    with pytest.raises(ValueError, match="no bound"):
        CodebookEmbeddingBag(bag)
    with pytest.raises(ValueError, match="expected one of them"):
        CodebookEmbeddingBag(bag, ids=ids, counts=counts)
    with pytest.raises(ValueError, match="different IDs"):
        CodebookEmbeddingBag(bag, ids=torch.tensor([1, 1]))
    with pytest.raises(CodebookError):
        CodebookEmbeddingBag(bag, ids=torch.arange(5000), max_error=1e-3)


@torch.no_grad()
def test_misses_answered_by_code():
    """Both stages: filled rows exact, coded misses as the codebook has them, other IDs exact."""
    bag = small_bag()
    rows = bag(torch.arange(600), torch.arange(601))
    book = Codebook.fit(rows, max_error=0.9)
    cached = CachedDeepHashEmbeddingBag(bag, 40_000, codebook=book)
    cached.fill(torch.arange(200, 0, -1))
    assert cached.stats().features[""].rows == 200
    ids = torch.tensor([7, 500, 700, 199, 500, 599, 10**12])
    out = cached(ids, torch.arange(8))
    exact = [0, 2, 3, 6]
    close(out[exact], bag(ids, torch.arange(8))[exact])
    assert torch.equal(out[[1, 4, 5]], book.rows(ids[[1, 4, 5]]))
    stats = cached.stats()
    assert (stats.coded, stats.decoded) == (3, 2)
    assert set(cached._rows[0].held("").tolist()) == {*range(200), 700, 10**12}
    pooled = cached(ids[:6], torch.tensor([0, 3, 6]))
    close(pooled, torch.stack([out[:3].sum(0), out[3:6].sum(0)]))

    bag.decoder[0].weight.mul_(2)  # the codebook is of past weights
    close(cached(ids, torch.arange(8)), bag(ids, torch.arange(8)))
    assert cached.stats().coded == 6


@torch.no_grad()
def test_codebooks_of_a_collection():
    collection = small_collection()
    books = {
        "city": Codebook.fit(collection.dhe["city"].materialize(500), max_error=None),
        "words": Codebook.fit(collection.dhe["words"].materialize(800), max_error=None),
    }
    cached = CachedEmbeddingBagCollection(collection, {"item": 20_000}, codebooks=books)
    indices, offsets = batch_of(collection, 40)
    # tag and item are not approximated
    close(cached(indices, offsets)[:, 8:32], collection(indices, offsets)[:, 8:32])
    approximate = materialize(collection, ["city", "words"])
    for name, book in books.items():
        approximate.tables[name].weight.copy_(book.rows(torch.arange(len(book.codes))))
    close(cached(indices, offsets), approximate(indices, offsets))
    with pytest.raises(ValueError, match="codebooks: no deep hash embedding 'tag'"):
        CachedEmbeddingBagCollection(collection, 60_000, codebooks={"tag": books["city"]})
    with pytest.raises(ValueError, match=r"codebooks\[0\]: has rows of 4, but decoders\[0\] makes 8"):
        CachedEmbeddingBagCollection(
            collection, 60_000, codebooks={"city": Codebook.fit(torch.randn(9, 4), max_error=None)}
        )
    with pytest.raises(IdOutOfRangeError, match=r"ids\[1\] is 500, not in the valid range \[0, 500\)"):
        books["city"].rows(torch.tensor([0, 500]))


def test_the_published_decoder_stage():
    """Nearest centroid of an intermediate value: exact with as many centroids as IDs, else refused."""
    bag = small_bag()
    ids = torch.arange(100)
    few = CentroidEmbeddingBag(bag, ids, layer=1, max_error=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(
            few(ids, torch.arange(101)), bag(ids, torch.arange(101)), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(CodebookError, match=r"error of centroids of layer 0 is 0\.\d+"):
        CentroidEmbeddingBag(bag, torch.arange(3000), layer=0)
    with pytest.raises(ValueError, match="layer: expected 0 to 1, got 2"):
        CentroidEmbeddingBag(bag, ids, layer=2)
    with pytest.raises(ValueError, match="ids: expected at least one"):
        CentroidEmbeddingBag(bag, ids[:0])
