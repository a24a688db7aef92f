"""What the compiler makes of the kernels for absent GPUs: spills, matrix instructions, loads."""

import functools
import itertools
import re

import cuda_kernels
import pytest
import torch
from mprec.triton_kernels import catalogue, dhe, static

CPU = torch.device("cpu")
CASES = {case.name: case for case in catalogue.CASES}
# one of each kind in the quick run; the others take minutes
QUICK = {
    "dhe 1024-128-16 universal bfloat16",
    "embedding_bag d64 float32 pooling 1",
    "embedding_bag d64 int4 pooling 1",
    "gradient d64 rowwise adagrad",
}
# float16 decoders are bfloat16's with another conversion: gpu_static.json has them
ALL = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in CASES
    if not re.match("dhe .* float16", name)
]
DTYPES = {"sm_80": [torch.float32, torch.bfloat16]}
DTYPES["sm_90"] = [*DTYPES["sm_80"], torch.float8_e4m3fn]


@functools.cache
def launches(name: str, target: str, samples: int = 2048) -> list[dict]:
    """The facts of what a case of `CASES` launches; compiled once for all tests here."""
    call = CASES[name].make(CPU, samples)
    with static.recorded(target) as recorded:
        call.run()
    assert recorded
    return [static.describe(launch, target) for launch in recorded]


def check(facts: dict):
    target = facts["target"]
    assert facts["shared"] <= static.SHARED_LIMIT[target]
    assert facts["warnings"] == []  # C75xx: wgmma serialised
    assert facts["spills_in_hot_loop"] == 0
    # a few words around the loops, once per tile, cost nothing that could be measured
    assert facts["spill_bytes"] <= 256
    if "BK" in facts["tile"]:
        wgmma = target == "sm_90" and facts["tile"].get("BM", 64) >= 64
        instruction = r"QGMMA\.64x\d+x32\.F32\.E4M3" if facts["dtype"] == "fp8e4nv" else "HGMMA"
        assert re.match(instruction if wgmma else "HMMA", facts["mma"])
        assert facts["mma_per_useful"] == 1.0
    else:
        assert facts["row_load_ratio"] <= 1.05


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", ALL)
def test_gates(name, target):
    if not CASES[name].serves(target):
        pytest.skip(f"{target} has no such products")
    for facts in launches(name, target):
        check(facts)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_gates_of_every_default_tile(target):
    """Each choice of `tuning` over batch sizes, shapes and types, by the first shape that gets it."""
    large, small = [512, 256, 64], [128, 16]
    shapes = [(2048, large), (2048, small), (80, large), (80, small), (1, small), (1, [64])]
    seen = set()
    for (samples, widths), dtype in itertools.product(shapes, DTYPES[target]):
        case = catalogue.dhe_case(1024, widths, dtype)
        steps = dhe.default_steps(target, samples * catalogue.FEATURES, 1024, widths, dtype)
        chosen = {(*step, first == 0, dtype) for first, step in enumerate(steps)}
        if not chosen <= seen:
            CASES.setdefault(case.name, case)
            for facts in launches(case.name, target, samples):
                check(facts)
        seen |= chosen
    assert len(seen) >= 15


def test_hashes_cost_few_instructions():
    """On sm_90, every instruction of the hot loop counted: at most 16 issue slots per hash of a short ID."""
    (facts,) = launches("dhe 1024-128-16 universal bfloat16", "sm_90")
    short, long = facts["slots_per_hash"]
    assert short <= 16
    assert long <= 24  # IDs of more than 30 bits


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_gates_of_one_feature(target):
    """Whose tensors are arguments of the launch, and not in a table."""
    weights, biases = [torch.zeros(128, 1024), torch.zeros(16, 128)], [torch.zeros(128), torch.zeros(16)]
    stack = [[tensor.bfloat16() for tensor in part] for part in (weights, biases)]
    bags = torch.zeros(4096, dtype=torch.int64), torch.arange(4096)
    with static.recorded(target) as recorded:
        hashes = torch.ones(4, 1024, dtype=torch.int32)
        cuda_kernels.dhe_bag(*bags, hashes, *stack, "universal", "relu", "sigmoid")
    assert [launch.kernel for launch in recorded] == ["fused_kernel", "embedding_bag_kernel"]
    for launch in recorded:
        check(static.describe(launch, target))


@pytest.mark.slow
def test_ragged_shapes():
    case = catalogue.dhe_case(70, [40, 33, 7], torch.bfloat16)
    CASES[case.name] = case
    for target in ("sm_80", "sm_90"):
        for facts in launches(case.name, target):
            check(facts)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "mma"), [("gfx942", "v_mfma"), ("sm_100", "UTCHMMA")])
def test_other_targets_compile(target, mma):
    """The others are in gpu_static.json."""
    assert all(f["mma"].startswith(mma) for f in launches("dhe 1024-128-16 universal bfloat16", target))
    assert launches("embedding_bag d64 int8 pooling 1", target)
    assert launches("gradient d64 sgd", target)
