"""Modules: a swap for torch's, the collection's configurations, and what modules must survive."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mprec import ops, reference
from mprec.errors import IdOutOfRangeError
from mprec.hashing import coefficients
from mprec.names import MODES
from mprec.nn import (
    DeepHashEmbeddingBag,
    DheConfig,
    EmbeddingBag,
    EmbeddingBagCollection,
    FeatureConfig,
    HybridEmbeddingBag,
    with_representation,
)

torch.set_num_threads(1)
SMALL = DheConfig(k=32, hidden=(12,))
FEATURES = [
    FeatureConfig("user", 50, 4),
    FeatureConfig("type", 7, 3, mode="mean"),  # also the name of a module's method
    FeatureConfig("item", 90, 5),
    FeatureConfig("keys", 11, 4, mode="max"),
]
KINDS = ("table", "dhe", "hybrid", "select")
each_kind = pytest.mark.parametrize("kind", KINDS)


def batch(features, size, seed=0, longest=3, dtype=torch.int64):
    """Feature-major indices and offsets."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (len(features), size), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    ids = [
        torch.randint(0, feature.num_embeddings, (int(count),), generator=g)
        for feature, count in zip(features, lengths.sum(1), strict=True)
    ]
    return torch.cat(ids).to(dtype), offsets.to(dtype)


def expected_output(collection, indices, offsets, psw=None):
    """Feature by feature, from the float64 reference."""
    size = (len(offsets) - 1) // len(collection.features)
    parts = []
    for i, feature in enumerate(collection.features):
        part = offsets[i * size : (i + 1) * size + 1]
        ids, starts = indices[part[0] : part[-1]], part - part[0]
        weights = None if psw is None else psw[part[0] : part[-1]]
        mode = MODES[feature.mode]
        if feature.has_table:
            table = collection.tables[feature.name].weight
            parts.append(reference.embedding_bag(table, ids, starts, mode, weights, True))
        if feature.has_dhe:
            m, c = collection.dhe[feature.name], feature.dhe
            mlp = (m.coefficients, m.weights, m.biases, c.family, c.activation, c.last_activation)
            parts.append(reference.dhe_bag(ids, starts, *mlp, mode, weights, True))
    return torch.cat(parts, dim=1)


# ------------------------------------------------------------------------------------------ EmbeddingBag


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "max_norm": st.sampled_from([0.5, 2.0]),
            "norm_type": st.sampled_from([1.0, 2.0]),
            "scale_grad_by_freq": st.booleans(),
            "mode": st.sampled_from(["sum", "mean"]),
            "sparse": st.booleans(),
            "include_last_offset": st.booleans(),
            "padding_idx": st.integers(-10, 9),
            "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        },
    )
)
def test_embedding_bag_swaps_for_torchs(options):
    torch.manual_seed(0)
    theirs = torch.nn.EmbeddingBag(10, 6, **options)
    torch.manual_seed(0)
    ours = EmbeddingBag(10, 6, **options)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == ["weight"]
    assert torch.equal(ours.weight, theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    offsets = torch.tensor([0, 2, 2, 5]) if options.get("include_last_offset") else torch.tensor([0, 2, 2])
    args = torch.tensor([1, 9, 3, 3, 0]), offsets
    with torch.no_grad():
        torch.testing.assert_close(ours(*args), theirs(*args))
        assert torch.equal(ours.weight, theirs.weight)


def test_from_pretrained():
    table = torch.randn(4, 3)
    ours = EmbeddingBag.from_pretrained(table, mode="sum", padding_idx=1)
    assert isinstance(ours, EmbeddingBag)
    assert not ours.weight.requires_grad
    assert torch.equal(ours(torch.tensor([[0, 1, 2]])), (table[0] + table[2])[None])


# --------------------------------------------------------------------------------------- one deep hash bag


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["universal", "artifact", "artifact_gaussian", "sign", "u7"])
def test_deep_hash_bag(mode, family):
    config = DheConfig(k=32, hidden=(12, 8), family=family, activation="mish", seed=4)
    bag = DeepHashEmbeddingBag(5, config, mode=mode, padding_idx=3)
    ids, offsets = torch.tensor([2**40, 3, 7, 7, 2**33 + 1]), torch.tensor([0, 2, 2])
    mlp = (bag.coefficients, bag.weights, bag.biases, family, "mish", "sigmoid")
    expected = reference.dhe_bag(ids, offsets, *mlp, MODES[mode], padding_idx=3)
    torch.testing.assert_close(bag(ids, offsets).double(), expected, rtol=1e-5, atol=1e-5)
    pairs = bag(torch.tensor([[1, 2], [3, 4]]))
    assert torch.equal(pairs, bag(torch.tensor([1, 2, 3, 4]), torch.tensor([0, 2])))


def test_deep_hash_bag_bound():
    bag = DeepHashEmbeddingBag(4, SMALL, num_embeddings=10)
    with pytest.raises(
        IdOutOfRangeError, match=r"indices\[1\] \(bag 0\) is 10, not in the valid range \[0, 10\)"
    ):
        bag(torch.tensor([1, 10]), torch.tensor([0]))


@torch.no_grad()
def test_deep_hash_bag_bound_on_the_direct_path():
    bag, offsets = DeepHashEmbeddingBag(4, SMALL, num_embeddings=10), torch.tensor([0])
    bag(torch.tensor([0, 9], dtype=torch.int32), offsets)
    for bad, message in (
        ([1, 10], r"indices\[1\] \(bag 0\) is 10, not in the valid range \[0, 10\)"),
        ([2**63 - 1], r"indices\[0\] .* is 9223372036854775807, not in"),
        ([9, -1], r"indices\[1\] .* is -1, not in"),
        ([-(2**63)], r"indices\[0\] .* is -9223372036854775808, not in"),
    ):
        with pytest.raises(IdOutOfRangeError, match=message):
            bag(torch.tensor(bad), offsets)
    bag.num_embeddings = None
    bag(torch.tensor([2**63 - 1]), offsets)


@pytest.mark.parametrize("mode", MODES)
def test_deep_hash_bag_of_rows_is_that_with_offsets(mode):
    bag, ids = DeepHashEmbeddingBag(4, SMALL, mode=mode), torch.arange(6).reshape(3, 2)
    weights = None if mode == "max" else torch.rand(3, 2)
    flat = None if weights is None else weights.reshape(-1)
    expected = bag(ids.reshape(-1), torch.tensor([0, 2, 4]), flat)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(bag(ids, None, weights), expected)
            with pytest.raises(ValueError, match="offsets has to be None"):
                bag(ids, torch.tensor([0]))
            with pytest.raises(ValueError, match="offsets has to be a 1D Tensor"):
                bag(ids.reshape(-1))


def test_materialized_table_is_the_deep_hash_embedding():
    bag = DeepHashEmbeddingBag(4, SMALL, num_embeddings=100)
    table = bag.materialize(chunk=33)
    assert table.shape == (100, 4)
    assert not table.requires_grad
    ids = torch.arange(100)
    torch.testing.assert_close(table, bag(ids, ids).detach())


def test_hybrid_bag_is_both_side_by_side():
    bag = HybridEmbeddingBag(20, 4, SMALL, mode="mean", padding_idx=-1)
    ids, offsets = torch.tensor([1, 19, 5, 2]), torch.tensor([0, 3])
    out = bag(ids, offsets)
    assert out.shape == (2, 8)
    assert torch.equal(out, torch.cat([bag.table(ids, offsets), bag.dhe(ids, offsets)], 1))
    with pytest.raises(IdOutOfRangeError):
        bag(torch.tensor([20]), torch.tensor([0]))


# -------------------------------------------------------------------------------------------- collection


@each_kind
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_collection_against_the_reference(kind, weighted, id_dtype):
    features = [f for f in FEATURES if not (weighted and f.mode == "max")]
    collection = EmbeddingBagCollection(with_representation(features, kind, SMALL))
    assert sum(collection.output_dims) == sum(f.output_dim for f in collection.features)
    for size in (1, 5):
        indices, offsets = batch(features, size, seed=size, dtype=id_dtype)
        psw = torch.rand(len(indices)) if weighted else None
        expected = expected_output(collection, indices, offsets, psw)
        out = collection(indices, offsets, psw)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
        parameters = list(collection.parameters())
        weight = torch.randn_like(expected)
        got = torch.autograd.grad((out * weight).sum(), parameters)
        for a, b in zip(got, torch.autograd.grad((expected * weight).sum(), parameters), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(collection(indices, offsets, psw), out)
        with torch.inference_mode():
            torch.testing.assert_close(collection(indices, offsets, psw), out)


def test_four_configurations():
    kinds = {k: [f.representation for f in with_representation(FEATURES, k, SMALL)] for k in KINDS}
    assert kinds["select"] == ["dhe", "table", "dhe", "table"]  # the two largest
    assert {k: set(v) for k, v in kinds.items() if k != "select"} == {k: {k} for k in KINDS[:3]}
    assert [f.dhe for f in with_representation(FEATURES, "table", SMALL)] == [None] * 4
    for feature in with_representation(FEATURES, "hybrid", SMALL):
        assert FeatureConfig.from_dict(feature.to_dict()) == feature


@each_kind
def test_parameter_counts(kind):
    features = with_representation(FEATURES, kind, SMALL)
    collection = EmbeddingBagCollection(features)
    trained = sum(p.numel() for p in collection.parameters())
    assert trained == sum(f.num_parameters() for f in features)
    assert f"{trained:,} parameters" in repr(collection)


def test_state_dict_keys():
    collection = EmbeddingBagCollection(with_representation(FEATURES[:1], "hybrid", SMALL))
    assert list(collection.state_dict()) == [
        "tables.user.weight",
        "dhe.user.coefficients",
        "dhe.user.decoder.0.weight",
        "dhe.user.decoder.0.bias",
        "dhe.user.decoder.1.weight",
        "dhe.user.decoder.1.bias",
    ]


@each_kind
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_give_the_same_output(kind, how):
    collection = EmbeddingBagCollection(with_representation(FEATURES, kind, SMALL))
    call = batch(FEATURES, 4)
    with torch.no_grad():
        out = collection(*call)  # packs decoders, which must not get in the way
    if how == "deepcopy":
        twin = copy.deepcopy(collection)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(collection))
    else:
        twin = EmbeddingBagCollection(with_representation(FEATURES, kind, SMALL))
        file = io.BytesIO()
        torch.save(collection.state_dict(), file)
        file.seek(0)
        with torch.no_grad():
            twin(*call)  # packed from other weights
        twin.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert torch.equal(twin(*call), out)
        for parameter in twin.parameters():
            parameter.zero_()
        assert not torch.equal(twin(*call), out)
        assert torch.equal(collection(*call), out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_collection_in_other_dtypes(dtype):
    collection = EmbeddingBagCollection(with_representation(FEATURES, "hybrid", SMALL)).to(dtype)
    assert collection.dhe["user"].coefficients.dtype == torch.int32
    call = batch(FEATURES, 4)
    with torch.no_grad():
        out = collection(*call)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected_output(collection, *call).to(dtype))


def test_sparse_gradients():
    collection = EmbeddingBagCollection(FEATURES[:3], sparse=True)
    collection(*batch(FEATURES[:3], 4)).sum().backward()
    sparse = [p.grad for p in collection.parameters()]
    assert all(g.is_sparse for g in sparse)
    dense = EmbeddingBagCollection(FEATURES[:3])
    dense.load_state_dict(collection.state_dict())
    dense(*batch(FEATURES[:3], 4)).sum().backward()
    for a, b in zip(sparse, dense.parameters(), strict=True):
        torch.testing.assert_close(a.to_dense(), b.grad)


def test_training_step_changes_what_is_served():
    collection = EmbeddingBagCollection(with_representation(FEATURES, "hybrid", SMALL))
    optimizer = torch.optim.Adam(collection.parameters(), lr=0.1)
    call = batch(FEATURES, 6)
    for _ in range(3):
        loss = collection(*call).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            expected = expected_output(collection, *call)
            torch.testing.assert_close(collection(*call).double(), expected, rtol=1e-4, atol=1e-5)


def test_serving_follows_every_way_to_change_a_decoder():
    collection = EmbeddingBagCollection(with_representation(FEATURES, "dhe", SMALL)).requires_grad_(False)
    call = batch(FEATURES, 4)
    dhe = collection.dhe["user"]

    def replace_layer():
        dhe.decoder[0] = torch.nn.Linear(32, 12)

    def replace_module():
        collection.dhe._modules["user"] = DeepHashEmbeddingBag(4, DheConfig(32, (12,), seed=9))

    def behind_the_counter():
        collection.dhe["item"].decoder[1].weight.data.mul_(3)

    changes = [
        lambda: None,
        lambda: dhe.decoder[1].bias.add_(1),
        lambda: dhe.coefficients.copy_(coefficients(32, seed=5)),
        lambda: setattr(dhe.decoder[0], "weight", torch.nn.Parameter(torch.randn(12, 32))),
        lambda: setattr(dhe.decoder[0].weight, "data", torch.randn(12, 32)),
        lambda: collection.load_state_dict(
            {k: v.clone() for k, v in collection.state_dict().items()}, assign=True
        ),
        replace_layer,
        replace_module,
        behind_the_counter,
        lambda: collection.to(torch.float64),
        lambda: collection.to(torch.float32),
    ]
    with torch.no_grad():
        before = None
        for number, change in enumerate(changes):
            change()
            out = collection(*call)
            torch.testing.assert_close(out.double(), expected_output(collection, *call), rtol=1e-5, atol=1e-5)
            if number in (1, 2, 3, 4, 6, 7, 8):
                assert not torch.equal(out, before)
            before = out


def test_one_module_follows_every_way_to_change_it():
    module = DeepHashEmbeddingBag(8, DheConfig(32, (12,), last_activation="none"))
    ids, offsets = torch.arange(5), torch.arange(5)

    def swap_and_back():  # new storage might take the address of the old
        for _ in range(2):
            module.decoder[0].weight.data = torch.randn(12, 32)

    def append():
        module.config = DheConfig(32, (12, 8), last_activation="none")
        module.decoder.append(torch.nn.Linear(8, 8))

    def behind_the_counter():
        module.decoder[1].weight.data.mul_(3)

    def one_value_behind_the_counter():
        module.decoder[0].bias.data[1] += 1
        ops.clear_decoders()

    changes = [
        lambda: None,
        lambda: module.decoder[1].bias.add_(1),
        lambda: module.coefficients.copy_(coefficients(32, seed=5)),
        lambda: setattr(module.decoder[0], "weight", torch.nn.Parameter(torch.randn(12, 32))),
        swap_and_back,
        lambda: setattr(module, "config", DheConfig(32, (12,), last_activation="sigmoid")),
        lambda: module.decoder.__setitem__(0, torch.nn.Linear(32, 12)),
        append,
        behind_the_counter,
        one_value_behind_the_counter,
        lambda: torch.nn.utils.parametrizations.weight_norm(module.decoder[0]),
        lambda: module.decoder[0].parametrizations.weight.original0.mul_(2),
    ]
    with torch.no_grad():
        before = module(ids, offsets)
        for number, change in enumerate(changes):
            change()
            c = module.config
            expected = reference.dhe(ids, *module.stack(), c.family, c.activation, c.last_activation)
            for _ in range(2):  # packed, then kept
                out = module(ids, offsets)
                torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(out, before) == (number == 0)
            before = out
            assert torch.equal(copy.deepcopy(module)(ids, offsets), out)


def test_a_transposed_weight_is_another_weight():
    hashes = coefficients(16)
    weights, biases = [torch.randn(16, 16), torch.randn(16, 16)], [torch.zeros(16)] * 2
    with torch.no_grad():
        for pair in (weights, [weights[0], weights[1].t()], [weights[0].t(), weights[1]]):
            out = ops.dhe_bag(torch.arange(3), torch.arange(3), hashes, pair, biases)
            expected = reference.dhe(torch.arange(3), hashes, pair, biases, "universal", "relu", "sigmoid")
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_results_are_float32_whatever_the_default_dtype():
    module, ids = DeepHashEmbeddingBag(8, DheConfig(32, (12,))), torch.arange(5)
    with torch.no_grad():
        expected = module(ids, ids)
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.equal(module(ids, ids), expected)
        finally:
            torch.set_default_dtype(torch.float32)


def test_serving_follows_every_way_to_change_a_table():
    collection = EmbeddingBagCollection(FEATURES)
    indices, offsets = batch(FEATURES, 6)

    def served():
        with torch.no_grad():
            out = collection(indices, offsets)
        expected = expected_output(collection, indices, offsets)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
        return out

    def changed(step):
        before = served()
        step()
        assert not torch.equal(served(), before)

    def fresh(name="user"):
        return torch.randn_like(collection.tables[name].weight)

    table = collection.tables["user"]
    copied = copy.deepcopy(collection)
    first = served()
    changed(lambda: setattr(table.weight, "data", fresh()))
    changed(lambda: collection.load_state_dict({"tables.user.weight": fresh()}, strict=False, assign=True))
    changed(lambda: setattr(table, "weight", torch.nn.Parameter(fresh())))
    changed(lambda: collection.tables.update({"user": EmbeddingBag(50, 4, mode="sum")}))
    changed(lambda: collection.tables._modules.update(keys=EmbeddingBag(11, 4, mode="max")))
    with torch.no_grad():
        assert torch.equal(copied(indices, offsets), first)
    changed(lambda: collection.to(torch.bfloat16).to(torch.float32))
    collection.tables["user"].to(torch.float64)
    with pytest.raises(TypeError, match="expected"):
        served()


def test_results_into_a_given_tensor():
    indices, offsets = batch(FEATURES, 6)
    for kind in KINDS:
        collection = EmbeddingBagCollection(with_representation(FEATURES, kind, dhe=SMALL))
        expected = collection(indices, offsets).detach()
        out = torch.full_like(expected, torch.nan)
        with torch.no_grad():
            assert collection(indices, offsets, out=out) is out
            assert torch.equal(out, expected)
            for like, error in ((out[1:], ValueError), (out[:, 1:], ValueError), (out.half(), TypeError)):
                with pytest.raises(error, match="out: expected"):
                    collection(indices, offsets, out=like)
        with pytest.raises(RuntimeError, match="out: does not support gradients"):
            collection(indices, offsets, out=out)
    bag = EmbeddingBag(90, 5, mode="sum")
    ids, starts = torch.tensor([1, 89, 3]), torch.tensor([0, 2])
    out = torch.empty(2, 5)
    with torch.no_grad():
        assert bag(ids, starts, out=out) is out
        assert torch.equal(out, bag(ids, starts))
        assert bag(ids[None], out=out[:1]).data_ptr() == out.data_ptr()
        assert torch.equal(out[:1], bag(ids[None]))
        assert ops.embedding_bag_multi([bag.weight], ids, torch.tensor([0, 1, 3]), out=out) is out
        with pytest.raises(ValueError, match=r"out: expected shape \(2, 5\), got \(3, 5\)"):
            bag(ids, starts, out=torch.empty(3, 5))
    with pytest.raises(RuntimeError, match="out: does not support gradients"):
        bag(ids, starts, out=out)


def test_serving_decoders_made_in_inference_mode():
    with torch.inference_mode():
        collection = EmbeddingBagCollection(with_representation(FEATURES, "dhe", SMALL))
        call = batch(FEATURES, 4)
        for _ in range(2):
            expected = expected_output(collection, *call)
            torch.testing.assert_close(collection(*call).double(), expected, rtol=1e-5, atol=1e-5)
            collection.dhe["user"].decoder[1].bias.add_(1)  # no version counter tells


@each_kind
def test_compile(kind):
    collection = EmbeddingBagCollection(with_representation(FEATURES, kind, SMALL))
    compiled = torch.compile(collection, fullgraph=True, dynamic=True)
    for size in (3, 7):
        call = batch(FEATURES, size)
        torch.testing.assert_close(compiled(*call), collection(*call))


@each_kind
def test_export(kind):
    # torch.export reaches submodules by getattr, so names of Module's own methods are out here.
    features = [dataclasses.replace(f, name=f"{f.name}_id") for f in FEATURES]
    collection = EmbeddingBagCollection(with_representation(features, kind, SMALL)).eval()
    size = torch.export.Dim("n", min=2, max=10_000)
    bags = torch.export.Dim("b", min=2, max=1000)
    with torch.no_grad():
        program = torch.export.export(
            collection, batch(FEATURES, 4), dynamic_shapes=({0: size}, {0: 4 * bags + 1}), strict=False
        )
        call = batch(FEATURES, 9, seed=1)
        torch.testing.assert_close(program.module()(*call), collection(*call))


# ------------------------------------------------------------------------------------------ friendly errors


def test_loading_another_representation_says_so():
    tables = EmbeddingBagCollection(FEATURES)
    hybrid = EmbeddingBagCollection(with_representation(FEATURES, "hybrid", SMALL))
    with pytest.raises(
        RuntimeError, match="feature 'user' is a table in the state_dict, but a hybrid in this"
    ):
        hybrid.load_state_dict(tables.state_dict())


def test_out_of_range_id_names_the_feature():
    collection = EmbeddingBagCollection(with_representation(FEATURES[:2], "select", SMALL, select_largest=1))
    indices, offsets = torch.tensor([999, 3, 7]), torch.tensor([0, 1, 3])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            with pytest.raises(
                IdOutOfRangeError, match=r"indices\[2\] \(feature 'type', bag 0\) is 7, .* \[0, 7\)"
            ):
                collection(indices, offsets)
            with pytest.raises(IdOutOfRangeError, match=r"indices\[0\] \(feature 'user', bag 0\) is -1"):
                collection(torch.tensor([-1, 3, 6]), offsets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a.b"}, "name: .*without dots"),
        ({"num_embeddings": 0}, "feature 'x': num_embeddings: .*positive integer, got 0"),
        ({"embedding_dim": 2.5}, "embedding_dim: .*got 2.5"),
        (
            {"representation": "tree"},
            "representation: expected one of 'table', 'dhe', 'hybrid', .*got 'tree'",
        ),
        ({"mode": "prod"}, "mode: expected one of"),
    ],
)
def test_bad_feature_configs(options, message):
    with pytest.raises(ValueError, match=message):
        FeatureConfig(**{"name": "x", "num_embeddings": 5, "embedding_dim": 4, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: "),
        ({"hidden": (8, -1)}, "hidden: "),
        ({"family": "md5"}, "family: expected one of 'universal'"),
        ({"activation": "gelu"}, "^activation: "),
        ({"k": 3, "family": "artifact_gaussian"}, r"k: .*multiple of 2 .*got 3"),
    ],
)
def test_bad_dhe_configs(options, message):
    with pytest.raises(ValueError, match=message):
        DheConfig(**options)
    with pytest.raises(ValueError, match="unknown widths"):
        DheConfig.from_dict({"widths": 3})


def test_bad_collections():
    with pytest.raises(ValueError, match="at least one"):
        EmbeddingBagCollection([])
    with pytest.raises(ValueError, match="user more than once"):
        EmbeddingBagCollection([FEATURES[0], FEATURES[0]])
