"""Criteo's format, against a line-by-line parser in plain Python."""

import gzip
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mprec.data import Vocabulary, criteo, load, vocabulary
from mprec.data._text import BadLines
from mprec.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:.*malformed line")


def line(label="1", integers=(), categories=()):
    integers = [*integers, *[""] * (13 - len(integers))]
    categories = [*categories, *[""] * (26 - len(categories))]
    return "\t".join([label, *integers, *categories])


def write(path, lines, end="\n"):
    path.write_bytes("".join(text + end for text in lines).encode())
    return path


def parse_plainly(text):
    """(label, integers, categories), or None if the line is malformed."""
    fields = text.split("\t")
    if len(fields) != 40 or fields[0] not in ("0", "1"):
        return None
    try:
        integers = [int(f) if f else 0 for f in fields[1:14]]
        categories = [int(f, 16) if f else -1 for f in fields[14:]]
    except ValueError:
        return None
    hexadecimal = all(len(f) <= 8 and not f.startswith("-") for f in fields[14:])
    return (int(fields[0]), integers, categories) if hexadecimal else None


FIELD = st.sampled_from(["", "0", "7", "-1", "123456", "-42", "x", "1.5", "-", "999999999999999999"])
HEX = st.sampled_from(["", "0", "ffffffff", "68fd1e64", "ABC", "0g", "-1", "123456789"])
LINE = st.one_of(
    st.builds(
        lambda label, i, c: line(label, i, c),
        st.sampled_from(["0", "1", "0", "1", "2", "", "x"]),
        st.lists(FIELD.filter(lambda f: f not in ("x", "1.5", "-")) | FIELD, max_size=13),
        st.lists(HEX.filter(lambda f: f not in ("0g", "-1", "123456789")) | HEX, max_size=26),
    ),
    st.sampled_from(["", "1\t2", "\t" * 39, "\t" * 40, "0" + "\t" * 39]),
)


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(LINE, min_size=1, max_size=12),
    chunk=st.integers(1, 400),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
)
def test_chunks_agree_with_a_plain_parser(tmp_path_factory, lines, chunk, end, last):
    path = tmp_path_factory.getbasetemp() / "train.txt"
    path.write_bytes((end.join(lines) + (end if last else "")).encode())
    if not last and not lines[-1]:  # an unterminated empty line is no line
        lines = lines[:-1]
    bad = BadLines(path, keep=100)
    found = []
    for part, share in criteo.chunks([path], [bad], chunk_bytes=chunk):
        assert 0 <= share <= 1
        missing = part.missing[None, :] >> np.arange(26)[:, None] & 1
        categories = np.where(missing, -1, part.categories.view(np.uint32).astype(np.int64))
        found += zip(part.labels.tolist(), part.dense.copy(), categories.T.tolist(), strict=True)
    expected = [parsed for text in lines if (parsed := parse_plainly(text))]
    assert [(label, categories) for label, _, categories in found] == [(p[0], p[2]) for p in expected]
    for (_, dense, _), (_, integers, _) in zip(found, expected, strict=True):
        np.testing.assert_allclose(dense, [math.log1p(max(i, 0)) for i in integers], rtol=1e-6)
    wrong = [number for number, text in enumerate(lines, 1) if not parse_plainly(text)]
    assert bad.count == len(wrong)
    assert [message.removeprefix(f"{path}:").split(":")[0] for message in bad.first] == [
        str(n) for n in wrong
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\t".join("1" * 12), "expected 40 fields, found 12"),
        (line()[2:], "expected 40 fields, found 39"),
        ("", "expected 40 fields, found 1"),
        (line("2"), "field 1: the label must be 0 or 1, found '2'"),
        (line(""), "field 1: the label must be 0 or 1, found ''"),
        (line("1", ["3", "1e5"]), "field 3: expected an integer or nothing, found '1e5'"),
        (line("1", ["-"]), "field 2: expected an integer or nothing, found '-'"),
        (line("1", ["1" * 19]), "field 2: expected an integer"),
        (line("1", [], ["0", "zz"]), "field 16: expected up to 8 hexadecimal digits or nothing, found 'zz'"),
        (line("1", [], ["123456789"]), "field 15: expected up to 8 hexadecimal digits"),
    ],
)
def test_malformed_lines_are_named_and_counted(tmp_path, text, reason):
    path = write(tmp_path / "train.txt", [line("0"), text, line("1")])
    with pytest.warns(UserWarning, match="1 malformed line"):
        dataset = criteo.read(path, malformed=0.5)
    assert len(dataset) == 2
    assert dataset.info["malformed_lines"] == 1
    assert dataset.info["malformed_first"][0].startswith(f"{path}:2: {reason}")
    with pytest.raises(DataError) as caught:
        load(f"criteo:{path}", strict=True)
    assert str(caught.value).startswith(f"{path}:2: {reason}")


def test_many_malformed_lines_are_all_counted_but_not_all_kept(tmp_path):
    path = write(tmp_path / "train.txt", [line(), *["nonsense"] * 500])
    dataset = criteo.read(path, chunk_bytes=64, malformed=1)
    assert dataset.info["malformed_lines"] == 500
    assert len(dataset.info["malformed_first"]) == 20
    assert dataset.info["malformed_first"][-1].startswith(f"{path}:21:")


def test_more_malformed_lines_than_allowed_are_an_error(tmp_path):
    path = write(tmp_path / "train.txt", [line()] * 95 + [line().rstrip("\t")] * 5)
    with pytest.raises(DataError, match=r"5 of 100 lines are malformed, more than 1 %.*malformed=SHARE") as e:
        criteo.read(path)
    assert f"{path}:96: expected 40 fields, found 1" in str(e.value)
    with pytest.warns(UserWarning, match="5 malformed line"):
        assert len(load(f"criteo:{path},malformed=0.05")) == 95
    with pytest.raises(ValueError, match=r"malformed: expected in \[0, 1\], got 2"):
        criteo.read(path, malformed=2)


@pytest.mark.parametrize(
    ("text", "hint"),
    [(line("1")[2:], "test.txt has no labels"), (line("1").replace("\t", ","), "39 commas, where tabs")],
)
def test_files_of_another_kind_are_told(tmp_path, text, hint):
    with pytest.raises(DataError, match=hint):
        criteo.read(write(tmp_path / "test.txt", [text] * 3))


def test_missing_and_the_largest_value_are_two_values(tmp_path):
    path = write(tmp_path / "train.txt", [line("1", [], [v]) for v in ("ffffffff", "", "", "0", "ffffffff")])
    dataset = criteo.read(path, min_count=2, vocabulary_share=1)
    assert dataset.features[0] == ("C1", 3)
    assert dataset.column("C1").ids.tolist() == [2, 1, 1, 0, 2]  # of equal counts, missing (-1) comes first
    raw = criteo.read(path, raw=True)
    assert raw.features[0] == ("C1", (1 << 32) + 1)
    assert raw.column("C1").ids.tolist() == [1 << 32, 0, 0, 1, 1 << 32]
    some = criteo.read(path, raw=[2, 26], min_count=1)
    assert [size > 1 << 32 for _, size in some.features] == [i in (1, 25) for i in range(26)]
    with pytest.raises(ValueError, match="raw values for IDs"):
        raw.counts("C1")
    with pytest.raises(ValueError, match="raw: expected categories from 1 to 26, got 27"):
        criteo.read(path, raw=27)


def test_a_byte_order_mark_and_gzip_without_its_suffix(tmp_path):
    lines = [line("1", [str(i)]) for i in range(30)]
    expected = criteo.read(write(tmp_path / "plain", lines))
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "plain").read_bytes())
    (tmp_path / "zipped").write_bytes(gzip.compress((tmp_path / "marked").read_bytes()))
    for name in ("marked", "zipped"):
        np.testing.assert_array_equal(criteo.read(tmp_path / name).dense, expected.dense)


def test_several_files_are_read_in_the_order_of_their_numbers(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    for day in (10, 9, 0):
        write(folder / f"day_{day}", [line("1", [str(day)])] * 3)
    for spec in (folder, folder / "day_*", [folder / "day_0", folder / "day_9", folder / "day_10"]):
        found = criteo.read(spec)
        np.testing.assert_allclose(np.expm1(found.dense[:, 0]), [0] * 3 + [9] * 3 + [10] * 3, rtol=1e-5)
    assert len(load(str(folder))) == len(load(f"{folder}/day_*")) == 9
    with pytest.raises(DataError, match="no file has a name of this pattern"):
        criteo.read(folder / "night_*")
    with pytest.raises(DataError, match=r"no file day_\* in this folder"):
        criteo.read(tmp_path)


def test_the_next_log_is_read_by_the_vocabularies_of_an_earlier_one(tmp_path):
    day = write(tmp_path / "a", [line("1", [], [v]) for v in ("a", "b", "a", "b", "b")])
    first = criteo.read(day, min_count=2, vocabulary_share=1)
    following = write(tmp_path / "b", [line("1", [], [v]) for v in ("c", "a", "b", "", "c", "c", "c")])
    second = criteo.read(following, vocabularies=first.vocabularies)
    assert second.features == first.features
    assert second.column("C1").ids.tolist() == [0, 2, 1, 0, 0, 0, 0]
    described, arrays = vocabulary.dump(first.vocabularies)
    again = vocabulary.restore(json.loads(json.dumps(described)), arrays)
    assert again["C1"].ids_of(["b", "A", None, "123"]).tolist() == [1, 2, 0, 0]
    with pytest.raises(ValueError, match="there is none of 'C2'"):
        criteo.read(following, vocabularies={"C1": again["C1"]})


def test_integers_are_log_transformed_and_missing_ones_zero(tmp_path):
    path = write(tmp_path / "train.txt", [line("1", ["", "0", "-2", "7"])])
    dataset = criteo.read(path)
    assert dataset.num_dense == 13
    np.testing.assert_allclose(dataset.dense[0, :4], [0, 0, 0, math.log(8)], rtol=1e-6)


def test_vocabulary_by_frequency_of_the_training_part(tmp_path):
    # a: 4 times, b: 3 times, c: twice, all among the first 80 %; d only later; the rest missing.
    values = ["a", "a", "b", "c", "a", "b", "a", "b", "c", "", "", "", "d", "d", "d"]
    path = write(tmp_path / "train.txt", [line("1", [], [value]) for value in values])
    dataset = criteo.read(path, min_count=3)
    name, size = dataset.features[0]
    assert (name, size) == ("C1", 4)  # out of vocabulary, a, b, missing
    ids = dict(zip(values, dataset.columns[0].ids.tolist(), strict=True))
    assert ids == {"a": 1, "": 2, "b": 3, "c": 0, "d": 0}  # missing is -1, before b in a tie
    assert criteo.read(path, min_count=1, max_size=3).features[0] == ("C1", 3)


def test_result_does_not_depend_on_chunks_compression_or_rows(tmp_path):
    rng = np.random.default_rng(0)
    lines = [
        line(str(rng.integers(2)), [str(i) for i in rng.integers(-2, 99, 13)], [f"{c:x}" for c in row])
        for row in rng.integers(0, 50, (300, 26))
    ]
    path = write(tmp_path / "train.txt", lines)
    with gzip.open(tmp_path / "day_0.gz", "wt") as file:
        file.write("\n".join(lines))
    datasets = [
        criteo.read(path),
        criteo.read(path, chunk_bytes=1000),
        criteo.read(tmp_path / "day_0.gz"),
        criteo.read(write(tmp_path / "more.txt", lines + lines), rows=300),
    ]
    for other in datasets[1:]:
        assert other.features == datasets[0].features
        for a, b in zip(datasets[0].columns, other.columns, strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(datasets[0].dense, other.dense)
        np.testing.assert_array_equal(datasets[0].labels, other.labels)


def test_files_that_are_no_logs(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*nope\.txt: No such file"):
        criteo.read(tmp_path / "nope.txt")
    with pytest.raises(DataError, match="has no line in Criteo's format"):
        criteo.read(write(tmp_path / "empty.txt", []))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"1\t" * 10000)[:40])
    with pytest.raises(DataError, match=r"cannot read .*cut\.gz"):
        criteo.read(tmp_path / "cut.gz")
    (tmp_path / "binary").write_bytes(b"\0" * (3 << 20))
    with pytest.raises(DataError, match=r"binary:1: a line of over \d+ bytes"):
        criteo.read(tmp_path / "binary", chunk_bytes=1 << 18)


@given(
    st.lists(st.integers(-3, 12), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(3, 12),
    st.integers(1, 3),
)
def test_vocabulary(values, min_count, max_size, oov):
    column = np.array(values)
    vocabulary = Vocabulary.fit(column, min_count=min_count, max_size=max_size, oov=oov)
    counts = {v: values.count(v) for v in values}
    ranked = sorted((v for v in counts if counts[v] >= min_count), key=lambda v: (-counts[v], v))[
        : max_size - oov
    ]
    assert len(vocabulary) == oov + len(ranked) <= max_size
    unseen = np.array([1000, 2000])
    ids = vocabulary.encode(np.concatenate([column, unseen]))
    for value, i in zip(values, ids, strict=False):
        assert i == oov + ranked.index(value) if value in ranked else 0 <= i < oov
    assert (ids[-2:] < oov).all()
    np.testing.assert_array_equal(ids[-2:], vocabulary.encode(unseen))  # hashing depends on the value alone


def test_vocabulary_arguments():
    for arguments in ({"min_count": 0}, {"oov": 0}, {"max_size": 1, "oov": 2}):
        with pytest.raises(ValueError, match=rf"{next(iter(arguments))}: expected .*, got \d"):
            Vocabulary.fit(np.arange(3), **arguments)
