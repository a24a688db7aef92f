"""Models that no one here wrote, with their embeddings swapped: the same outputs, and they train.

The libraries are in requirements.txt beside this file; what is not installed is skipped.
"""

import copy
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import nn

import mprec.optim
from mprec.nn import DheConfig, embed_together, swap

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SMALL = DheConfig(k=16, hidden=(8,))
BATCH = 6


def ids(bound, *shape):
    return torch.randint(bound, (BATCH, *shape))


def deepctr(name):
    models = pytest.importorskip("deepctr_torch.models", exc_type=ImportError)
    from deepctr_torch.inputs import DenseFeat, SparseFeat, VarLenSparseFeat

    fields = [SparseFeat("a", 20, embedding_dim=4), SparseFeat("b", 30, embedding_dim=4)]
    if name == "DIN":
        history = SparseFeat("hist_a", 20, embedding_dim=4, embedding_name="a")
        columns = [*fields, VarLenSparseFeat(history, maxlen=3, length_name="length"), DenseFeat("x", 1)]
        model = models.DIN(columns, ["a"], dnn_hidden_units=(8,))
        inputs = {"a": ids(20), "b": ids(30), "hist_a": ids(20, 3), "length": ids(3) + 1, "x": ids(9)}
        width = sum(stop - start for start, stop in model.feature_index.values())
        batch = torch.zeros(BATCH, width)
        for key, (start, stop) in model.feature_index.items():
            batch[:, start:stop] = inputs[key].view(BATCH, -1)
    else:
        model = getattr(models, name)([*fields, DenseFeat("x", 1)], [*fields, DenseFeat("x", 1)])
        batch = torch.stack([ids(20), ids(30), ids(9)], 1).float()
    return model, lambda m: m(batch)


def rechub(name):
    pytest.importorskip("torch_rechub", exc_type=ImportError)
    from torch_rechub.basic.features import SparseFeature
    from torch_rechub.models import ranking

    features = [SparseFeature("a", 20, embed_dim=4), SparseFeature("b", 30, embed_dim=4)]
    mlp = {"dims": [8], "dropout": 0.0, "activation": "relu"}
    if name == "DeepFM":
        model = ranking.DeepFM(features, features, mlp)
    else:
        model = ranking.DCN(features, 2, mlp)
    batch = {"a": ids(20), "b": ids(30)}
    return model, lambda m: m(batch)


def torchfm(name):
    pytest.importorskip("torchfm", exc_type=ImportError)
    from torchfm.model import dcn, dfm

    if name == "DeepFM":
        model = dfm.DeepFactorizationMachineModel([20, 30], 4, (8,), 0.0)
    else:
        model = dcn.DeepCrossNetworkModel([20, 30], 4, 2, (8,), 0.0)
    for module in model.modules():  # they keep them in an array of a type that NumPy 2 no longer has
        if hasattr(module, "offsets"):
            module.offsets = np.array(module.offsets, dtype=np.int64)
    batch = torch.stack([ids(20), ids(30)], 1)
    return model, lambda m: m(batch)


def pytorch_tabular(name):
    layers = pytest.importorskip("pytorch_tabular.models.common.layers", exc_type=ImportError)
    layer = layers.Embedding1dLayer(1, [(20, 4), (30, 5)])
    batch = {"continuous": torch.randn(BATCH, 1), "categorical": torch.stack([ids(20), ids(30)], 1)}
    return layer, lambda m: m(batch)


def pytorch_frame(name):
    frame = pytest.importorskip("torch_frame", exc_type=ImportError)
    from torch_frame.data import MultiNestedTensor
    from torch_frame.data.stats import StatType
    from torch_frame.nn import encoder

    def stats(kind, counts):
        return [{kind: (list(range(n)), [1] * n)} for n in counts]

    if name == "EmbeddingEncoder":
        model = encoder.EmbeddingEncoder(4, stats(StatType.COUNT, [20, 30]), frame.categorical)
        batch = torch.stack([ids(20), ids(30)], 1)
    else:
        kind = frame.multicategorical
        model = encoder.MultiCategoricalEmbeddingEncoder(4, stats(StatType.MULTI_COUNT, [20, 30]), kind)
        rows = [[[1, 2], [3]], [[], [29, -1]], [[19], [0, 4, 5]]]
        batch = MultiNestedTensor.from_tensor_mat(
            [[torch.tensor(c, dtype=torch.int64) for c in row] for row in rows]
        )
    return model, lambda m: m.encode_forward(batch)


def recbole(name):
    pytest.importorskip("recbole.utils", exc_type=ImportError)
    from recbole.utils import FeatureType

    class Dataset:  # what models ask of recbole's, without its files
        def __init__(self):
            self.field2type = defaultdict(lambda: FeatureType.TOKEN)

        def num(self, field):
            return {"user": 20, "item": 30}[field]

        def fields(self, source=None):
            return ["user", "item"]

    config = defaultdict(lambda: None) | {
        "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "NEG_PREFIX": "neg_", "LIST_SUFFIX": "_list",
        "ITEM_LIST_LENGTH_FIELD": "length", "MAX_ITEM_LIST_LENGTH": 5, "LABEL_FIELD": "label",
        "device": torch.device("cpu"), "embedding_size": 4, "hidden_size": 4, "inner_size": 8, "n_layers": 1,
        "n_heads": 2, "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "hidden_act": "gelu",
        "layer_norm_eps": 1e-6, "initializer_range": 0.02, "loss_type": "CE", "mlp_hidden_size": [8],
        "dropout_prob": 0.0, "numerical_features": [],
    }  # fmt: skip
    batch = {"user": ids(20), "item": ids(30), "neg_item": ids(30), "label": ids(2).float()}
    batch |= {"item_list": ids(30, 5), "length": ids(4) + 1}
    if name == "BPR":
        from recbole.model.general_recommender.bpr import BPR as Model

        call = lambda m: m.full_sort_predict(batch)  # noqa: E731 - reads the item embedding's weight
    elif name == "SASRec":
        from recbole.model.sequential_recommender.sasrec import SASRec as Model

        call = lambda m: m.full_sort_predict(batch)  # noqa: E731
    else:
        from recbole.model.context_aware_recommender.deepfm import DeepFM as Model

        call = lambda m: m(batch)  # noqa: E731
    return Model(config, Dataset()), call


def fuxictr(name):
    pytest.importorskip("fuxictr.pytorch.layers", exc_type=ImportError)
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.layers import FeatureEmbedding

    features = FeatureMap("none", "none")
    for key, size in (("a", 20), ("b", 30)):
        features.features[key] = {"type": "categorical", "source": "", "vocab_size": size, "padding_idx": 0}
    features.features["c"] = {
        "type": "sequence", "source": "", "vocab_size": 20, "padding_idx": 0, "max_len": 3,
        "feature_encoder": "layers.MaskedAveragePooling()",
    }  # fmt: skip
    batch = {"a": ids(20), "b": ids(30), "c": ids(20, 3)}
    return FeatureEmbedding(features, 4), lambda m: m(batch)


#: Library, model, and how many embeddings it has.
CASES = [
    (deepctr, "DeepFM", 4),
    (deepctr, "DCN", 4),
    (deepctr, "DIN", 2),
    (rechub, "DeepFM", 2),
    (rechub, "DCN", 2),
    (torchfm, "DeepFM", 2),
    (torchfm, "DCN", 1),
    (pytorch_tabular, "Embedding1dLayer", 2),
    (pytorch_frame, "EmbeddingEncoder", 1),
    (pytorch_frame, "MultiCategoricalEmbeddingEncoder", 2),
    (recbole, "DeepFM", 2),
    (recbole, "BPR", 2),
    (recbole, "SASRec", 2),
    (fuxictr, "FeatureEmbedding", 3),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].__name__}-{case[1]}")
def case(request):
    torch.manual_seed(0)
    make, name, embeddings = request.param
    model, call = make(name)
    return model, call, embeddings


def steps(model, call, count=3):
    """Losses of steps with Adam towards fixed targets."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(count + 1):
        out = call(model)
        target = torch.linspace(0, 1, out.numel()).view_as(out)
        loss = (out - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def test_tables_give_the_same_and_train_alike(case):
    model, call, embeddings = case
    twin = copy.deepcopy(model)
    model.eval()
    before = call(model)
    state = copy.deepcopy(model.state_dict())
    report = swap(model)
    assert len(report.replaced) == embeddings
    assert report.left == ()
    torch.testing.assert_close(call(model), before)
    model.load_state_dict(state)
    model.train(), twin.train()
    losses = steps(model, call)
    np.testing.assert_allclose(losses, steps(twin, call), rtol=1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("representation", ["dhe", "low_rank"])
def test_other_representations_train(case, representation):
    model, call, embeddings = case
    report = swap(model, representation, dhe=SMALL)
    assert len(report.replaced) == embeddings
    assert not {type(m) for m in model.modules()} & {nn.Embedding, nn.EmbeddingBag}
    losses = steps(model, call)
    assert losses[-1] < losses[0]
    new = [p for name, p in model.named_parameters() if "decoder" in name or "projection" in name]
    assert new
    assert all(p.grad is not None for p in new)


def test_a_loop_over_a_dictionary_is_one_call():
    """As it stands in deepctr's code."""
    model, _ = deepctr("DeepFM")
    swap(model)
    owner = mprec.optim.SGD(model.embedding_dict.parameters())
    batch = torch.stack([ids(20), ids(30), ids(9)], 1).float()
    expected, _ = model.input_from_feature_columns(batch, model.dnn_feature_columns, model.embedding_dict)
    columns = [batch[:, slice(*model.feature_index[name])].long() for name in model.embedding_dict]
    for ours, theirs in zip(embed_together(model.embedding_dict.values(), columns), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert len(owner.state) == 2


def test_a_loop_over_a_list_is_one_call():
    """As it stands in pytorch-tabular's code."""
    layer, _ = pytorch_tabular("Embedding1dLayer")
    swap(layer)
    owner = mprec.optim.SGD(layer.parameters())
    categories = torch.stack([ids(20), ids(30)], 1)
    theirs = layer({"continuous": torch.zeros(BATCH, 1), "categorical": categories})[:, 1:]
    assert torch.equal(torch.cat(embed_together(layer.cat_embedding_layers, categories.unbind(1)), 1), theirs)
    assert len(owner.state) == 2
