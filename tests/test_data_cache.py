"""Caches of parsed logs: used again, and made anew where they are not what they should be."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mprec._native import _C
from mprec.data import _cache, criteo
from mprec.errors import DataError


@pytest.fixture
def log(tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / "train.txt"
    write(file, rng, 400)
    return file


def write(file, rng, rows):
    integers, categories = rng.integers(-2, 99, (rows, 13)), rng.integers(0, 50, (rows, 26))
    lines = [
        "\t".join([str(label), *map(str, i), *(f"{c:x}" for c in row)])
        for label, i, row in zip(rng.integers(0, 2, rows), integers, categories, strict=True)
    ]
    file.write_text("\n".join(lines))


@pytest.fixture
def parsed(monkeypatch):
    """How often text was parsed."""
    calls, chunks = [], criteo.chunks
    monkeypatch.setattr(criteo, "chunks", lambda *a, **k: calls.append(a) or chunks(*a, **k))
    return calls


def same(a, b):
    assert a.features == b.features
    for name in ("labels", "dense", "matrix"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for name, encoder in a.vocabularies.items():
        np.testing.assert_array_equal(encoder.ordered(), b.vocabularies[name].ordered())


def test_the_second_call_finds_what_the_first_one_made(log, tmp_path, parsed):
    plain = criteo.read(log, cache=False)
    first = criteo.read(log, cache=tmp_path / "cache")
    second = criteo.read(log, cache=tmp_path / "cache")
    assert len(parsed) == 2
    same(first, plain)
    same(second, plain)
    assert not second.matrix.flags.owndata  # mapped
    batch = second.batch(np.array([3, 399]))
    np.testing.assert_array_equal(batch.indices.view(26, 2).T, plain.matrix[[3, 399]])
    criteo.read(log, cache=tmp_path / "cache", min_count=2)
    assert len(parsed) == 3
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_users_cache_folder_is_the_default_for_long_logs(log, tmp_path, parsed, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    criteo.read(log)
    assert not (tmp_path / "home").exists()
    monkeypatch.setattr(criteo, "CACHED_FROM", 1000)
    criteo.read(log)
    criteo.read(log)
    assert len(parsed) == 2
    assert (tmp_path / "home" / "mprec" / "data").is_dir()


def only(root):
    (folder,) = root.iterdir()
    return folder


def truncate(folder):
    os.truncate(folder / "ids", 1000)


def flip(folder):
    content = bytearray((folder / "dense").read_bytes())
    content[777] ^= 4
    (folder / "dense").write_bytes(content)


def lose(folder):
    (folder / "labels").unlink()


def edit(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["meta"]["rows"] -= 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


def cut(folder):
    os.truncate(folder / "manifest.json", 100)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (truncate, "ids has 1000 bytes, not 41600"),
        (flip, "dense is damaged: a checksum does not fit"),
        (lose, "cannot be read.*labels"),
        (edit, "its manifest is damaged"),
        (cut, "cannot be read"),
    ],
)
def test_a_damaged_cache_is_noticed_and_made_anew(log, tmp_path, parsed, damage, why):
    expected = criteo.read(log, cache=tmp_path / "cache")
    expected = [np.array(expected.matrix), np.array(expected.dense)]
    damage(only(tmp_path / "cache"))
    with pytest.warns(UserWarning, match=f"made anew: .*{why}"):
        again = criteo.read(log, cache=tmp_path / "cache")
    np.testing.assert_array_equal(again.matrix, expected[0])
    np.testing.assert_array_equal(again.dense, expected[1])
    criteo.read(log, cache=tmp_path / "cache")
    assert len(parsed) == 2


def test_a_log_that_has_changed_is_read_again(log, tmp_path, parsed):
    before = criteo.read(log, cache=tmp_path / "cache")
    old = np.array(before.labels)
    write(log, np.random.default_rng(1), 300)
    with pytest.warns(UserWarning, match="its sources have changed"):
        after = criteo.read(log, cache=tmp_path / "cache")
    assert (len(after), len(parsed)) == (300, 2)
    np.testing.assert_array_equal(before.labels, old)  # whoever has mapped the old one keeps it


def test_a_log_that_changes_while_it_is_read_is_an_error(log, tmp_path, monkeypatch):
    chunks = criteo.chunks

    def changing(files, bads, **options):
        yield from chunks(files, bads, **options)
        write(log, np.random.default_rng(1), 300)

    monkeypatch.setattr(criteo, "chunks", changing)
    with pytest.raises(DataError, match="has changed while it was read"):
        criteo.read(log, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_leaves_nothing(log, tmp_path, monkeypatch):
    def full(descriptor, data, offset):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            criteo.read(log, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    usage = __import__("shutil").disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="will be written and 0 MB are free"):
        criteo.read(log, cache=tmp_path / "cache")


def test_a_cache_with_malformed_lines_is_not_for_the_strict(log, tmp_path, parsed):
    with open(log, "a") as file:
        file.write("\nnonsense\n")
    for _ in range(2):
        with pytest.warns(UserWarning, match="1 malformed line"):
            criteo.read(log, cache=tmp_path / "cache")
    with pytest.raises(DataError, match=r"train\.txt:401: expected 40 fields, found 1"):
        criteo.read(log, cache=tmp_path / "cache", strict=True)
    with pytest.raises(DataError, match="1 of 401 lines are malformed, more than 0 %"):
        criteo.read(log, cache=tmp_path / "cache", malformed=0)
    assert len(parsed) == 1


def test_of_a_large_cache_some_blocks_are_looked_at(log, tmp_path, monkeypatch):
    monkeypatch.setattr(_cache, "BLOCK", 1024)
    criteo.read(log, cache=tmp_path / "cache")
    looked, checksum = [], _cache.checksum
    monkeypatch.setattr(_cache, "checksum", lambda data: looked.append(len(data)) or checksum(data))
    criteo.read(log, cache=tmp_path / "cache")
    every = len(looked)
    monkeypatch.setattr(_cache, "READ_AT_MOST", sum(looked) // 4)
    looked.clear()
    criteo.read(log, cache=tmp_path / "cache")
    assert every / 8 < len(looked) < every / 2


@given(st.binary(max_size=200), st.integers(0, 10**6), st.integers(1, 255))
def test_checksums_change_with_any_byte(data, place, change):
    data = bytearray(data) + b"\0"
    before = _C.checksum(np.frombuffer(bytes(data), np.uint8))
    longer = _C.checksum(np.frombuffer(bytes(data) + b"\0", np.uint8))
    data[place % len(data)] ^= change
    after = _C.checksum(np.frombuffer(bytes(data), np.uint8))
    assert len({before, longer, after}) == 3


@given(
    st.lists(st.tuples(st.integers(0, 12) | st.sampled_from([2**32 - 1, 2**31]), st.booleans()), max_size=90),
    st.integers(0, 31),
    st.integers(0, 100),
)
def test_values_become_codes_in_order(rows, bit, counted):
    values = np.array([value for value, _ in rows], dtype=np.uint32).view(np.int32)
    missing = np.array([gone << bit for _, gone in rows], dtype=np.uint32).view(np.int32)
    found = []
    keys = [-1 if gone else value for value, gone in rows]
    distinct = list(dict.fromkeys(keys))
    assert _C.encode_values(values, missing, bit, counted, found) == len(distinct)
    assert np.frombuffer(found[0], np.int64).tolist() == distinct
    assert np.frombuffer(found[1], np.int64).tolist() == [keys[:counted].count(key) for key in distinct]
    assert values.tolist() == [distinct.index(key) for key in keys]


def test_many_values_become_codes():
    """The dictionary grows."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 2**32, 50_000, dtype=np.uint32)
    values[::3] = values[0]
    codes, found = values.view(np.int32).copy(), []
    _C.encode_values(codes, None, 0, len(values), found)
    np.testing.assert_array_equal(np.frombuffer(found[0], np.int64)[codes], values)
    np.testing.assert_array_equal(np.frombuffer(found[1], np.int64), np.bincount(codes))
