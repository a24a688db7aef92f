"""Thousands of drawn calls to torch's embedding bag and to ours: the same values and gradients, or an
exception that an ``except`` clause written for torch's catches."""

import random

import pytest
import torch
import torch.nn.functional as F

import mprec.nn
from mprec import ops

CASES = 2400
INTEGERS = (torch.int64, torch.int32)


def drawn(seed: int) -> dict:
    """The arguments of ``embedding_bag``; about a third are wrong somewhere."""
    r = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, dim, bags = r.randint(1, 9), r.choice([1, 3, 8, 17]), r.randint(1, 5)
    dtype = r.choice([torch.float32, torch.float32, torch.float64])
    mode = r.choice(["sum", "mean", "max"])
    weight = torch.randn(rows, dim, generator=generator, dtype=dtype)
    call = {"mode": mode, "dtype": dtype}
    lengths = [r.choice([0, 1, 1, 2, 4]) for _ in range(bags)]
    if r.random() < 0.4:
        length = r.randint(1, 4)
        input, offsets = torch.randint(rows, (bags, length), generator=generator), None
    else:
        input = torch.randint(rows, (sum(lengths),), generator=generator)
        starts = [sum(lengths[:b]) for b in range(bags + 1)]
        call["include_last_offset"] = r.random() < 0.5
        offsets = torch.tensor(starts if call["include_last_offset"] else starts[:-1])
        kind = r.choice(INTEGERS)
        input, offsets = input.to(kind), offsets.to(kind)
    if mode == "sum" and r.random() < 0.4:
        call["per_sample_weights"] = torch.rand(input.shape, generator=generator, dtype=dtype)
    if r.random() < 0.3:
        call["padding_idx"] = r.randint(-rows, rows - 1)
    if mode != "max" and r.random() < 0.2:
        call["sparse"] = True
    if r.random() < 0.1:
        call["max_norm"] = 0.5
    call |= {"input": input, "weight": weight, "offsets": offsets}
    wrong = [lambda: None] * 22 + [
        lambda: call.update(input=input.clone().fill_(rows) if input.numel() else input),
        lambda: call.update(input=input.clone().fill_(-1) if input.numel() else input),
        lambda: call.update(input=input.to(torch.float32)),
        lambda: call.update(input=input[None, None]),
        lambda: call.update(weight=weight[0]),
        lambda: call.update(weight=weight[None]),
        lambda: call.update(offsets=None if offsets is not None else torch.tensor([0])),
        lambda: call.update(offsets=None if offsets is None else offsets[None]),
        lambda: call.update(offsets=None if offsets is None else offsets.to(torch.float32)),
        lambda: call.update(offsets=None if offsets is None else offsets + 1),
        lambda: call.update(mode=r.choice(["average", "", None])),
        lambda: call.update(padding_idx=r.choice([rows, -rows - 1])),
        lambda: call.update(per_sample_weights=torch.rand(input.numel() + 1, dtype=dtype)),
        lambda: call.update(per_sample_weights=torch.rand(input.shape).to(torch.float16)),
        lambda: call.update(per_sample_weights=torch.rand(input.shape, dtype=dtype), mode="max"),
        lambda: call.update(sparse=True, mode="max"),
        lambda: call.update(scale_grad_by_freq=True, mode="max"),
        lambda: call.update({k: v.to("meta") for k, v in call.items() if isinstance(v, torch.Tensor)}),
        lambda: call.update(weight=weight.to(torch.complex64)),
    ]
    r.choice(wrong)()
    return call


def outcome(function, call: dict):
    """(exception) or (None, result, the weight's gradient, the per-sample weights')."""
    call = dict(call)
    del call["dtype"]
    weight = call.pop("weight").detach().clone()
    weight.requires_grad_(weight.is_floating_point())
    psw = call.pop("per_sample_weights", None)
    if psw is not None:
        psw = psw.clone().requires_grad_(not call.get("sparse"))
    if call.get("max_norm") is not None:
        weight.requires_grad_(False)
        weight = weight.detach()
    try:
        out = function(call.pop("input"), weight, per_sample_weights=psw, **call)
        grad_out = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        if out.requires_grad:
            out.backward(grad_out)
        grad = weight.grad if weight.requires_grad else weight
        return None, out, None if grad is None else grad.to_dense(), None if psw is None else psw.grad
    except Exception as error:
        return error, None, None, None


def by_module(kind):
    def function(input, weight, offsets=None, per_sample_weights=None, **options):
        if weight.dim() != 2:
            raise ValueError("modules hold matrices")
        module = kind(*weight.shape, _weight=weight, **options)
        module.weight = (
            torch.nn.Parameter(weight) if weight.is_leaf and weight.requires_grad else module.weight
        )
        out = module(input, offsets, per_sample_weights)
        if weight.requires_grad:
            module.weight.register_hook(lambda grad: setattr(weight, "grad", grad.detach()))
        elif options.get("max_norm") is not None:
            weight.copy_(module.weight.detach())
        return out

    return function


def defined_by_torch(call: dict) -> bool:
    """False where torch drops data, and of weighted means, which only mprec has."""
    if call.get("per_sample_weights") is not None and call["mode"] == "mean":
        return False
    offsets, input = call["offsets"], call["input"]
    if (
        offsets is None
        or input.dim() != 1
        or offsets.dim() != 1
        or offsets.is_floating_point()
        or offsets.is_meta
    ):
        return True
    if offsets.numel() and int(offsets[0]) != 0:
        return True  # torch raises
    return not (call.get("include_last_offset") and offsets.numel() and int(offsets[-1]) != input.numel())


@pytest.mark.parametrize("form", ["function", "module"])
@pytest.mark.parametrize("part", range(6))
def test_calls_end_alike(form, part):
    theirs = F.embedding_bag if form == "function" else by_module(torch.nn.EmbeddingBag)
    ours = ops.embedding_bag if form == "function" else by_module(mprec.nn.EmbeddingBag)
    outcomes = {"values": 0, "exceptions": 0}
    for seed in range(part * CASES // 6, (part + 1) * CASES // 6):
        call = drawn(seed)
        if not defined_by_torch(call):
            continue
        error, *expected = outcome(theirs, call)
        mine, *found = outcome(ours, call)
        about = f"seed {seed}: torch {error!r}, mprec {mine!r}"
        assert (error is None) == (mine is None), f"{about}, {call}"
        if error is not None:
            assert isinstance(mine, type(error)), f"{about}, {call}"
            outcomes["exceptions"] += 1
            continue
        outcomes["values"] += 1
        for a, b in zip(found, expected, strict=True):
            assert (a is None) == (b is None), f"{about}, {call}"
            if a is not None and not b.is_meta:
                same = a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
                assert same, f"{about}: {a} is not {b}, {call}"
    assert outcomes["values"] > 200
    assert outcomes["exceptions"] > 100
