"""Operators on CUDA check what their twins on the CPU check, before a kernel is launched."""

from functools import partial

import pytest
import torch

from mprec.ops._table import OPS

#: Where the arguments are. The functions that serve CUDA are called past the dispatcher, on tensors without
#: memory: what they check needs none.
devices = pytest.mark.parametrize("device", ["cpu", "meta"])


def operator(name: str, device: str):
    return partial(OPS[name].run, device="cuda" if device == "meta" else "cpu")


def arguments(name: str, device: str) -> dict:
    def of(*shape, dtype=torch.float32):
        return torch.zeros(*shape, dtype=dtype, device=device)

    bags = {"indices": of(4, dtype=torch.int64), "mode": 0}
    bags["offsets"] = torch.arange(5, device=device)
    bags["per_sample_weights"] = None
    several = bags | {"features": [1, 0], "num_features": 2}
    if name == "embedding_bag":
        return bags | {"weight": of(9, 4), "include_last_offset": True}
    if name == "embedding_bag_multi":
        return several | {"weights": [of(9, 4), of(9, 8)]}
    if name == "quantized_embedding_bag_multi":
        return several | {"rows": [of(9, 12, dtype=torch.uint8), of(9, 4)], "bits": [8, 8]}
    stack = {"coefficients": of(4, 6, dtype=torch.int32) + 1, "weights": [of(4, 6)], "biases": [of(4)]}
    options = {"family": "universal", "activation": "relu", "last_activation": "none"}
    cache = {"keys": of(8, dtype=torch.int64), "rows": of(8, 4), "probes": 2}
    return bags | stack | options | cache | {"include_last_offset": True}


BAD = [
    ("indices", lambda t: t.float(), TypeError, "indices: expected integers"),
    ("indices", lambda t: t[None], ValueError, "indices has to be a 1D Tensor"),
    ("offsets", lambda t: t[None], ValueError, "offsets has to be a 1D Tensor"),
    ("mode", lambda _: 7, ValueError, "mode: expected 0"),
    (
        "per_sample_weights",
        lambda _: "short",
        ValueError,
        "per_sample_weights: expected the shape of indices",
    ),
    (
        "per_sample_weights",
        lambda _: "double",
        TypeError,
        "per_sample_weights: expected to have the same type",
    ),
    ("indices", lambda _: "elsewhere", ValueError, "expected one device"),
]
OF_SEVERAL = [
    ("features", lambda _: [7, 0], ValueError, r"features\[0\]: expected in \[0, 2\), got 7"),
    ("features", lambda _: [0], ValueError, "features: expected one for each of 2 parts, got 1"),
    ("num_features", lambda _: 0, ValueError, "num_features: expected at least 1, got 0"),
    ("offsets", lambda t: t[:4], ValueError, "1 . a multiple of the number of features, 2"),
]
OWN = {
    "embedding_bag": [("weight", lambda t: t[0], ValueError, "weight has to be a 2D Tensor")],
    "embedding_bag_multi": [
        ("weights", lambda _: [], ValueError, "at least one table"),
        ("weights", lambda t: [t[0], t[1].half()], TypeError, r"weights\[1\]: expected torch.float32"),
        *OF_SEVERAL,
    ],
    "quantized_embedding_bag_multi": [
        ("bits", lambda _: [8], ValueError, "of equal number, got 2, 1"),
        ("bits", lambda _: [3, 8], ValueError, r"bits\[0\]: expected 8 or 4 or 43, got 3"),
        ("rows", lambda t: [t[0].long(), t[1]], TypeError, r"rows\[0\]"),
        *OF_SEVERAL,
    ],
    "cached_dhe_bag": [
        ("keys", lambda t: t.int(), TypeError, "keys: expected int64"),
        ("keys", lambda t: t[:7], ValueError, "keys: expected a power of two"),
        ("rows", lambda t: t[:, :3], ValueError, r"rows: expected \[8, 4\], got \[8, 3\]"),
        ("probes", lambda _: 0, ValueError, "probes: expected at least 1, got 0"),
        ("coefficients", lambda t: t[:2], ValueError, r"coefficients: expected \[4, k\]"),
        ("weights", lambda t: [t[0][:, :5]], ValueError, r"layer 0: expected weight \[out, 6\]"),
    ],
}
CASES = [(name, *case) for name, own in OWN.items() for case in BAD + own]


@devices
@pytest.mark.parametrize(("name", "argument", "change", "error", "message"), CASES)
def test_twins_check_alike(name, argument, change, error, message, device):
    call = arguments(name, device)
    bad = change(call[argument])
    if isinstance(bad, str):
        bad = {
            "short": lambda: torch.zeros(3, device=device),
            "double": lambda: torch.zeros(4, dtype=torch.float64, device=device),
            "elsewhere": lambda: torch.zeros(
                4, dtype=torch.int64, device="meta" if device == "cpu" else "cpu"
            ),
        }[bad]()
    with pytest.raises(error, match=message):
        operator(name, device)(**(call | {argument: bad}))


@pytest.mark.parametrize("name", OWN)
def test_good_arguments_pass_the_checks(name):
    operator(name, "cpu")(**arguments(name, "cpu"))
