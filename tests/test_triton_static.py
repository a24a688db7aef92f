"""What the compiler makes of the kernels for absent GPUs: no spills, and the matrix unit in use."""

import pytest
import torch
from mprec.triton_kernels import dhe, static, tuning
from mprec.triton_kernels.dense import dot_precision
from mprec.triton_kernels.hashing import FAMILIES

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def compile_first_layer(target, count, k, width, dtype, family="universal"):
    config = tuning.first_layer_config(target, count, k, width, dtype)
    pointer = POINTERS[dtype]
    types = {"ids": "*i64", "coefficients": "*i32", "weight": pointer, "bias": pointer, "out": pointer}
    constants = {
        "K": k,
        "N": width,
        "FAMILY": FAMILIES[family],
        "ACTIVATION": 1,
        "PRECISION": dot_precision(target),
    }
    constants |= {"BM": config.BM, "BN": config.BN, "BK": config.BK, "STAGES": config.STAGES}
    compiled = static.compile_kernel(
        dhe.first_layer_kernel, {**types, "count": "i32"}, constants, target, types, num_warps=config.warps
    )
    return config, compiled


def compile_fused(target, count, k, widths, dtype, family="universal"):
    config = tuning.fused_config(target, count, k, widths, dtype)
    types = {"ids": "*i64", "coefficients": "*i32", "out": POINTERS[dtype]}
    types |= {f"{letter}{layer}": POINTERS[dtype] for letter in "wb" for layer in (1, 2, 3)}
    h1, h2, h3 = (*widths, 0)[:3]
    constants = {
        "K": k,
        "H1": h1,
        "H2": h2,
        "H3": h3,
        "FAMILY": FAMILIES[family],
        "PRECISION": dot_precision(target),
    }
    constants |= {"ACTIVATION": 1, "LAST_ACTIVATION": 2, "BM": config.BM, "BN": config.BN, "BK": config.BK}
    constants |= {"BH2": tuning.tile_width(h2), "BH3": tuning.tile_width(h3), "STAGES": config.STAGES}
    compiled = static.compile_kernel(
        dhe.fused_kernel, {**types, "count": "i32"}, constants, target, types, num_warps=config.warps
    )
    return config, compiled


def check(report, config, target):
    assert report.spill_stores == 0
    assert report.spill_loads == 0
    assert report.shared <= static.SHARED_LIMIT[target]
    assert not report.warnings  # C75xx: wgmma serialised
    assert report.hot_loops()
    for loop in report.hot_loops():
        assert report.count("LDL", "STL", loop=loop) == 0
    expected = "HGMMA" if target == "sm_90" and config.BM >= 64 else "HMMA"
    assert report.mma.startswith(expected)


EVERY_DTYPE_AND_COUNT = [
    pytest.param(count, dtype, marks=[] if (count, dtype) == (2048, torch.bfloat16) else [pytest.mark.slow])
    for count in (1, 2048, 53248)
    for dtype in POINTERS
]


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("count", "dtype"), EVERY_DTYPE_AND_COUNT)
def test_first_layer(count, dtype, target):
    config, compiled = compile_first_layer(target, count, 1024, 512, dtype)
    check(static.inspect(compiled, target), config, target)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("count", "dtype"), EVERY_DTYPE_AND_COUNT)
def test_fused(count, dtype, target):
    config, compiled = compile_fused(target, count, 1024, [128, 16], dtype)
    check(static.inspect(compiled, target), config, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("family", ["artifact", "sign", "u7"])
def test_families(family, target):
    config, compiled = compile_first_layer(target, 53248, 1024, 512, torch.bfloat16, family)
    check(static.inspect(compiled, target), config, target)


def test_hashes_cost_few_instructions():
    """On sm_90, every instruction of the hot loop counted: at most 16 issue slots per hash of a short ID."""
    config, compiled = compile_first_layer("sm_90", 53248, 1024, 512, torch.bfloat16)
    loops = static.inspect(compiled, "sm_90").hot_loops()
    slots = [sum(loop.values()) * config.warps * 32 / (config.BM * config.BK) for loop in loops]
    assert min(slots) <= 16
    assert max(slots) <= 24  # IDs of more than 30 bits


def test_ragged_shapes_compile():
    for target in ("sm_80", "sm_90"):
        config, compiled = compile_fused(target, 5000, 70, [40, 33, 7], torch.bfloat16)
        check(static.inspect(compiled, target), config, target)


def test_gfx942_compiles():
    _, compiled = compile_first_layer("gfx942", 53248, 1024, 512, torch.bfloat16)
    assert "v_mfma" in compiled.asm["amdgcn"]
