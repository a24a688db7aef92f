"""JSON read by native code gives what a general parser gives, and takes nothing that it refuses."""

import json

import numpy as np
import pytest
import torch
from http_serving import INPUTS
from hypothesis import given, settings
from hypothesis import strategies as st

from mprec._native import _C
from mprec.serving import QueryTooLargeError
from mprec.serving.build import ModelInputs
from mprec.serving.http.parse import Limits, _any_json, _common_json, parse_json

LIMITS = Limits(max_samples=6, max_ids=20)
BARE = ModelInputs([5, 3], ["a", "b"], 0)


def equal(got, expected):
    """Tensors of equal dtypes, shapes and values, and equal targets."""
    for name in ("dense", "indices", "offsets", "labels"):
        one, other = getattr(got[0], name), getattr(expected[0], name)
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(one, other)
    assert got[1] == expected[1]


@st.composite
def queries(draw):
    bag = st.one_of(st.integers(0, 9), st.lists(st.integers(0, 9), max_size=2))
    size = draw(st.integers(1, 6))
    numbers = st.one_of(st.floats(-1e38, 1e38), st.integers(-(10**20), 10**20), st.floats(-1, 1, width=32))
    query = {
        "ids": [[draw(bag), draw(bag)] for _ in range(size)],
        "dense": [[draw(numbers)] for _ in range(size)],
    }
    if draw(st.booleans()):
        query["sla_ms"] = draw(st.one_of(st.integers(1, 3_600_000), st.floats(1e-6, 3e6)))
    keys = draw(st.permutations(list(query)))
    indent = draw(st.sampled_from([None, 0, 1, "\t"]))
    separators = draw(st.sampled_from([(",", ":"), (" , ", " :\n")]))
    return json.dumps({key: query[key] for key in keys}, indent=indent, separators=separators).encode()


@settings(max_examples=400, deadline=None)
@given(queries())
def test_queries_are_what_a_general_parser_makes_of_them(body):
    try:
        expected = _any_json(body, INPUTS, LIMITS)
    except QueryTooLargeError:
        assert _common_json(body, INPUTS, LIMITS) is None
        return
    found = _common_json(body, INPUTS, LIMITS)
    assert found is not None
    equal(found, expected)


@settings(max_examples=1000, deadline=None)
@given(queries(), st.data())
def test_whatever_is_taken_of_damaged_queries_is_taken_by_a_general_parser_too(body, data):
    at = data.draw(st.integers(0, len(body) - 1))
    kind = data.draw(st.sampled_from(["cut", "drop", "change", "repeat"]))
    if kind == "cut":
        body = body[:at]
    elif kind == "drop":
        body = body[:at] + body[at + 1 :]
    elif kind == "change":
        body = (
            body[:at]
            + data.draw(st.sampled_from(list(b'0123456789+-.eE[]{},: "\\tfn\x00'))).to_bytes()
            + body[at + 1 :]
        )
    else:
        body = body[:at] + body[at : at + 1] + body[at:]
    try:
        found = _common_json(body, INPUTS, LIMITS)
    except ValueError:
        with pytest.raises(ValueError, match="sla_ms"):
            _any_json(body, INPUTS, LIMITS)
        return
    if found is not None:
        equal(found, _any_json(body, INPUTS, LIMITS))


@pytest.mark.parametrize(
    "number",
    [
        *("0", "-0", "-0.0", "0.5", "1e5", "1E+5", "1e-5", "123456789012345678", "9007199254740993"),
        *("0.1", "2.2250738585072014e-308", "3.4028234663852886e38", "1.17549435e-38", "1e-45", "7e-46"),
        *("0.30000000000000004", "123456789.123456789", "0.000000000000000000000123", "1e22", "1e23"),
        *("179769313486231570000.0", "8388608.5", "16777217", "1.00000017881393432617187499"),
    ],
)
def test_numbers_are_rounded_as_elsewhere(number):
    body = b'{"ids":[[1,2]],"dense":[[%s]]}' % number.encode()
    found = _common_json(body, INPUTS, LIMITS)
    assert found is not None
    assert found[0].dense.numpy().tobytes() == np.float32(float(number)).tobytes()
    equal(found, _any_json(body, INPUTS, LIMITS))


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"{}", b"null", b'{"ids":[]}', b'{"ids":[[1,2]]}', b'{"dense":[[1]]}'),
        b'{"ids":[[1,2]],"dense":[[1]]} x',
        b'{"ids":[[1,2]],"dense":[[1]],}',
        b'{"ids":[[1,2]],"dense":[[1]],"ids":[[1,2]]}',
        b'{"ids":[[1,2]],"dense":[[1]],"other":1}',
        b'{"ids":[[1,2],[1,2]],"dense":[[1]]}',
        b'{"ids":[[1,2]],"dense":[[1],[2]]}',
        *(
            b'{"ids":[[%s,2]],"dense":[[1]]}' % s
            for s in (b"01", b"-1", b"10", b"1.0", b"true", b'"1"', b"[1,]")
        ),
        *(
            b'{"ids":[[1,2]],"dense":[[%s]]}' % s
            for s in (b"01", b".5", b"1.", b"+1", b"1e", b"NaN", b"1e39", b"1e400")
        ),
        b'{"ids":[[1,%s]],"dense":[[1]]}' % (b"9" * 30),
        b'{"ids":[[1,[%s]]],"dense":[[1]]}' % b",".join([b"1"] * 20),
        b'{"ids":[[1,2]],"dense":[[1]],"sla_ms":0}',
        b'{"ids":[[1,2]],"dense":[[1]],"sla_ms":null}',
    ],
)
def test_all_else_is_left_to_a_general_parser(body):
    assert _common_json(body, INPUTS, LIMITS) is None


def test_models_without_dense_numbers():
    expected = _any_json(b'{"ids":[[4,[]],[0,[2,2]]]}', BARE, LIMITS)
    equal(_common_json(b'{"ids":[[4,[]],[0,[2,2]]]}', BARE, LIMITS), expected)
    assert _common_json(b'{"ids":[[4,2]],"dense":[[]]}', BARE, LIMITS) is None
    equal(
        parse_json(b'{"ids":[[4,2]],"dense":null}', BARE, LIMITS), _any_json(b'{"ids":[[4,2]]}', BARE, LIMITS)
    )


def test_large_queries_are_read_without_the_interpreters_lock():
    """More bytes than are read with it; and more bags than one."""
    rng = np.random.default_rng(0)
    inputs = ModelInputs([1000] * 26, [str(t) for t in range(26)], 13)
    ids = rng.integers(1000, size=(128, 26)).tolist()
    ids[5][3], ids[127][25] = [1, 2, 3], []
    body = json.dumps({"ids": ids, "dense": rng.normal(size=(128, 13)).tolist(), "sla_ms": 7}).encode()
    found = _common_json(body, inputs, Limits())
    assert found[1] == 0.007
    equal(found, _any_json(body, inputs, Limits()))


def test_arguments_of_the_native_reader_are_checked():
    with pytest.raises(ValueError, match="num_dense"):
        _C.read_json_query(b"{}", np.array([1]), -1, 1, 1)
    with pytest.raises((TypeError, ValueError), match="vocabularies"):
        _C.read_json_query(b"{}", torch.ones(2), 0, 1, 1)
