"""A collection's direct call remembers where its tables were found: every way to change one between two calls
gives the new result."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from mprec import _C
from mprec.errors import InvalidOffsetsError
from mprec.names import MODES
from mprec.nn import (
    DheConfig,
    EmbeddingBag,
    EmbeddingBagCollection,
    FeatureConfig,
    QuantizedEmbeddingBagCollection,
)
from mprec.row_formats import row_format

ROWS, DIM = {"a": 5, "b": 9, "c": 7}, 4

#: Collections whose tables are one call with columns of its own, one call among others, and several calls.
KINDS = {
    "alone": [FeatureConfig(name, rows, DIM) for name, rows in ROWS.items()],
    "beside decoders": [
        FeatureConfig("a", 5, DIM, "hybrid", dhe=DheConfig(k=8, hidden=(4,))),
        FeatureConfig("b", 9, DIM),
        FeatureConfig("c", 7, DIM),
    ],
    "of two modes": [
        FeatureConfig("a", 5, DIM, mode="mean"),
        FeatureConfig("b", 9, DIM),
        FeatureConfig("c", 7, DIM, mode="mean"),
    ],
}
# Bags of no, one and two IDs; all below 5, so that they stay valid whatever is changed.
INDICES = torch.tensor([1, 4, 2, 0, 3, 3, 4, 1])
OFFSETS = torch.tensor([0, 1, 3, 3, 5, 6, 8])


def make(kind):
    torch.manual_seed(0)
    return EmbeddingBagCollection(KINDS[kind])


def want(collection):
    """By torch's operator, from what stands there now."""
    parts = []
    for f, feature in enumerate(collection.features):
        weight, offsets = collection.tables[feature.name].weight, OFFSETS[2 * f : 2 * f + 3]
        ids = INDICES[offsets[0] : offsets[-1]]
        parts.append(
            nn.functional.embedding_bag(
                ids, weight, offsets - offsets[0], mode=feature.mode, include_last_offset=True
            )
        )
        if feature.has_dhe:
            module = collection.dhe[feature.name]
            parts.append(
                module(ids, (offsets - offsets[0])[: len(offsets) - (not module.include_last_offset)])
            )
    return torch.cat(parts, dim=1)


def new(rows=9, **options):
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(1), **options)


def module_of(collection):
    return collection.tables._modules["b"]


def _swap(collection):
    """What torch.utils.swap_tensors does once it has found no weak references, of which calls leave some."""
    torch._C._swap_tensor_impl(module_of(collection).weight, Parameter(new()))


def _resize(collection):
    weight = module_of(collection).weight
    weight.requires_grad_(False).resize_(1000, DIM)
    weight[9:] = 0


def _new_attributes(collection):
    module = module_of(collection)
    module.__dict__ = {**module.__dict__, "_parameters": {"weight": Parameter(new())}}


def _new_module():
    return nn.EmbeddingBag(9, DIM, _weight=new(), include_last_offset=True)


def _without_and_with(collection):
    module = module_of(collection)
    del module.weight
    module.weight = Parameter(new())


def _new_tables(collection):
    modules = dict(collection.tables._modules) | {"b": _new_module()}
    collection.tables = nn.ModuleDict(modules)


def _state(collection):
    return {**collection.state_dict(), "tables.b.weight": new()}


WAYS = {
    "write": lambda c: module_of(c).weight.mul_(2),
    "write to .data": lambda c: module_of(c).weight.data.mul_(2),
    "write by NumPy": lambda c: module_of(c).weight.detach().numpy().fill(3),
    "weight =": lambda c: setattr(module_of(c), "weight", Parameter(new())),
    "del weight, weight =": _without_and_with,
    ".data =": lambda c: setattr(module_of(c).weight, "data", new()),
    ".data = of more rows": lambda c: setattr(module_of(c).weight, "data", new(700)),
    ".data = of fewer rows": lambda c: setattr(module_of(c).weight, "data", module_of(c).weight.data[:5]),
    ".data = of rows apart": lambda c: setattr(module_of(c).weight, "data", new(9).repeat(1, 3)[:, 4:8]),
    ".data = of rows in reverse": lambda c: setattr(module_of(c).weight, "data", new(9).flip(0)),
    ".data = transposed": lambda c: setattr(module_of(c).weight, "data", new(9).T.contiguous().T),
    ".data = negated lazily": lambda c: setattr(
        module_of(c).weight, "data", torch.complex(new(), new()).conj().imag
    ),
    "resize_": _resize,
    "set_": lambda c: module_of(c).weight.set_(new()),
    "set_ to a part": lambda c: module_of(c).weight.set_(new(20).untyped_storage(), 8, (9, DIM), (DIM, 1)),
    "swap_tensors": _swap,
    "share_memory": lambda c: module_of(c).weight.share_memory_(),
    "_parameters[...] =": lambda c: module_of(c)._parameters.update(weight=Parameter(new())),
    "_parameters =": lambda c: setattr(module_of(c), "_parameters", {"weight": Parameter(new())}),
    "__dict__[...] =": lambda c: module_of(c).__dict__.update(_parameters={"weight": Parameter(new())}),
    "__dict__ =": _new_attributes,
    "tables[...] =": lambda c: c.tables.__setitem__("b", _new_module()),
    "tables._modules[...] =": lambda c: c.tables._modules.update(b=_new_module()),
    "tables =": _new_tables,
    "load_state_dict": lambda c: c.load_state_dict(_state(c)),
    "load_state_dict, assign": lambda c: c.load_state_dict(_state(c), assign=True),
    "_apply": lambda c: c._apply(lambda t: t * 2 if t.is_floating_point() else t),
    "requires_grad_": lambda c: c.requires_grad_(False),
    "parametrised": lambda c: nn.utils.parametrize.register_parametrization(
        module_of(c), "weight", _Doubled()
    ),
    "an attribute of the module": lambda c: setattr(module_of(c), "note", "nothing to do with it"),
}


class _Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_change_is_seen(kind, way):
    collection = make(kind)
    for _ in range(2):
        torch.testing.assert_close(collection(INDICES, OFFSETS), want(collection))
    WAYS[way](collection)
    for _ in range(2):
        torch.testing.assert_close(collection(INDICES, OFFSETS), want(collection))
    out = torch.empty(2, collection._width)
    assert collection(INDICES, OFFSETS, out=out) is out
    torch.testing.assert_close(out, want(collection))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_direct_call_takes_them(kind):
    """What is tested above is not another way to the same result."""
    collection = make(kind)

    def refuse(batch):
        raise AssertionError("went to the operators")

    collection._forward_ops = refuse
    collection(INDICES, OFFSETS)
    WAYS["weight ="](collection)
    torch.testing.assert_close(collection(INDICES, OFFSETS), want(collection))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_is_seen(dtype):
    collection = make("alone")
    collection(INDICES, OFFSETS)
    got = collection.to(dtype)(INDICES, OFFSETS)
    assert got.dtype is dtype
    torch.testing.assert_close(got, want(collection))
    got = collection.float()(INDICES, OFFSETS)
    assert got.dtype is torch.float32
    torch.testing.assert_close(got, want(collection))


@torch.no_grad()
def test_a_table_of_another_width_is_seen():
    collection = make("alone")
    collection(INDICES, OFFSETS)
    module_of(collection).weight = Parameter(torch.randn(9, 11))
    got = collection(INDICES, OFFSETS)
    assert got.shape == (2, 2 * DIM + 11)
    torch.testing.assert_close(got, want(collection))


@torch.no_grad()
def test_fewer_rows_bound_the_ids():
    collection = make("alone")
    collection(INDICES, OFFSETS)
    weight = module_of(collection).weight
    weight.data = weight.data[:3]
    with pytest.raises(IndexError, match=r"feature 1, bag 1\) is 3, not in the valid range \[0, 3\)"):
        collection(INDICES, OFFSETS)


@torch.no_grad()
def test_functional_call_is_for_one_call():
    collection = make("alone")
    before = collection(INDICES, OFFSETS)
    twin = copy.deepcopy(collection)
    module_of(twin).weight = Parameter(new())
    replaced = {"tables.b.weight": module_of(twin).weight}
    got = torch.func.functional_call(collection, replaced, (INDICES, OFFSETS))
    torch.testing.assert_close(got, want(twin))
    torch.testing.assert_close(collection(INDICES, OFFSETS), before)


@torch.no_grad()
def test_rows_of_another_format_are_seen():
    collection = QuantizedEmbeddingBagCollection(make("alone"), tables="int8")

    def expected():
        plain = make("alone")
        for name, table in collection.tables._modules.items():
            plain.tables._modules[name].weight.copy_(table.dequantize())
        return want(plain)

    torch.testing.assert_close(collection(INDICES, OFFSETS), expected())
    table, int4 = module_of(collection), row_format("int4")
    table.rows, table.bits, table.format = int4.encode(new()), int4.code, int4
    torch.testing.assert_close(collection(INDICES, OFFSETS), expected())
    table.rows.copy_(int4.encode(new() + 1))
    torch.testing.assert_close(collection(INDICES, OFFSETS), expected())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_copies(kind, copied):
    collection = make(kind)
    before = collection(INDICES, OFFSETS)
    twin = copied(collection)
    torch.testing.assert_close(twin(INDICES, OFFSETS), before)
    WAYS["weight ="](twin)  # of the original too, if they share their modules
    torch.testing.assert_close(twin(INDICES, OFFSETS), want(twin))
    torch.testing.assert_close(collection(INDICES, OFFSETS), want(collection))
    assert (module_of(twin) is module_of(collection)) == (copied is copy.copy)


@torch.no_grad()
def test_replicas_that_share_the_group_have_tables_of_their_own():
    """As of nn.DataParallel: attributes are shared, modules are not."""
    collection = make("alone")
    twin = copy.copy(collection)
    twin._modules = dict(collection._modules)
    twin._modules["tables"] = copy.deepcopy(collection.tables)
    WAYS["weight ="](twin)
    for _ in range(3):
        for each in (collection, twin):
            torch.testing.assert_close(each(INDICES, OFFSETS), want(each))


@torch.no_grad()
def test_a_replaced_table_is_let_go_of():
    collection = make("alone")
    collection(INDICES, OFFSETS)
    old = weakref.ref(module_of(collection).weight)
    module_of(collection).weight = Parameter(new())
    gc.collect()
    assert old() is None


@torch.no_grad()
@pytest.mark.parametrize("samples", [1, 4000])  # with the interpreter's lock, and without
def test_tables_may_be_replaced_by_another_thread(samples):
    features = [FeatureConfig(f"f{t}", 50, 16) for t in range(8)]
    collection, done, wrong = EmbeddingBagCollection(features), threading.Event(), []
    for module in collection.tables.values():
        module.weight = Parameter(torch.ones(50, 16))
    indices, offsets = torch.randint(0, 50, (8 * samples,)), torch.arange(8 * samples + 1)

    def call():
        with torch.no_grad():
            while not done.is_set():
                blocks = collection(indices, offsets).unflatten(1, (8, 16)).transpose(0, 1).flatten(1)
                if not bool((blocks == blocks[:, :1]).all()) or not set(blocks[:, 0].tolist()) <= {1.0, 2.0}:
                    wrong.append(blocks)
                    return

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    modules = list(collection.tables.values())
    for turn in range(600):
        weight = torch.full((50, 16), 1.0 + turn % 2)
        if turn % 3:
            modules[turn % 8].weight = Parameter(weight)
        else:
            modules[turn % 8].weight.copy_(modules[turn % 8].weight)
        if turn % 50 == 0:
            done.wait(0.002)
    done.set()
    for caller in callers:
        caller.join()
    assert not wrong


@torch.no_grad()
def test_wrong_offsets_are_told_by_the_operators():
    collection = make("alone")
    for offsets in (OFFSETS[:0], OFFSETS[:-1]):
        with pytest.raises(InvalidOffsetsError, match=r"1 . a multiple of the number of features, 3"):
            collection(INDICES, offsets)


ARGUMENTS = {
    "names": ("a", "b"),
    "owner": "_parameters",
    "key": "weight",
    "type": Parameter,
    "bits": None,
    "mode": MODES["sum"],
    "columns": None,
    "features": None,
    "num_features": 2,
    "module_types": (EmbeddingBag,),
}


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("names", (), ValueError, "names: expected at least one"),
        ("names", ("a", 3), TypeError, "names: expected strings, got int"),
        ("owner", 3, TypeError, "owner: expected a str, got int"),
        ("type", 3, TypeError, "type: expected a type, got int"),
        ("bits", 8, TypeError, "bits: expected a str, got int"),
        ("mode", 3, ValueError, "mode: expected 0, 1 or 2, got 3"),
        ("columns", [0], ValueError, "columns: expected one for each of 2, got 1"),
        ("columns", [0, -4], ValueError, r"columns\[1\]: expected >= 0, got -4"),
        ("features", [0, 2], ValueError, r"features\[1\]: expected <= 1, got 2"),
        ("num_features", 3, ValueError, "num_features: expected 2 without features, got 3"),
        ("module_types", EmbeddingBag, TypeError, "module_types: expected a tuple, got type"),
    ],
)
def test_a_group_says_what_is_wrong(argument, value, error, message):
    _C.TableGroup(**ARGUMENTS)
    with pytest.raises(error, match=message):
        _C.TableGroup(**(ARGUMENTS | {argument: value}))
