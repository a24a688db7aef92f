import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mprec.serving import rows_to_batch

VOCABULARIES = [10, 1000, 3]
bags = st.one_of(st.integers(0, 2), st.lists(st.integers(0, 2), max_size=4))
rows = st.lists(st.tuples(bags, bags, bags).map(list), min_size=1, max_size=6)


@given(rows)
def test_bags_are_feature_major(ids):
    dense = [[float(b), 0.5] for b in range(len(ids))]
    batch = rows_to_batch(ids, dense, VOCABULARIES, 2)
    assert batch.dense.tolist() == dense
    assert len(batch) == len(ids)
    for t in range(3):
        for b, row in enumerate(ids):
            start, end = batch.offsets[t * len(ids) + b], batch.offsets[t * len(ids) + b + 1]
            wanted = row[t] if isinstance(row[t], list) else [row[t]]
            assert batch.indices[start:end].tolist() == wanted
    assert batch.indices.dtype == batch.offsets.dtype == torch.int64


@pytest.mark.parametrize(
    ("ids", "dense", "match"),
    [
        ([], None, "at least one row"),
        ("ab", None, "at least one row"),
        ([[1, 2]], None, r"ids\[0\]: expected an entry for each of the 3"),
        ([[1, 2, 0], [1, 2]], None, r"ids\[1\]"),
        ([[1, 2, 3]], None, r"ids\[0\]\[2\]: 3 is not an integer in \[0, 3\)"),
        ([[1, -2, 0]], None, r"ids\[0\]\[1\]: -2"),
        ([[1, 2.0, 0]], None, r"ids\[0\]\[1\]: 2.0"),
        ([[True, 2, 0]], None, r"ids\[0\]\[0\]: True"),
        ([[1, 2, False]], None, r"ids\[0\]\[2\]: False"),
        ([["1", 2, 0]], None, r"ids\[0\]\[0\]: '1'"),
        ([[1, 2**70, 0]], None, r"ids\[0\]\[1\]"),
        ([[1, [2, None], 0]], None, r"ids\[0\]\[1\]: None"),
        ([[[0] * 9, 2, 0]], None, "at most 8 IDs"),
        ([[1, 2, 0]], [], "dense: expected a row"),
        ([[1, 2, 0]], [[1.0, 2.0]], r"dense\[0\]: expected 1 numbers"),
        ([[1, 2, 0]], [["x"]], r"dense\[0\]\[0\]: 'x' is not a number"),
        ([[1, 2, 0]], [[True]], r"dense\[0\]\[0\]: True"),
        ([[1, 2, 0]], [[math.nan]], "not finite"),
        ([[1, 2, 0]], [[1e300]], "not finite"),
        ([[1, 2, 0]], [[10**400]], "not finite"),
    ],
)
def test_what_is_wrong_is_named(ids, dense, match):
    with pytest.raises(ValueError, match=match):
        rows_to_batch(ids, dense, VOCABULARIES, 0 if dense is None else 1, max_ids=8)


def test_large_integers_and_integers_as_numbers_are_taken():
    batch = rows_to_batch([[2**40]], [[3]], [2**41], 1)
    assert batch.indices.tolist() == [2**40]
    assert batch.dense.tolist() == [[3.0]]
