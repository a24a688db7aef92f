"""Swapping modules into other people's models: what changes, what is left alone, and the way back."""

import copy
import pickle

import pytest
import torch
from torch import nn

import mprec.optim
from mprec.nn import (
    DeepHashEmbedding,
    DeepHashEmbeddingBag,
    DheConfig,
    Embedding,
    EmbeddingBag,
    EmbeddingBagCollection,
    FeatureConfig,
    LowRankEmbedding,
    LowRankEmbeddingBag,
    swap,
)

SMALL = DheConfig(k=16, hidden=(8,))


class Normal(nn.Embedding):
    """As people write it for another initialisation."""

    def reset_parameters(self):
        self.weight.data.normal_(0, 0.1)


class Doubled(nn.Embedding):
    def forward(self, input):
        return 2 * super().forward(input)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.user = nn.EmbeddingBag(20, 4, mode="sum", padding_idx=3)
        self.items = nn.ModuleList([nn.EmbeddingBag(50, 4, mode="mean", sparse=True), nn.EmbeddingBag(9, 4)])
        self.again = self.user
        self.words = nn.Embedding(20, 4, padding_idx=0)
        self.hidden = [self.words]  # a reference that named_modules does not see
        self.top = nn.Linear(4, 1)

    def forward(self, ids, offsets):
        pooled = self.user(ids, offsets) + self.items[0](ids, offsets) + self.again(ids, offsets)
        return self.top(pooled + self.hidden[0](ids[:3]))


def call():
    return torch.tensor([1, 3, 5, 19, 0]), torch.tensor([0, 2, 2])


def test_swapped_tables_change_nothing_but_the_kernels():
    model = Model().eval()
    calls = []
    model.user.register_forward_hook(lambda *_: calls.append(1))
    before, state, parameters = model(*call()), copy.deepcopy(model.state_dict()), list(model.parameters())
    report = swap(model)
    assert report.model is model
    assert [(r.name, r.was, r.representation) for r in report.replaced] == [
        ("user", nn.EmbeddingBag, "table"),
        ("items.0", nn.EmbeddingBag, "table"),
        ("items.1", nn.EmbeddingBag, "table"),
        ("words", nn.Embedding, "table"),
    ]
    assert report.left == ()
    assert [type(m) for m in (model.user, *model.items, model.words)] == [EmbeddingBag] * 3 + [Embedding]
    assert model.again is model.user
    assert not model.user.training
    torch.testing.assert_close(model(*call()), before)
    assert len(calls) == 4
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model.load_state_dict(state)
    model.train()
    model(*call()).sum().backward()
    assert model.items[0].weight.grad.is_sparse
    again = swap(model)  # a second time changes nothing, and says so
    assert again.replaced == ()
    assert {entry.reason for entry in again.left} == {"is one of mprec's already"}


@pytest.mark.parametrize("representation", ["table", "dhe", "low_rank"])
def test_the_way_back(representation):
    model = Model()
    types, before = [type(m) for m in model.modules()], model(*call())
    report = swap(model, representation, dhe=None if representation == "table" else SMALL)
    assert len(report.replaced) == 4
    report.undo()
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(model(*call()), before)
    assert len(swap(model).replaced) == 4


def test_torch_quantises_after_the_way_back():
    """torch.ao looks for exactly torch's class: after a swap it leaves tables in float32."""
    model = nn.Sequential(nn.EmbeddingBag(10, 4, mode="sum", include_last_offset=True))
    kinds = {nn.EmbeddingBag: torch.ao.quantization.float_qparams_weight_only_qconfig}
    report = swap(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, kinds)
    assert type(quantized[0]) is EmbeddingBag
    assert "quantize_dynamic" in swap.__doc__
    report.undo()
    quantized = torch.ao.quantization.quantize_dynamic(model, kinds)
    assert type(quantized[0]) is torch.ao.nn.quantized.EmbeddingBag


def test_no_way_back_past_another_swap():
    model = Model()
    first = swap(model)
    model.words.__class__ = nn.Embedding
    with pytest.raises(RuntimeError, match=r"words: expected the class .* as swap left it, got"):
        first.undo()
    assert type(model.user) is EmbeddingBag


@pytest.mark.parametrize(
    "choice",
    [
        {"items.0": SMALL, "words": SMALL},
        {"items.0": "dhe", "words": FeatureConfig("words", 20, 4, "dhe", dhe=SMALL)},
        lambda name, module: SMALL if name in ("items.0", "words") else "table",
        [FeatureConfig("0", 50, 4, "dhe", dhe=SMALL), FeatureConfig("words", 20, 4, "dhe", dhe=SMALL)],
    ],
)
def test_choices_by_name_by_function_and_by_features(choice):
    model = Model()
    model.items[0].note = "kept"
    swap(model, choice, dhe=SMALL)
    assert type(model.user) is EmbeddingBag
    bag, words = model.items[0], model.words
    assert type(bag) is DeepHashEmbeddingBag
    assert (bag.num_embeddings, bag.embedding_dim, bag.mode, bag.note) == (50, 4, "mean", "kept")
    assert type(words) is DeepHashEmbedding
    assert (words.num_embeddings, words.embedding_dim, words.padding_idx) == (20, 4, 0)
    assert model(*call()).shape == (3, 1)
    assert set(model.state_dict()) >= {"items.0.coefficients", "words.decoder.1.bias", "user.weight"}


def test_a_plan_is_a_choice():
    class Plan:
        def features(self):
            return [FeatureConfig("words", 20, 4, "low_rank", parameters={"rank": 2})]

    model = Model()
    report = swap(model, Plan())
    assert [r.representation for r in report.replaced] == ["table", "table", "table", "low_rank"]
    assert model.words.rows.embedding_dim == 2


def test_none_leaves_alone():
    model = Model()
    report = swap(model, lambda name, module: None if name == "words" else "table")
    assert type(model.words) is nn.Embedding
    assert [(entry.name, entry.reason) for entry in report.left] == [("words", "chosen so")]


def test_low_rank_begins_at_the_nearest_rows():
    model = Model()
    before = model(*call())
    swap(model, "low_rank", rank=4)  # of full rank: the same rows
    assert [type(m) for m in (model.user, model.words)] == [LowRankEmbeddingBag, LowRankEmbedding]
    torch.testing.assert_close(model(*call()), before)
    table = nn.Embedding(30, 8)
    exact = table.weight.detach().double()
    swap(table, "low_rank", rank=3)
    u, s, v = torch.linalg.svd(exact, full_matrices=False)
    torch.testing.assert_close(table.weight.double(), u[:, :3] * s[:3] @ v[:3], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("representation", ["dhe", "low_rank"])
def test_the_others_learn(representation):
    torch.manual_seed(0)
    model = swap(Model(), representation, dhe=SMALL).model
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    swap_free = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("decoder" in name or "projection" in name for name in swap_free)
    if representation == "low_rank":  # Adam takes no sparse gradients
        model.items[0].rows.sparse = False
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(*call()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_subclasses_that_change_no_forward():
    model = nn.ModuleDict({"normal": Normal(7, 3), "doubled": Doubled(5, 3)})
    ids = torch.tensor([[1, 4], [0, 2]])
    before = model["normal"](ids)
    report = swap(model)
    assert [r.was for r in report.replaced] == [Normal]
    assert [(entry.name, entry.reason) for entry in report.left] == [
        ("doubled", "its forward is not torch's")
    ]
    swapped = model["normal"]
    assert isinstance(swapped, Normal)
    assert isinstance(swapped, Embedding)
    for twin in (swapped, copy.deepcopy(swapped), pickle.loads(pickle.dumps(swapped))):
        assert isinstance(twin, Normal)
        assert isinstance(twin, Embedding)
        assert torch.equal(twin(ids), before)
    swapped.reset_parameters()
    assert swapped.weight.std() < 0.5
    report.undo()
    assert type(model["normal"]) is Normal
    assert type(swap(model, {"normal": SMALL}).model["normal"]) is DeepHashEmbedding


def test_swap_of_an_embedding_itself():
    bag = nn.EmbeddingBag(5, 3)
    report = swap(bag)
    assert report.model is bag
    assert type(bag) is EmbeddingBag
    assert "(the model)  EmbeddingBag -> table, 15 -> 15 parameters" in str(report)


def test_what_swap_refuses_leaves_the_model_alone():
    model = Model()
    with pytest.raises(KeyError, match="'top' is no embedding of the model"):
        swap(model, {"top": SMALL})
    with pytest.raises(KeyError, match="feature 'nothing': expected one embedding of this name, got none"):
        swap(model, [FeatureConfig("nothing", 20, 4)])
    with pytest.raises(ValueError, match="words: expected 20 embeddings of 4 numbers"):
        swap(model, {"words": FeatureConfig("words", 21, 4)})
    with pytest.raises(ValueError, match=r"user: representation: expected one of table, dhe, low_rank"):
        swap(model, "hybrid")
    with pytest.raises(TypeError, match="user: expected a name, a DheConfig"):
        swap(model, lambda name, module: 7)
    with pytest.raises(TypeError, match="dhe: expected a DheConfig, got dict"):
        swap(model, dhe={"user": SMALL})
    with pytest.raises(ValueError, match=r"dhe: has no meaning for representation='table'.*say .*='dhe'"):
        swap(model, dhe=SMALL)
    with pytest.raises(ValueError, match=r"rank: has no meaning for representation='table'.*'low_rank'"):
        swap(model, rank=2)
    model.items[1].max_norm = 1.0
    with pytest.raises(ValueError, match=r"items\.1: max_norm=1\.0 has no meaning"):
        swap(model, {"items.1": SMALL})
    assert type(model.user) is nn.EmbeddingBag
    left = swap(model, "dhe", dhe=SMALL).left  # nobody asked for this one by name
    assert [(entry.name, entry.reason) for entry in left] == [
        ("items.1", "max_norm=1.0 has no meaning for dhe")
    ]


def test_a_shared_table_is_not_torn_apart():
    model = nn.ModuleDict({"in": nn.Embedding(6, 4), "out": nn.Linear(4, 6, bias=False)})
    model["out"].weight = model["in"].weight
    with pytest.raises(ValueError, match=r"in: its table is shared: in\.weight, out\.weight"):
        swap(model, {"in": SMALL})
    swap(model)
    assert model["out"].weight is model["in"].weight


def test_parametrised_and_extended_modules_are_left_alone():
    model = nn.ModuleDict({"a": nn.Embedding(6, 4), "b": nn.Embedding(6, 4), "c": nn.Embedding(6, 4)})
    nn.utils.parametrizations.weight_norm(model["a"])
    model["b"].register_buffer("seen", torch.zeros(6))
    report = swap(model)
    assert [entry.name for entry in report.left] == ["a", "b"]
    assert "parametrizations" in report.left[0].reason
    assert "more parameters, buffers or modules" in report.left[1].reason


def test_nothing_to_replace_is_told():
    with pytest.warns(UserWarning, match="swap has changed nothing: 0 of 0 embeddings replaced"):
        swap(nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="Doubled: its forward is not torch's"):
        swap(nn.Sequential(Doubled(3, 2)))


def test_the_inside_of_a_collection_is_its_own():
    collection = EmbeddingBagCollection([FeatureConfig("a", 9, 4), FeatureConfig("b", 5, 4, "low_rank")])
    model = nn.ModuleDict({"all": collection, "word": nn.Embedding(5, 2)})
    assert [r.name for r in swap(model, "dhe", dhe=SMALL).replaced] == ["word"]
    assert type(collection.tables["a"]) is EmbeddingBag


def test_a_swapped_table_is_updated_in_the_backward_pass():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 4, padding_idx=0), nn.Linear(4, 1))
    twin = copy.deepcopy(model)
    swap(model)
    tables, rest = mprec.optim.split_parameters(model)
    assert [id(p) for p in tables] == [id(model[0].weight)]
    optimizer = mprec.optim.SGD(tables, lr=0.5)
    ids = torch.tensor([[3, 0, 3], [1, 49, 0]])
    for m in (model, twin):
        m(ids).square().sum().backward()
    with torch.no_grad():
        twin[0].weight -= 0.5 * twin[0].weight.grad
    torch.testing.assert_close(model[0].weight, twin[0].weight)
    assert model[0].weight.grad is None
    assert torch.equal(rest[0].grad, twin[1].weight.grad)
    assert optimizer.state[model[0].weight]["step"] == 1
