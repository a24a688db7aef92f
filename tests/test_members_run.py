"""Members of collections that do more than their weights say are called, or refused: never passed over."""

import copy

import pytest
import torch
from fake_graphs import FakeGraphs
from test_layers_run import Adapter, pooled
from torch import nn
from torch.nn.utils import parametrize

from mprec import cache
from mprec.errors import IdOutOfRangeError, PathCompileError
from mprec.models import DLRM, CapturedPath, compile_path
from mprec.nn import (
    DheConfig,
    Embedding,
    EmbeddingBag,
    EmbeddingBagCollection,
    FeatureConfig,
    MappedEmbeddingBagCollection,
    QuantizedEmbeddingBagCollection,
    embed_together,
    torchrec,
)
from mprec.nn.low_rank import LowRankEmbeddingBagCollection

CONFIG = DheConfig(k=8, hidden=(6,))
IDS, OFFSETS = torch.tensor([1, 2, 3, 2, 5, 7, 4, 4, 0]), torch.tensor([0, 2, 3, 5, 5, 6, 9])
WEIGHTS = torch.linspace(-1, 2, 9)


class WithAdapter(nn.Module):
    """As libraries of adapters have it: in the member's place, with its weight."""

    def __init__(self, member):
        super().__init__()
        self.member = member

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("member"), name)

    def forward(self, *inputs):
        return 2 * self.member(*inputs)


def hook(members, name):
    members[name].register_forward_hook(lambda m, i, o: 2 * o)


def pre_hook(members, name):
    members[name].register_forward_pre_hook(lambda m, i: (i[0] * 0 + 1, *i[1:]))


def own_forward(members, name):
    call = members[name].forward
    members[name].forward = lambda *inputs: call(*inputs) + 1


def adapter(members, name):
    members[name] = WithAdapter(members[name])


def class_of_its_own(members, name):
    class Changed(type(members[name])):
        def forward(self, *inputs):
            return 2 * super().forward(*inputs)

    members[name].__class__ = Changed


CHANGES = {
    "class": class_of_its_own,
    "hook": hook,
    "pre-hook": pre_hook,
    "own forward": own_forward,
    "adapter": adapter,
}


def collection(representation, mode="sum", **options):
    torch.manual_seed(0)
    features = [FeatureConfig(name, 8, 4, representation, CONFIG, mode) for name in "ab"]
    return EmbeddingBagCollection([*features, FeatureConfig("c", 8, 4)], **options)


def expected(before, member, weights=None, ids=IDS):
    """What the member makes of the second feature's bags, between the others' columns."""
    begin, end = int(OFFSETS[2]), int(OFFSETS[4])
    offsets = OFFSETS[2:5] - begin
    if not getattr(member, "include_last_offset", True):
        offsets = offsets[:-1]
    out, own = before.clone(), () if weights is None else (weights[begin:end],)
    out[:, 4:8] = member(ids[begin:end], offsets, *own)
    return out


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("representation", ["table", "dhe"])
@pytest.mark.parametrize("change", CHANGES)
def test_members_are_called(change, representation, mode, weighted):
    if weighted and mode == "max":
        pytest.skip("weights are for sums and means")
    module, weights = collection(representation, mode), WEIGHTS if weighted else None
    members = module.tables if representation == "table" else module.dhe
    with torch.no_grad():
        before = module(IDS, OFFSETS, weights)  # remembered, or packed
    CHANGES[change](members, "b")
    with torch.no_grad():
        want = expected(before, members["b"], weights)
        assert not torch.allclose(want, before)
        torch.testing.assert_close(module(IDS, OFFSETS, weights), want)
        torch.testing.assert_close(module(IDS, OFFSETS, weights, out=torch.empty(2, 12)), want)
        torch.testing.assert_close(copy.deepcopy(module)(IDS, OFFSETS, weights), want)
    got = module(IDS.int(), OFFSETS.int(), weights)
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert all(parameter.grad is not None for parameter in members["b"].parameters())


@pytest.mark.parametrize("representation", ["table", "dhe", "low_rank"])
def test_hooks_of_backward_passes_are_run(representation):
    module, seen = collection(representation), []
    container = {"table": "tables"}.get(representation, representation)
    member = module._modules[container]["b"]
    member = member.rows if representation == "low_rank" else member
    member.register_full_backward_hook(lambda m, got, given: seen.append(given[0].shape[0]))
    module(IDS, OFFSETS).sum().backward()
    assert seen == [2]


def test_a_table_alone_is_called_and_names_its_feature():
    module, seen = EmbeddingBagCollection([FeatureConfig("a", 8, 4), FeatureConfig("b", 8, 4)]), []
    with torch.no_grad():
        before = module(IDS[:5], OFFSETS[:5])
        handle = module.tables["b"].register_forward_hook(lambda m, i, o: seen.append(o.shape))
        torch.testing.assert_close(module(IDS[:5], OFFSETS[:5]), before)
        with pytest.raises(IdOutOfRangeError, match="feature 'b'"):
            module(torch.tensor([1, 8]), torch.tensor([0, 1, 2]))
        assert seen == [(2, 4)]
        handle.remove()
        torch.testing.assert_close(module(IDS[:5], OFFSETS[:5]), before)
    assert seen == [(2, 4)]


@pytest.mark.parametrize(
    "change", [{"max_norm": 0.01}, {"padding_idx": 2}], ids=lambda change: next(iter(change))
)
def test_options_of_a_member_count(change):
    module = collection("table")
    with torch.no_grad():
        before = module(IDS, OFFSETS)
        for name, value in change.items():
            setattr(module.tables["b"], name, value)
        twin = copy.deepcopy(module.tables["b"])
        want = expected(before, twin)
        assert not torch.allclose(want, before)
        torch.testing.assert_close(module(IDS, OFFSETS), want)


def test_a_member_of_torch_pads_as_it_says():
    module = collection("table")
    module.tables["b"] = nn.EmbeddingBag(8, 4, mode="sum", padding_idx=2)  # without the last offset
    with torch.no_grad():
        out = module(IDS, OFFSETS)
        torch.testing.assert_close(out[:, 4:8], module.tables["b"](IDS[3:5], torch.tensor([0, 2])))


@pytest.mark.parametrize("place", ["hot", "rest", "rest.rows", "rest.projection"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_parts_of_hot_low_rank_members_are_called(place, mode):
    module, seen = collection("hot_low_rank", mode), []
    ids = IDS * (torch.arange(9) != 3)  # one of the second feature is hot, one is not
    member = module._modules["hot_low_rank"]["b"]
    before = module(ids, OFFSETS)
    if place == "rest":
        member.rest.register_forward_hook(lambda m, i, o: o)
        with pytest.raises(TypeError, match="expected no hooks"):
            module(ids, OFFSETS)
        return
    part = member.get_submodule(place)
    part.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    torch.testing.assert_close(module(ids, OFFSETS), before)
    assert seen == [2]
    part.register_forward_hook(lambda m, i, o: 0 * o)
    assert not torch.allclose(module(ids, OFFSETS), before)


@pytest.mark.parametrize("place", ["rows", "projection"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_parts_of_low_rank_members_are_called(place, change, mode):
    if (place, change) == ("projection", "pre-hook"):
        pytest.skip("its input is no ID")
    module = collection("low_rank", mode)
    member = module.low_rank["b"]
    before = module(IDS, OFFSETS)
    CHANGES[change](member._modules, place)
    rows = member.rows(IDS[3:5], torch.tensor([0, 2]))
    want = before.clone()
    want[:, 4:8] = member.projection(rows)
    assert not torch.allclose(want, before)
    torch.testing.assert_close(module(IDS, OFFSETS), want)
    with torch.no_grad():
        torch.testing.assert_close(module(IDS, OFFSETS), want)


@pytest.mark.parametrize("representation", ["low_rank", "hot_dhe"])
def test_what_is_never_called_refuses_hooks(representation):
    module = collection(representation)
    handle = module._modules[representation]["b"].register_forward_hook(lambda m, i, o: o)
    for grad in (torch.no_grad, torch.enable_grad):
        with grad(), pytest.raises(TypeError, match="never call it"):
            module(IDS, OFFSETS)
    handle.remove()
    module(IDS, OFFSETS)


@pytest.mark.parametrize("representation", ["table", "dhe", "low_rank", "hot_dhe"])
def test_quantised_members_call_or_refuse(representation):
    module = QuantizedEmbeddingBagCollection(collection(representation))
    container = {"table": "tables"}.get(representation, representation)
    module(IDS, OFFSETS)
    handle = module._modules[container]["b"].register_forward_hook(lambda m, i, o: 2 * o)
    with pytest.raises(TypeError, match=r"never call it|without hooks"):
        module(IDS, OFFSETS)
    handle.remove()
    module(IDS, OFFSETS)


@pytest.mark.parametrize("representation", ["table", "low_rank", "hot_dhe"])
def test_conversions_refuse_what_weights_do_not_say(representation):
    module = collection(representation)
    container = {"table": "tables"}.get(representation, representation)
    member = module._modules[container]["b"]
    part = {"low_rank": "rows", "hot_dhe": "hot"}.get(representation, "")
    hook({"b": member.get_submodule(part)}, "b")
    with pytest.raises(TypeError, match="without hooks"):
        QuantizedEmbeddingBagCollection(module)
    if representation != "table":
        with pytest.raises(TypeError, match="without hooks"):
            cache.materialize(module)
    elif representation == "table":
        with pytest.raises(TypeError, match="without hooks"):
            MappedEmbeddingBagCollection(module).fold()


def test_cached_decoders_are_called():
    module = cache.CachedEmbeddingBagCollection(collection("dhe"), 1 << 14)
    with torch.no_grad():
        before = module(IDS, OFFSETS)
        hook(module.dhe, "b")
        want = before.clone()
        want[:, 4:8] *= 2
        for _ in range(2):
            torch.testing.assert_close(module(IDS, OFFSETS), want)
        module.dhe["b"]._forward_hooks.clear()
        torch.testing.assert_close(module(IDS, OFFSETS), before)
        module.dhe["b"] = copy.deepcopy(module.dhe["a"])
        torch.testing.assert_close(module(IDS, OFFSETS), collection_with(module)(IDS, OFFSETS))


def collection_with(cached):
    plain = collection("dhe")
    plain.load_state_dict(cached.state_dict())
    return plain


class Config:
    def __init__(self, name, pooling="SUM"):
        self.name, self.num_embeddings, self.embedding_dim, self.feature_names = name, 8, 4, [name]
        self.pooling = pooling


class Jagged:
    """Of a KeyedJaggedTensor, what collections ask for."""

    def keys(self):
        return ["a", "b", "c"]

    def values(self):
        return IDS

    def offsets(self):
        return OFFSETS

    def weights_or_none(self):
        return None


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("pooling", ["SUM", "MEAN"])
def test_torchrec_like_members_are_called(change, pooling):
    for representation in ("table", "dhe", "low_rank"):
        module = torchrec.EmbeddingBagCollection(
            [Config(name, pooling) for name in "abc"], representation=representation
        )
        before = module(Jagged()).values()
        members = module.embedding_bags
        if representation == "low_rank":
            members = members["b"]._modules
            CHANGES[change](members, "rows")
            rows = members["rows"](IDS[3:5], torch.tensor([0, 2]))
            want = before.clone()
            want[:, 4:8] = members["projection"](rows)
        else:
            CHANGES[change](members, "b")
            want = expected(before, members["b"])
        assert not torch.allclose(want, before)
        torch.testing.assert_close(module(Jagged()).values(), want)


@pytest.mark.parametrize("change", CHANGES)
def test_embed_together_calls_changed_tables(change):
    import mprec.optim

    tables = nn.ModuleDict({name: Embedding(8, 4) for name in "ab"})
    mprec.optim.SGD(list(tables.parameters()), lr=0.1)
    ids = [IDS, IDS + 0]
    before = embed_together(tables.values(), ids)
    CHANGES[change](tables, "b")
    after = embed_together(tables.values(), ids)
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[1], tables["b"](ids[1]))
    assert not torch.allclose(after[1], before[1])


class Double(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("representation", ["table", "hybrid", "low_rank"])
def test_parametrised_weights_are_what_they_are_computed_as(representation):
    module = collection(representation)
    with torch.no_grad():
        before = module(IDS, OFFSETS)
        container = {"low_rank": module._modules["low_rank"]}.get(representation, module.tables)
        member = container["b"]
        target = member.rows if representation == "low_rank" else member
        parametrize.register_parametrization(target, "weight", Double())
        want = before.clone()
        start = 4 if representation != "hybrid" else 8
        want[:, start : start + 4] *= 2
        torch.testing.assert_close(module(IDS, OFFSETS), want)
    torch.testing.assert_close(module(IDS, OFFSETS), want)


def test_parametrised_first_table_beside_decoders():
    module = collection("hybrid")
    with torch.no_grad():
        before = module(IDS, OFFSETS)
        parametrize.register_parametrization(module.tables["a"], "weight", Double())
        want = before.clone()
        want[:, :4] *= 2
        torch.testing.assert_close(module(IDS, OFFSETS), want)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_weights_that_hooks_of_torch_compute(name):
    module = collection("table")
    getattr(nn.utils, name)(module.tables["b"]).eval()
    module.eval()
    first = next(iter(module.tables["b"].parameters()))
    with torch.no_grad():
        before = module(IDS, OFFSETS)
        first.mul_(3)
        want = expected(before, module.tables["b"])
        torch.testing.assert_close(module(IDS, OFFSETS), want)


def test_a_low_rank_collection_for_serving_has_no_members():
    """Its codes are buffers of its own: hooks stand on it, and calls run them."""
    module, seen = LowRankEmbeddingBagCollection([FeatureConfig("a", 8, 4)], rank=2), []
    module.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    module(IDS, torch.tensor([0, 3, 9]))
    assert seen == [(2, 4)]
    assert not dict(module.named_children())["tables"]


# ------------------------------------------------------------------------------------------ compiled paths


def model(representation="hybrid"):
    torch.manual_seed(0)
    features = [FeatureConfig(name, 8, 4, representation, CONFIG) for name in "abc"]
    return DLRM(features, 2, 4, (8,), (8,)).eval()


def paths(made):
    return [compile_path(made), CapturedPath(made, graphs=FakeGraphs())]


PLACES = {
    "table": ["", "embeddings", "bottom", "top", "bottom.0", "top.1", "embeddings.tables.b"],
    "dhe": ["embeddings.dhe.b", "embeddings.dhe.b.decoder.0"],
    "low_rank": ["embeddings.low_rank.b.rows", "embeddings.low_rank.b.projection"],
}


@pytest.mark.parametrize(("representation", "place"), [(r, place) for r in PLACES for place in PLACES[r]])
@pytest.mark.parametrize("change", ["hook", "own forward", "class"])
def test_compiled_paths_go_to_a_model_that_is_listened_to(representation, place, change):
    made = model(representation)
    arguments = torch.randn(2, 2), IDS, OFFSETS
    for path in paths(made):
        before = path(*arguments)
        module = made.get_submodule(place)
        if change == "class" and not place:
            continue  # the model's own class is looked at when it is compiled
        kind = type(module)
        CHANGES[change]({"b": module}, "b")
        with torch.no_grad():
            want = made(*arguments).sigmoid()
        assert not torch.allclose(want, before)
        torch.testing.assert_close(path(*arguments), want)
        with pytest.raises(PathCompileError):
            type(path)(made) if isinstance(path, type(compile_path(model()))) else paths(made)
        module._forward_hooks.clear()
        module.__dict__.pop("forward", None)
        module.__class__ = kind
        torch.testing.assert_close(path(*arguments), before)


@pytest.mark.parametrize("change", [{"max_norm": 0.01}, {"padding_idx": 2}])
def test_compiled_paths_refuse_members_with_options(change):
    made = model("table")
    for name, value in change.items():
        setattr(made.embeddings.tables["b"], name, value)
    with pytest.raises(PathCompileError, match=r"embeddings\.tables\.b"):
        compile_path(made)


def test_compiled_paths_refuse_adapters():
    made = model("low_rank")
    made.embeddings.low_rank["b"].projection = Adapter(nn.Linear(1, 4, bias=False))
    with pytest.raises(PathCompileError, match="projection"):
        compile_path(made)
    made = model("table")
    adapter(made.embeddings.tables, "b")
    with pytest.raises(PathCompileError, match="embeddings"):
        compile_path(made)


def test_a_plain_table_of_torch_is_read():
    module = collection("table")
    module.tables["b"] = nn.EmbeddingBag(8, 4, mode="sum")
    rows = module.tables["b"].weight
    with torch.no_grad():
        torch.testing.assert_close(module(IDS, OFFSETS)[:, 4:8], pooled(rows[IDS[3:5]], [0, 2, 2], "sum"))
    assert isinstance(module.tables["a"], EmbeddingBag)
