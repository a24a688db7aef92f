"""Growing vocabularies against a model of dictionaries, step by step, and what tables learn through them."""

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mprec.optim
from mprec.errors import DtypeError
from mprec.hashing import ids_of_keys
from mprec.nn import DeepHashEmbedding, DheConfig, Embedding, EmbeddingBag, GrowingVocabulary
from mprec.nn._keys import KeyIndex

KEYS = [-(2**63), -7, -1, 0, 1, 2, 3, 5, 8, 13, 2**31, 2**62, 2**63 - 1]


class Model:
    """The same by dictionaries, a key at a time."""

    def __init__(self, capacity, min_count, candidates):
        self.room, self.min_count, self.candidates = capacity - 1, min_count, candidates
        self.rows, self.waiting = {}, {}  # key -> [row, last], key -> [count, last]
        self.now = 1

    def meet(self, keys):
        counts = {}
        for key in keys:
            counts[key] = counts.get(key, 0) + 1
        new = []
        for key, count in counts.items():
            if key in self.rows:
                self.rows[key][1] = self.now
            elif key in self.waiting:
                self.waiting[key] = [self.waiting[key][0] + count, self.now]
            else:
                new.append((-count, key))
        lacking = len(self.waiting) + len(new) - self.candidates
        if lacking > 0:
            old = sorted((last, count, key) for key, (count, last) in self.waiting.items() if last < self.now)
            for _, _, key in old[: max(lacking, self.candidates // 4)]:
                del self.waiting[key]
        for count, key in sorted(new)[: self.candidates - len(self.waiting)]:
            self.waiting[key] = [-count, self.now]

    def step(self):
        ready = sorted(
            (-count, key)
            for key, (count, last) in self.waiting.items()
            if count >= self.min_count and last == self.now
        )
        given = []
        for _, key in ready:
            if len(self.rows) < self.room:
                row = 1 + len(self.rows)
            else:
                old = sorted((last, k) for k, (_, last) in self.rows.items() if last < self.now)
                if not old:
                    break
                row = self.rows.pop(old[0][1])[0]
            del self.waiting[key]
            self.rows[key] = [row, self.now]
            given.append(row)
        self.now += 1
        return given

    def row(self, key):
        return self.rows[key][0] if key in self.rows else 0


def check(vocabulary, model):
    vocabulary.eval()
    assert vocabulary(torch.tensor(KEYS)).tolist() == [model.row(key) for key in KEYS]
    vocabulary.train()
    assert len(vocabulary) == len(model.rows)
    keys, rows = vocabulary.known()
    assert dict(zip(keys.tolist(), rows.tolist(), strict=True)) == {k: r for k, (r, _) in model.rows.items()}


batches = st.lists(st.sampled_from(KEYS), max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    capacity=st.integers(2, 7),
    min_count=st.integers(1, 3),
    candidates=st.integers(1, 6),
    steps=st.lists(st.tuples(st.lists(batches, max_size=3), st.booleans()), max_size=14),
)
def test_is_the_model_of_dictionaries(capacity, min_count, candidates, steps):
    vocabulary = GrowingVocabulary(capacity, min_count, candidates=candidates)
    model = Model(capacity, min_count, candidates)
    table, size = torch.zeros(capacity, 1), vocabulary.nbytes
    for calls, saved in steps:
        for number, keys in enumerate(calls):
            # Rows do not change hands within a step.
            expected = [model.row(key) for key in keys]
            assert vocabulary(torch.tensor(keys, dtype=torch.int64)).tolist() == expected
            model.meet(keys)
            if saved and number == 0:
                vocabulary = restored(vocabulary)
        assert vocabulary.step(table).tolist() == model.step()
        check(vocabulary, model)
        if saved:
            vocabulary = restored(vocabulary)
            check(vocabulary, model)
    assert vocabulary.nbytes == size <= 48 * (capacity + candidates) + 64


def restored(vocabulary):
    file = io.BytesIO()
    torch.save(vocabulary.state_dict(), file)
    file.seek(0)
    other = GrowingVocabulary(vocabulary.capacity, vocabulary.min_count, candidates=vocabulary.candidates)
    other(torch.tensor([4, 4, 4]))
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


def test_many_keys_over_many_steps():
    r = np.random.default_rng(0)
    capacity, min_count, candidates = 300, 2, 400
    vocabulary, model = GrowingVocabulary(capacity, min_count, candidates=candidates), None
    model, table = Model(capacity, min_count, candidates), torch.zeros(capacity, 1)
    for step in range(120):
        keys = (r.zipf(1.2, 200) * (1 + step // 40)) % 2**40 - 10
        vocabulary(torch.from_numpy(keys))
        model.meet(keys.tolist())
        assert vocabulary.step(table).tolist() == model.step()
    assert len(vocabulary) == len(model.rows) == capacity - 1
    keys, rows = vocabulary.known()
    assert {k: r for k, (r, _) in model.rows.items()} == dict(zip(keys.tolist(), rows.tolist(), strict=True))
    assert sorted(rows.tolist()) == list(range(1, capacity))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from(KEYS), max_size=8, unique=True), max_size=25))
def test_an_index_finds_what_is_there(rounds):
    """Keys come and go; entries are those of a dictionary."""
    index, entry_of, key_of = KeyIndex(len(KEYS)), {}, np.zeros(len(KEYS), dtype=np.int64)
    for keys in rounds:
        gone = [k for k in keys if k in entry_of]
        come = [k for k in keys if k not in entry_of]
        index.remove(np.array(gone, dtype=np.int64), key_of)
        for key in gone:
            del entry_of[key]
        free = sorted(set(range(len(KEYS))) - set(entry_of.values()))[: len(come)]
        for key, entry in zip(come, free, strict=True):
            entry_of[key], key_of[entry] = entry, key
        index.add(np.array(come, dtype=np.int64), np.array(free, dtype=np.int64))
        if index.worn:
            there = np.array(list(entry_of.values()), dtype=np.int64)
            index.rebuild(key_of[there], there)
        found = index.find(np.array(KEYS), key_of)
        assert found.tolist() == [entry_of.get(key, -1) for key in KEYS]


def test_evaluation_changes_nothing():
    vocabulary, table = GrowingVocabulary(4), torch.zeros(4, 2)
    vocabulary(torch.tensor([5, 6]))
    vocabulary.step(table)
    before = vocabulary.state_dict()["_extra_state"]
    vocabulary.eval()
    keys = torch.tensor([[5, 6, 7], [-9, 6, 5]], dtype=torch.int32)
    assert vocabulary(keys).tolist() == [[1, 2, 0], [0, 2, 1]]
    assert torch.equal(vocabulary.state_dict()["_extra_state"], before)
    with pytest.raises(RuntimeError, match="in evaluation a vocabulary does not change"):
        vocabulary.step(table)


def test_keys_without_a_row_share_several():
    vocabulary = GrowingVocabulary(20, shared=4).eval()
    keys = torch.arange(-2000, 2000)
    rows = vocabulary(keys)
    assert torch.bincount(rows).tolist() == pytest.approx([1000] * 4, rel=0.15)
    assert torch.equal(vocabulary(keys.flip(0)).flip(0), rows)
    vocabulary.train()
    vocabulary(torch.tensor([3]))
    table = torch.arange(20.0)[:, None]
    assert vocabulary.step(table).tolist() == [4]
    assert table[4] == rows[2003]  # from the row that it shared


MAKERS = {
    "SGD": lambda p: mprec.optim.SGD(p, lr=0.1),
    "Adagrad": lambda p: mprec.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "RowWiseAdagrad": lambda p: mprec.optim.RowWiseAdagrad(p, lr=0.1),
    "Adam": lambda p: mprec.optim.Adam(p, lr=0.1),
    "Adam, by step()": lambda p: mprec.optim.Adam(p, lr=0.1, in_backward=False),
    "torch's Adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "torch's Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "torch's momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("pooled", [False, True])
def test_a_row_that_changes_hands_starts_anew(name, pooled):
    torch.manual_seed(0)
    vocabulary = GrowingVocabulary(3)
    table = EmbeddingBag(3, 4, mode="sum") if pooled else Embedding(3, 4)
    optimizer = MAKERS[name]([table.weight])

    def train(*keys):
        out = table(vocabulary(torch.tensor([keys])))
        (out * torch.arange(1.0, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        # Optimizers of mprec.optim that own the table are found.
        return vocabulary.step(table, () if name in ("SGD", "Adagrad", "Adam") else optimizer).tolist()

    assert train(10, 20) == [1, 2]  # met for the first time: their step was of the shared row
    assert torch.equal(table.weight[1:], table.weight[:1].expand(2, 4))
    assert train(10, 20) == []
    assert train(10) == []
    assert not torch.equal(table.weight[1], table.weight[2])
    assert train(30) == [2]  # 20 was met longest ago
    assert torch.equal(table.weight[2], table.weight[0])
    state = {k: v for k, v in optimizer.state[table.weight].items() if v is not None and v.dim()}
    for key, value in state.items():
        start = 0.5 if key == "sum" and "Adagrad" in name and name != "RowWiseAdagrad" else 0.0
        assert torch.equal(value[2], torch.full_like(value[2], start)), key
        assert not torch.equal(value[1], torch.full_like(value[1], start)), key
    before = table.weight[2].detach().clone()
    assert train(30) == []
    assert not torch.equal(table.weight[2], before)


@pytest.mark.parametrize("sparse", [False, True])
def test_no_gradient_is_left_for_the_next_key(sparse):
    vocabulary, table = GrowingVocabulary(2), Embedding(2, 3, sparse=sparse)
    vocabulary(torch.tensor([1]))
    vocabulary.step(table)
    vocabulary(torch.tensor([9]))
    table(torch.tensor([0, 1, 1])).sum().backward()
    assert vocabulary.step(table).tolist() == [1]
    assert table.weight.grad.to_dense().tolist() == [[1, 1, 1], [0, 0, 0]]


def test_several_tables_and_calls_of_a_step():
    """Shared by two features and two tables: rows stay whose they are until the step's end."""
    vocabulary = GrowingVocabulary(3)
    tables = [Embedding(3, 2), Embedding(3, 1)]
    vocabulary(torch.tensor([1, 2]))
    vocabulary.step(tables)
    first, second = vocabulary(torch.tensor([1])), vocabulary(torch.tensor([7, 8, 9, 2]))
    assert (first.tolist(), second.tolist()) == ([1], [0, 0, 0, 2])
    assert vocabulary.step(tables).tolist() == []  # all keys with rows were met in this step
    vocabulary(torch.tensor([9]))
    assert vocabulary.step(tables).tolist() == [1]
    for table in tables:
        assert torch.equal(table.weight[1], table.weight[0])


def test_learns_new_keys_and_deep_hash_embeddings_serve_the_others():
    torch.manual_seed(0)
    vocabulary, table = GrowingVocabulary(30, min_count=2), Embedding(30, 4)
    rest = DeepHashEmbedding(None, 4, DheConfig(k=16, hidden=(8,)))
    keys = torch.tensor([-(2**63), -5, 11, 2**63 - 1])

    def embed(keys):
        rows = vocabulary(keys)
        own = (rows >= vocabulary.shared)[:, None]
        return torch.where(own, table(rows), rest(ids_of_keys(keys)))

    torch.testing.assert_close(embed(keys), rest(torch.tensor([0, 2**63 - 5, 11, 2**63 - 1])))
    vocabulary.step(table)
    embed(keys)
    assert vocabulary.step(table).tolist() == [1, 2, 3, 4]
    assert torch.equal(embed(keys), table.weight[1:5])


def test_copies_part_from_then_on():
    vocabulary, table = GrowingVocabulary(5), torch.zeros(5, 1)
    vocabulary(torch.tensor([1, 2]))
    vocabulary.step(table)
    twin = copy.deepcopy(vocabulary)
    twin(torch.tensor([3]))
    twin.step(table)
    assert (len(vocabulary), len(twin)) == (2, 3)
    assert vocabulary.eval()(torch.tensor([3])).item() == 0
    twin.reset_parameters()
    assert len(twin) == 0
    assert "2 keys with rows, 0 candidates" in repr(vocabulary)
    compiled = torch.compile(vocabulary, backend="eager")
    assert compiled(torch.tensor([2, 1])).tolist() == [2, 1]


def test_what_is_refused():
    for options, message in (
        ({"capacity": 1}, "capacity: expected an integer of at least 2, got 1"),
        ({"capacity": 3, "shared": 3}, "capacity: expected an integer of at least 4, got 3"),
        ({"capacity": 3, "min_count": 0}, "min_count: expected an integer of at least 1, got 0"),
        ({"capacity": 3, "candidates": True}, "candidates: expected an integer of at least 1, got True"),
        ({"capacity": 2**30, "candidates": 2**30}, r"less than 2\*\*31 in all"),
    ):
        with pytest.raises(ValueError, match=message):
            GrowingVocabulary(**options)
    vocabulary = GrowingVocabulary(4)
    for keys in (torch.tensor([0.5]), torch.tensor([True])):
        with pytest.raises(DtypeError, match="keys: expected integers, got"):
            vocabulary(keys)
    with pytest.raises(ValueError, match=r"tables: expected a weight of 4 rows, got \(5, 2\)"):
        vocabulary.step(Embedding(5, 2))
    with pytest.raises(ValueError, match="expected modules with a weight, or weights, got DeepHashEmbedding"):
        vocabulary.step(DeepHashEmbedding(4, 2, DheConfig(k=4, hidden=(2,))))
    with pytest.raises(ValueError, match="of capacity 4, 1 shared rows and 0 candidates does not fit"):
        GrowingVocabulary(5).load_state_dict(vocabulary.state_dict())
    for _ in range(1000):
        vocabulary(torch.tensor([1]))
    with pytest.raises(RuntimeError, match=r"1000 training passes without step"):
        vocabulary(torch.tensor([1]))
    vocabulary.step(torch.zeros(4, 1))
    vocabulary(torch.tensor([1]))


def test_replicas_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="the same row would be another key's in each"):
        GrowingVocabulary(4)(torch.tensor([1]))
    GrowingVocabulary(4, sharded=True)(torch.tensor([1]))
    GrowingVocabulary(4).eval()(torch.tensor([1]))


def test_ids_of_keys():
    keys = torch.tensor([0, 5, -5, -1, -(2**63), 2**63 - 1])
    assert ids_of_keys(keys).tolist() == [0, 5, 2**63 - 5, 2**63 - 1, 0, 2**63 - 1]
    assert ids_of_keys(torch.tensor([-3], dtype=torch.int32)).tolist() == [2**63 - 3]
    assert ids_of_keys(torch.tensor([2**64 - 5], dtype=torch.uint64)).tolist() == [2**63 - 5]
    with pytest.raises(DtypeError, match=r"keys: expected integers, got torch\.float32"):
        ids_of_keys(torch.tensor([1.0]))
