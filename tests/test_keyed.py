"""Batches by name and collections with TorchRec's interface, by stand-ins for TorchRec's classes (TorchRec's
own are in tests/models)."""

import copy
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import mprec.optim
from mprec import nn
from mprec.errors import IdOutOfRangeError
from mprec.nn.keyed import KeyedTensor
from mprec.nn.torchrec import EmbeddingBagCollection, EmbeddingCollection
from mprec.representations import PARTS

SMALL = nn.DheConfig(k=16, hidden=(8,))


@dataclass
class Config:
    """What is read of torchrec.EmbeddingBagConfig."""

    name: str
    num_embeddings: int
    embedding_dim: int
    feature_names: list = field(default_factory=list)
    pooling: str = "SUM"
    data_type: str = "FP32"
    init_fn: object = None


@dataclass
class Batch:
    """What is called of torchrec.KeyedJaggedTensor."""

    names: list
    bags: dict  # name -> lists of IDs, one a sample
    scale: float | None = None
    inverse: Tensor | None = None

    def keys(self):
        return self.names

    def values(self):
        return torch.tensor([i for name in self.names for bag in self.bags[name] for i in bag])

    def weights_or_none(self):
        return None if self.scale is None else self.values() * self.scale + 1.0

    def offsets(self):
        lengths = torch.tensor([0] + [len(bag) for name in self.names for bag in self.bags[name]])
        return lengths.cumsum(0)

    def stride_per_key(self):
        return [len(self.bags[name]) for name in self.names]

    def variable_stride_per_key(self):
        return len(set(self.stride_per_key())) > 1

    def inverse_indices_or_none(self):
        return None if self.inverse is None else (self.names, self.inverse)

    def permute(self, order):
        return Batch([self.names[i] for i in order], self.bags, self.scale)

    def to_dict(self):
        return {
            name: Part(torch.tensor([i for bag in bags for i in bag]), bags)
            for name, bags in self.bags.items()
        }


@dataclass
class Part:
    ids: Tensor
    bags: list

    def values(self):
        return self.ids

    def lengths(self):
        return torch.tensor([len(bag) for bag in self.bags])


BAGS = {"a": [[1, 2], [], [3]], "b": [[4], [0, 0], [1, 2, 3]], "c": [[8], [7], [6, 5]], "d": [[0], [0], [0]]}


def batch(*names, **options):
    return Batch(list(names), BAGS, **options)


def pooled(table: Tensor, bags, mode="SUM", scale=None) -> Tensor:
    rows = []
    for bag in bags:
        weights = torch.ones(len(bag)) if scale is None else torch.tensor(bag) * scale + 1.0
        row = (table[bag] * weights[:, None]).sum(0)
        rows.append(row / max(len(bag), 1) if mode == "MEAN" else row)
    return torch.stack(rows)


def configs():
    return [
        Config("t1", 9, 4, ["a", "b"]),
        Config("t2", 9, 6, ["c"], "MEAN"),
        Config("t3", 9, 4, ["a"]),
    ]


@pytest.mark.parametrize("names", ["abcd", "dcba"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_tables_by_name(names, scale):
    torch.manual_seed(0)
    tables = configs()
    collection = EmbeddingBagCollection(tables, is_weighted=scale is not None)
    assert collection.embedding_bag_configs() == tables
    assert collection.is_weighted() == (scale is not None)
    assert sorted(collection.state_dict()) == [f"embedding_bags.t{i}.weight" for i in (1, 2, 3)]
    out = collection(batch(*names, scale=scale))
    assert isinstance(out, KeyedTensor)
    assert out.keys() == ["a@t1", "b", "c", "a@t3"]
    assert (out.length_per_key(), out.offset_per_key()) == ([4, 4, 6, 4], [0, 4, 8, 14, 18])
    weight = {name: module.weight for name, module in collection.embedding_bags.items()}
    for name, table, mode in (
        ("a@t1", "t1", "SUM"),
        ("b", "t1", "SUM"),
        ("c", "t2", "MEAN"),
        ("a@t3", "t3", "SUM"),
    ):
        expected = pooled(weight[table], BAGS[name[0]], mode, scale)
        torch.testing.assert_close(out[name], expected)
        torch.testing.assert_close(out.to_dict()[name], expected)
    out.values().sum().backward()
    assert all(parameter.grad is not None for parameter in collection.parameters())


def test_representations_by_table():
    torch.manual_seed(0)
    collection = EmbeddingBagCollection(configs(), representation={"t1": SMALL, "t2": "low_rank"})
    keys = set(collection.state_dict())
    assert {
        "embedding_bags.t1.coefficients",
        "embedding_bags.t2.rows.weight",
        "embedding_bags.t3.weight",
    } <= keys
    out = collection(batch("c", "b", "a"))
    hashed = collection.embedding_bags["t1"].materialize(9)
    low = collection.embedding_bags["t2"]
    torch.testing.assert_close(out["b"], pooled(hashed, BAGS["b"]))
    torch.testing.assert_close(out["c"], pooled(low.projection(low.rows.weight), BAGS["c"], "MEAN"))
    out.values().square().sum().backward()
    assert all(parameter.grad is not None for parameter in collection.parameters())
    by_function = EmbeddingBagCollection(
        configs(), representation=lambda c: "dhe" if c.name == "t1" else "table"
    )
    assert "embedding_bags.t1.decoder.0.weight" in by_function.state_dict()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_give_the_same(copied):
    torch.manual_seed(0)
    representation = {"t1": SMALL, "t2": "low_rank"}
    pooled_, rows = EmbeddingBagCollection(configs(), representation=representation), configs()[:1]
    unpooled = EmbeddingCollection(rows)
    features = batch("a", "b", "c")
    twin = copied(pooled_)
    assert torch.equal(twin(features).values(), pooled_(features).values())
    assert torch.equal(copied(unpooled)(features)["a"].values(), unpooled(features)["a"].values())
    for part in PARTS:
        assert copied(part) is part
    twin.embedding_bags["t3"].weight.data.zero_()
    assert not torch.equal(twin(features).values(), pooled_(features).values())


def test_a_shared_table_takes_one_step():
    torch.manual_seed(0)
    collection = EmbeddingBagCollection([Config("t", 9, 4, ["a", "b"])])
    weight = collection.embedding_bags["t"].weight
    twin = weight.detach().clone().requires_grad_()
    optimizer = mprec.optim.Adagrad([weight], lr=0.1)
    collection(batch("a", "b")).values().square().sum().backward()
    assert optimizer.state[weight]["step"] == 1
    theirs = torch.optim.Adagrad([twin], lr=0.1)
    (pooled(twin, BAGS["a"]).square().sum() + pooled(twin, BAGS["b"]).square().sum()).backward()
    theirs.step()
    torch.testing.assert_close(weight, twin)


def test_batches_of_different_sizes_are_expanded():
    torch.manual_seed(0)
    collection = EmbeddingBagCollection([Config("t1", 9, 4, ["a"]), Config("t2", 9, 4, ["b"])])
    bags = {"a": [[1, 2], [], [3]], "b": [[4, 5]]}
    inverse = torch.tensor([[0, 1, 2], [0, 0, 0]])
    out = collection(Batch(["a", "b"], bags, inverse=inverse))
    torch.testing.assert_close(out["a"], pooled(collection.embedding_bags["t1"].weight, bags["a"]))
    torch.testing.assert_close(out["b"], pooled(collection.embedding_bags["t2"].weight, bags["b"] * 3))
    with pytest.raises(ValueError, match=r"different sizes, \[3, 1\], without inverse indices"):
        collection(Batch(["a", "b"], bags))


def test_what_is_refused():
    with pytest.raises(ValueError, match="tables: expected at least one"):
        EmbeddingBagCollection([])
    with pytest.raises(ValueError, match="names must differ, got 't' more than once"):
        EmbeddingBagCollection([Config("t", 9, 4), Config("t", 9, 4)])
    with pytest.raises(ValueError, match="'t': data_type: expected one of FP32, FP16, BF16, got INT8"):
        EmbeddingBagCollection([Config("t", 9, 4, data_type="INT8")])
    with pytest.raises(ValueError, match="'t': expected table, dhe or low_rank, got 'hybrid'"):
        EmbeddingBagCollection([Config("t", 9, 4)], representation="hybrid")
    with pytest.raises(KeyError, match="no table 'u'; there are t"):
        EmbeddingBagCollection([Config("t", 9, 4)], representation={"u": "dhe"})
    collection = EmbeddingBagCollection([Config("t", 9, 4, ["a"])])
    with pytest.raises(KeyError, match="the batch has no feature 'a'; it has b"):
        collection(batch("b"))
    with pytest.raises(TypeError, match="expected a KeyedJaggedTensor"):
        collection(torch.tensor([1]))
    with pytest.raises(IdOutOfRangeError, match="9"):
        collection(Batch(["a"], {"a": [[9]]}))
    with pytest.raises(ValueError, match="expected weights, as is_weighted says"):
        EmbeddingBagCollection([Config("t", 9, 4, ["a"])], is_weighted=True)(batch("a"))


def test_data_types_and_initialisation():
    collection = EmbeddingBagCollection(
        [
            Config("half", 9, 4, ["a"], data_type="FP16"),
            Config("short", 9, 4, ["b"], data_type="BF16"),
            Config("ones", 9, 4, ["c"], init_fn=torch.nn.init.ones_),
        ]
    )
    dtypes = [m.weight.dtype for m in collection.embedding_bags.values()]
    assert dtypes == [torch.float16, torch.bfloat16, torch.float32]
    assert collection.embedding_bags["ones"].weight.eq(1).all()
    out = collection(batch("a", "b", "c"))
    assert out.values().dtype == torch.float32
    torch.testing.assert_close(
        out["a"], pooled(collection.embedding_bags["half"].weight.float(), BAGS["a"]), atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("representation", ["table", SMALL, "low_rank"])
def test_unpooled(representation):
    torch.manual_seed(0)
    tables = [Config("t1", 9, 4, ["a", "b"]), Config("t2", 9, 4, ["c"])]
    collection = EmbeddingCollection(tables, need_indices=True, representation=representation)
    assert (collection.embedding_dim(), collection.need_indices()) == (4, True)
    assert collection.embedding_configs() == tables
    assert collection.embedding_names_by_table() == [["a", "b"], ["c"]]
    out = collection(batch("c", "b", "a"))
    assert list(out) == ["a", "b", "c"]
    for name, table in (("a", "t1"), ("b", "t1"), ("c", "t2")):
        ids = torch.tensor([i for bag in BAGS[name] for i in bag])
        torch.testing.assert_close(out[name].values(), collection.embeddings[table].weight[ids])
        assert torch.equal(out[name].weights(), ids)
        assert out[name].lengths().tolist() == [len(bag) for bag in BAGS[name]]
        assert out[name].offsets()[-1] == len(ids)
    with pytest.raises(ValueError, match="'t2' has embedding_dim 5, expected 4 as of 't1'"):
        EmbeddingCollection([Config("t1", 9, 4), Config("t2", 9, 5)])


def test_every_collection_takes_keyed_batches():
    torch.manual_seed(0)
    features = [nn.FeatureConfig("a", 9, 4), nn.FeatureConfig("b", 9, 6, "hybrid", dhe=SMALL)]
    plain = nn.EmbeddingBagCollection(features)
    ordered = batch("a", "b")
    expected = plain(ordered.values(), ordered.offsets())
    tables = nn.EmbeddingBagCollection([nn.FeatureConfig("a", 9, 4), nn.FeatureConfig("b", 9, 4)])
    low = {name: nn.LowRankTable(torch.randn(9, 2), torch.randn(2, 4), torch.zeros(4)) for name in "ab"}
    for collection in (
        plain,
        nn.MappedEmbeddingBagCollection(plain),
        nn.QuantizedEmbeddingBagCollection(plain, tables="float32"),
        nn.MeanForUnseen(plain, {"a": torch.arange(9)}),
        nn.LowRankEmbeddingBagCollection(tables.features, low),
    ):
        out = collection(batch("d", "b", "c", "a"))
        assert out.keys() == ["a", "b"]
        if collection.output_dims == [4, 12]:
            assert out.length_per_key() == [4, 12]
            torch.testing.assert_close(out.values(), expected)
        else:
            torch.testing.assert_close(out["a"], pooled(collection.rows("a"), BAGS["a"]))
    with pytest.raises(ValueError, match="batches of different sizes"):
        plain(Batch(["a", "b"], {"a": [[1], [2]], "b": [[1]]}))
    with pytest.raises(
        TypeError, match=r"expected FeatureConfigs, got Config; TorchRec's are for mprec\.nn\.torchrec"
    ):
        nn.EmbeddingBagCollection([Config("t", 9, 4)])
    with pytest.raises(
        TypeError, match="expected a KeyedJaggedTensor, Bags, or indices with offsets, got Tensor alone"
    ):
        plain(torch.tensor([1]))


def test_decoders_with_hooks_are_called():
    module = EmbeddingBagCollection([Config("t", 50, 4, ["a"])], representation="dhe")
    batch, bag = Batch(["a"], {"a": [[1, 2], [], [3]]}), module.embedding_bags["t"]
    before = module(batch).values()
    bag.decoder[0].register_forward_hook(lambda layer, inputs, output: 2 * output)
    rows = bag.materialize(50)
    expected = torch.stack([rows[1] + rows[2], torch.zeros(4), rows[3]])
    torch.testing.assert_close(module(batch).values(), expected)
    assert not torch.allclose(before, expected)
