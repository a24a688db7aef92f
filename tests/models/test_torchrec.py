"""The collections of mprec.nn.torchrec against TorchRec's own, and in its DLRM."""

import copy

import pytest
import torch

import mprec.optim
from mprec.nn import DheConfig, swap
from mprec.nn import torchrec as ours

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
theirs = pytest.importorskip("torchrec", exc_type=ImportError)
dlrm = pytest.importorskip("torchrec.models.dlrm", exc_type=ImportError)


def tables(pooling="SUM", dim=4):
    kind = theirs.PoolingType[pooling]
    return [
        theirs.EmbeddingBagConfig(
            name="t1", embedding_dim=dim, num_embeddings=10, feature_names=["f1", "f2"], pooling=kind
        ),
        theirs.EmbeddingBagConfig(name="t2", embedding_dim=dim, num_embeddings=20, feature_names=["f3"]),
    ]


def batch(*keys, weighted=False):
    bags = {"f1": [[1, 2], [], [9]], "f2": [[3], [0, 0], [1, 2, 4]], "f3": [[19], [7], [6, 5]]}
    values = torch.tensor([i for key in keys for bag in bags[key] for i in bag])
    lengths = torch.tensor([len(bag) for key in keys for bag in bags[key]])
    weights = values / 7 + 0.5 if weighted else None
    return theirs.KeyedJaggedTensor.from_lengths_sync(list(keys), values, lengths, weights)


@pytest.mark.parametrize("keys", [("f1", "f2", "f3"), ("f3", "f1", "f2")])
@pytest.mark.parametrize(("pooling", "weighted"), [("SUM", False), ("MEAN", False), ("SUM", True)])
def test_equal_outputs_and_state_dicts_both_ways(keys, pooling, weighted):
    a = theirs.EmbeddingBagCollection(tables=tables(pooling), is_weighted=weighted)
    b = ours.EmbeddingBagCollection(tables=a.embedding_bag_configs(), is_weighted=weighted)
    b.load_state_dict(a.state_dict())
    a.load_state_dict(b.state_dict())
    features = batch(*keys, weighted=weighted)
    expected, got = a(features), b(features)
    assert isinstance(got, theirs.KeyedTensor)
    assert (got.keys(), got.length_per_key()) == (expected.keys(), expected.length_per_key())
    torch.testing.assert_close(got.values(), expected.values())
    for c in (a, b):
        c(features).values().square().sum().backward()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


def test_variable_batches():
    a = theirs.EmbeddingBagCollection(tables=tables())
    b = ours.EmbeddingBagCollection(tables=tables())
    b.load_state_dict(a.state_dict())
    features = theirs.KeyedJaggedTensor(
        keys=["f1", "f2", "f3"],
        values=torch.tensor([1, 2, 3, 4, 5, 6]),
        lengths=torch.tensor([2, 0, 1, 1, 2]),
        stride_per_key_per_rank=[[3], [1], [1]],
        inverse_indices=(["f1", "f2", "f3"], torch.tensor([[2, 0, 1], [0, 0, 0], [0, 0, 0]])),
    )
    torch.testing.assert_close(b(features).values(), a(features).values())


def test_unpooled():
    config = theirs.EmbeddingConfig(name="t1", embedding_dim=4, num_embeddings=20, feature_names=["f1", "f3"])
    a, b = theirs.EmbeddingCollection(tables=[config]), ours.EmbeddingCollection(tables=[config])
    b.load_state_dict(a.state_dict())
    a.load_state_dict(b.state_dict())
    expected, got = a(batch("f3", "f1")), b(batch("f3", "f1"))
    assert list(got) == list(expected)
    for name, part in got.items():
        assert isinstance(part, theirs.JaggedTensor)
        assert torch.equal(part.values(), expected[name].values())
        assert torch.equal(part.lengths(), expected[name].lengths())


def model_of(collection):
    return dlrm.DLRM(collection, 3, dense_arch_layer_sizes=[8, 4], over_arch_layer_sizes=[8, 1])


def test_dlrm_gives_the_same():
    torch.manual_seed(0)
    a = model_of(theirs.EmbeddingBagCollection(tables=tables()))
    b = model_of(ours.EmbeddingBagCollection(tables=tables()))
    b.load_state_dict(a.state_dict())
    dense, features = torch.randn(3, 3), batch("f2", "f3", "f1")
    torch.testing.assert_close(b(dense, features), a(dense, features))


def test_a_swapped_model_is_still_torchrecs():
    """Its bags become mprec's, its collection stays: TorchRec's tools find it, with kernels of their own."""
    quantisation = pytest.importorskip("torchrec.quant.embedding_modules", exc_type=ImportError)
    modules = pytest.importorskip("torchrec.inference.modules", exc_type=ImportError)
    optim = pytest.importorskip("torchrec.optim", exc_type=ImportError)
    torch.manual_seed(0)
    model = model_of(theirs.EmbeddingBagCollection(tables=tables())).eval()
    dense, features = torch.randn(3, 3), batch("f1", "f2", "f3")
    before, state = model(dense, features), copy.deepcopy(model.state_dict())
    report = swap(model)
    assert len(report.replaced) == 2
    torch.testing.assert_close(model(dense, features), before)
    model.load_state_dict(state)
    collection = model.sparse_arch.embedding_bag_collection
    assert type(collection) is theirs.EmbeddingBagCollection
    with torch.no_grad():
        collection.qconfig = torch.ao.quantization.QConfig(
            activation=torch.ao.quantization.PlaceholderObserver.with_args(dtype=torch.float),
            weight=torch.ao.quantization.PlaceholderObserver.with_args(dtype=torch.qint8),
        )
        alone = quantisation.EmbeddingBagCollection.from_float(collection)
        torch.testing.assert_close(alone(features).values(), collection(features).values(), atol=0.01, rtol=0)
        whole = modules.quantize_inference_model(copy.deepcopy(model))
        torch.testing.assert_close(whole(dense, features), before, atol=0.05, rtol=0)
    optim.apply_optimizer_in_backward(torch.optim.SGD, collection.parameters(), {"lr": 0.1})
    weight = collection.embedding_bags["t2"].weight
    start = weight.detach().clone()
    collection(features).values().sum().backward()
    torch.testing.assert_close(
        weight, start - 0.1 * torch.bincount(torch.tensor([19, 7, 6, 5]), minlength=20)[:, None]
    )


def test_torchrecs_quantisation_is_for_its_own_collection():
    """It looks for exactly that class: ours stays in float32, as its docstring says. Weights go there."""
    modules = pytest.importorskip("torchrec.inference.modules", exc_type=ImportError)
    torch.manual_seed(0)
    model = model_of(ours.EmbeddingBagCollection(tables=tables())).eval()
    dense, features = torch.randn(3, 3), batch("f1", "f2", "f3")
    with torch.no_grad():
        before = model(dense, features)
        left = modules.quantize_inference_model(copy.deepcopy(model))
        assert isinstance(left.sparse_arch.embedding_bag_collection, ours.EmbeddingBagCollection)
        assert torch.equal(left(dense, features), before)
        twin = model_of(theirs.EmbeddingBagCollection(tables=tables())).eval()
        twin.load_state_dict(model.state_dict())
        quantized = modules.quantize_inference_model(twin)
        out = quantized(dense, features)
    assert not torch.equal(out, before)
    torch.testing.assert_close(out, before, atol=0.05, rtol=0)


@pytest.mark.parametrize("representation", ["table", DheConfig(k=16, hidden=(8,)), "low_rank"])
@pytest.mark.parametrize("fused", [False, True])
def test_dlrm_trains(representation, fused):
    torch.manual_seed(0)
    model = model_of(ours.EmbeddingBagCollection(tables=tables(), representation=representation))
    dense, features, labels = torch.randn(3, 3), batch("f1", "f2", "f3"), torch.tensor([0.0, 1.0, 1.0])
    owned, rest = mprec.optim.split_parameters(model)
    optimizers = [torch.optim.Adam(rest if fused else model.parameters(), lr=0.01)]
    if fused and owned:
        optimizers.append(mprec.optim.RowWiseAdagrad(owned, lr=0.1))
    losses = []
    for _ in range(4):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(dense, features)[:, 0], labels)
        losses.append(loss.item())
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
    assert losses[-1] < losses[0]
