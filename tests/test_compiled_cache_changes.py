"""Whole paths as one native call, of decoders behind row caches: what changes between calls is noticed."""

import pytest
import torch
from cached_dlrm import batch, books, make, plain
from float64_dlrm import check, check_weights

import mprec
from mprec.cache import CachedEmbeddingBagCollection
from mprec.options import RunOptions


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def changes():
    def in_place(model):
        model.embeddings.dhe["city"].decoder[0].weight.mul_(1.5)

    def bias(model):
        model.embeddings.dhe["user"].decoder[0].bias.add_(1)

    def through_data(model):
        layer = model.embeddings.dhe["item"].decoder[1]
        layer.weight.data = layer.weight.data + 0.3

    def replaced(model):
        model.embeddings.dhe["words"].decoder[0].bias = torch.nn.Parameter(torch.ones(16))

    def coefficients(model):
        own = model.embeddings.dhe["city"].coefficients
        own.copy_(own.flip(1))

    def table(model):
        model.embeddings.tables["tag"].weight.neg_()

    def state(model):
        other = plain()
        for p in other.parameters():
            p.mul_(1.3)
        model.load_state_dict(other.state_dict())

    return {f.__name__: f for f in list(locals().values()) if callable(f)}


@torch.no_grad()
@pytest.mark.parametrize("change", list(changes()))
@pytest.mark.parametrize("filled", [False, True])
def test_no_row_outlives_its_weights(change, filled):
    model = make(1 << 20)
    path = mprec.compile_path(model)
    inputs = batch(model, 40)
    if filled:
        path(*inputs)
    before = path(*inputs)
    program = path.program()
    changes()[change](model)
    assert change == "table" or program.changed(8000)
    after = path(*inputs)
    assert not torch.allclose(before, after, atol=1e-7, rtol=0)
    check_weights(model, after, *inputs)
    native = path._native
    torch.testing.assert_close(path(*inputs), after, rtol=1e-5, atol=1e-6)
    assert path._native is native, "packed again although nothing changed"
    check(model, path(*inputs), *inputs)


@torch.no_grad()
def test_a_cleared_cache():
    model = make(1 << 20)
    path = mprec.compile_path(model)
    inputs = batch(model, 60)
    first = path(*inputs)
    assert all(f.rows for f in model.embeddings.stats().features.values())
    model.embeddings.invalidate()
    assert path.program() is path._native
    assert not any(f.rows for f in model.embeddings.stats().features.values())
    before = model.embeddings.stats().decoded
    assert torch.equal(path(*inputs), first)
    assert model.embeddings.stats().decoded == 2 * before
    assert all(f.rows for f in model.embeddings.stats().features.values())


@torch.no_grad()
def test_filled_and_refreshed_rows_are_found():
    model = make(1 << 20, admit=False)
    path = mprec.compile_path(model)
    inputs = batch(model, 60)
    path(*inputs)
    assert not any(f.rows for f in model.embeddings.stats().features.values())
    native = path._native
    assert model.embeddings.fill({"city": torch.ones(500)})["city"] > 450
    model.embeddings.reset_stats()
    path(*inputs)
    assert path._native is native
    assert model.embeddings.stats().features["city"].hit_rate > 0.9
    model.embeddings.dhe["city"].decoder[0].weight.mul_(2)
    assert model.embeddings.refresh() > 450
    model.embeddings.reset_stats()
    got = path(*inputs)
    assert path._native is not native
    assert model.embeddings.stats().features["city"].hit_rate > 0.9
    check_weights(model, got, *inputs)


@torch.no_grad()
def test_an_unwatched_cache_changes_when_told():
    """As the model itself."""
    model = make(1 << 20, watch=False)
    path = mprec.compile_path(model)
    inputs = batch(model, 40)
    before = path(*inputs)
    model.embeddings.dhe["city"].decoder[0].weight.mul_(2)
    assert torch.equal(path(*inputs), before)
    torch.testing.assert_close(model(*inputs).sigmoid(), before)
    model.embeddings.invalidate()
    after = path(*inputs)
    assert not torch.allclose(before, after, atol=1e-6)
    check_weights(model, after, *inputs)


@torch.no_grad()
def test_changed_weights_drop_codebooks():
    model = make({"words": 20_000}, codebooks=books(plain(), 1))
    path = mprec.compile_path(model)
    inputs = batch(model, 40)
    path(*inputs)
    assert (coded := model.embeddings.stats().coded) > 0
    model.embeddings.dhe["city"].decoder[0].weight.mul_(1.1)
    check_weights(model, path(*inputs), *inputs)
    assert model.embeddings.stats().coded == coded


@torch.no_grad()
def test_other_caches_and_none():
    model = make()
    path = mprec.compile_path(model)
    inputs = batch(model, 40)
    path(*inputs)
    old, model.embeddings = model.embeddings, CachedEmbeddingBagCollection(model.embeddings, 30_000)
    calls = old.stats().calls
    check_weights(model, path(*inputs), *inputs)
    assert old.stats().calls == calls
    assert model.embeddings.stats().calls > 0
    model.embeddings = plain().embeddings
    check_weights(model, path(*inputs), *inputs)
    assert old.stats().calls == calls


@torch.no_grad()
def test_whether_rows_enter_is_read_at_each_call():
    model = make(1 << 20)
    path = mprec.compile_path(model)
    for rows in model.embeddings._rows:
        rows.admit = False
    path(*batch(model, 40))
    assert not any(f.rows for f in model.embeddings.stats().features.values())


@torch.no_grad()
def test_a_model_that_is_no_longer_compiled_runs_as_before():
    model = make()
    path = mprec.compile_path(model)
    inputs = batch(model, 12)
    path(*inputs)
    torch.nn.utils.parametrizations.weight_norm(model.embeddings.dhe["city"].decoder[0])
    model.embeddings.dhe["city"].decoder[0].parametrizations.weight.original0.mul_(2)
    torch.testing.assert_close(path(*inputs), model(*inputs).sigmoid())


@torch.no_grad()
def test_a_choice_of_options_to_pass_the_cache_by_is_not_read():
    """A compiled path chooses by itself how it runs; it never changes a result."""
    model = make()
    model.embeddings.options = lambda samples: RunOptions(cache=False)
    inputs = batch(model, 40)
    got = mprec.compile_path(model)(*inputs)
    assert model.embeddings.stats().calls == 3
    torch.testing.assert_close(got, model(*inputs).sigmoid(), rtol=1e-5, atol=1e-6)
    assert model.embeddings.stats().calls == 3
