"""Calls of every kind of module: inputs in any form, other dtypes and modes of torch, derivatives."""

import copy

import pytest
import torch
from test_lifecycles import SERVING, every, make

import mprec.optim


def misaligned(tensor):
    memory = bytearray(b"x" + tensor.contiguous().numpy().tobytes())
    return torch.frombuffer(memory, dtype=tensor.dtype, offset=1).view(tensor.shape)


FORMS = {
    "misaligned": misaligned,
    "strided": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
    "lazily negated": lambda tensor: torch._neg_view(-tensor),
    **{
        str(dtype): lambda tensor, dtype=dtype: tensor if tensor.is_floating_point() else tensor.to(dtype)
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32)
    },
}


@every
@pytest.mark.parametrize("form", FORMS)
def test_inputs_in_any_form(name, form):
    module, example, *_ = make(name)
    arguments = [FORMS[form](tensor) for tensor in example]
    if name in ("embedding", "low-rank embedding") and arguments[0].dtype.itemsize < 4:
        with pytest.raises(RuntimeError, match="Long, Int"):  # as torch.nn.Embedding
            module(*arguments)
        return
    parameters = list(module.parameters())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            outputs = [module(*inputs) for inputs in (arguments, example)]
            torch.testing.assert_close(*outputs)
            if outputs[0].requires_grad:
                grads = [
                    torch.autograd.grad(out.square().sum(), parameters, allow_unused=True) for out in outputs
                ]
                torch.testing.assert_close(*grads)


@every
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_does_not_matter(name, default):
    module, example, *_ = make(name)
    expected = module(*example).detach()
    tables, _ = mprec.optim.split_parameters(module)
    try:
        torch.set_default_dtype(default)
        out = module(*example)
        torch.testing.assert_close(out.detach(), expected)
        if out.requires_grad:
            owner = mprec.optim.RowWiseAdagrad(tables, lr=0.1) if tables else None
            module(*example).square().sum().backward()
            assert owner is None or any(state["sum"].any() for state in owner.state.values())
    finally:
        torch.set_default_dtype(torch.float32)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_casts(name, dtype):
    """The same function, as precisely as its numbers are; what is packed for serving refuses to be cast."""
    module, example, *_ = make(name)
    expected = module(*example).detach().double()
    if name in SERVING and name != "means for unseen":
        with pytest.raises(TypeError, match="keep"):
            module.to(dtype)
        return
    arguments = [a.to(dtype) if a.is_floating_point() else a for a in example]
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            out = module.to(dtype)(*arguments)
        assert out.dtype == dtype
        torch.testing.assert_close(out.detach().double(), expected, rtol=8 * eps, atol=8 * eps)


@every
def test_autocast(name):
    module, example, *_ = make(name)
    expected = module(*example).detach()
    with torch.autocast("cpu", torch.bfloat16):
        out = module(*example)
    torch.testing.assert_close(out.detach().float(), expected, rtol=0.05, atol=0.05)
    if out.requires_grad:
        out.float().square().sum().backward()
        assert any(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@every
def test_inference_mode(name):
    module, example, *_ = make(name)
    expected = module(*example).detach()
    with torch.inference_mode():
        torch.testing.assert_close(module(*example), expected)
        if "cached" in name:
            with pytest.raises(ValueError, match="inference_mode carry no version counter"):
                make(name)[0](*example)
            return
        made_there = make(name)[0]
        torch.testing.assert_close(made_there(*example), expected)
    with torch.no_grad():
        torch.testing.assert_close(made_there(*example), expected)


@every
def test_forward_mode_is_the_directional_derivative(name):
    """Against differences of float64, and backward mode against forward mode."""
    module, example, *_ = make(name)
    if not module(*example).requires_grad:
        return
    precise = copy.deepcopy(module).double()
    inputs = [a.double() if a.is_floating_point() else a for a in example]
    generator = torch.Generator().manual_seed(1)
    values = {key: value.detach().clone() for key, value in module.named_parameters()}
    tangents = {key: torch.randn(value.shape, generator=generator) for key, value in values.items()}

    def of(parameters):
        return torch.func.functional_call(module, parameters, example)

    def beside(step):
        moved = {key: value.double() + step * tangents[key] for key, value in values.items()}
        return torch.func.functional_call(precise, moved, tuple(inputs)).detach()

    _, found = torch.func.jvp(of, (values,), (tangents,))
    torch.testing.assert_close(found.double(), (beside(1e-6) - beside(-1e-6)) / 2e-6, rtol=1e-4, atol=1e-4)
    output, gradient = torch.func.vjp(of, values)
    (back,) = gradient(torch.ones_like(output))
    inner = sum((back[key] * tangents[key]).sum() for key in values)
    torch.testing.assert_close(inner, found.sum(), rtol=1e-4, atol=1e-3)


HOOKS = [
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
]


@every
@pytest.mark.parametrize("kind", HOOKS)
def test_no_hook_is_passed_over(name, kind):
    """On the module and whatever is in it: a hook is run, or refused."""
    module, example, *_ = make(name)
    backward = "backward" in kind
    for part_name, part in list(module.named_modules()):
        if isinstance(part, torch.nn.ModuleDict | torch.nn.ModuleList):
            continue  # never called
        for grad in (True,) if backward else (True, False):
            ran = []
            handle = getattr(part, kind)(lambda *of, ran=ran: ran.append(of) and None)
            try:
                with torch.set_grad_enabled(grad):
                    for _ in range(2):  # what a first call packs or keeps
                        out = module(*example)
                    if backward and not out.requires_grad:
                        continue
                    if backward:
                        out.square().sum().backward()
            except TypeError as error:
                ran.append(error)
            finally:
                handle.remove()
            assert ran, part_name
