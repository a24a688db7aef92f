"""The table of operators is whole: what one entry promises, torch has."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mprec.errors import IdOutOfRangeError, InvalidOffsetsError
from mprec.kernels import kernel, kernels
from mprec.ops._table import OPS

DIFFERENTIABLE = {
    "embedding_bag",
    "embedding_bag_multi",
    "dhe_bag",
    "dhe_bag_multi",
    "mlp",
    "dot_interaction",
}


@pytest.mark.parametrize("name", OPS)
def test_an_entry_is_an_operator_with_something_to_run(name):
    op = OPS[name]
    assert op.overload is getattr(torch.ops.mprec, name).default
    assert op.arguments == [a.name for a in op.overload._schema.arguments]
    assert op.reference is not None or kernels(name, "cpu")
    assert (op.formula is not None) == (name in DIFFERENTIABLE)


def test_every_operator_of_the_library_is_an_entry():
    names = torch._C._dispatch_get_all_op_names()
    found = {name.removeprefix("mprec::") for name in names if name.startswith("mprec::")}
    assert found - {"report_faults"} == set(OPS)  # that one is a part of Triton's launches


def test_the_first_kernel_that_supports_a_call_runs(monkeypatch):
    monkeypatch.setattr("mprec.kernels._kernels", {})
    monkeypatch.setattr("mprec.kernels._LATE", {})
    kernel("dot_interaction", device="cpu", supports=lambda call: call.vectors.shape[0] == 1)(lambda _: "one")
    kernel("dot_interaction", device="cpu", supports=lambda call: call.vectors.shape[0] < 3)(lambda _: "few")
    run = OPS["dot_interaction"].run
    assert run(torch.zeros(1, 2, 2)) == "one"
    assert run(torch.zeros(2, 2, 2)) == "few"
    assert run(torch.zeros(3, 2, 2)).shape == (3, 1)  # the reference
    assert run(torch.zeros(1, 2, 2), device="cuda").shape == (1, 1)


@pytest.mark.parametrize("name", ["embedding_bag_backward", "dhe_bag_backward"])
@pytest.mark.parametrize(
    ("indices", "offsets", "error"),
    [([0, -1], [0, 1, 2], IdOutOfRangeError), ([0, 1], [0, 3, 2], InvalidOffsetsError)],
)
def test_gradients_refuse_bad_bags(name, indices, offsets, error):
    bags, grad = (torch.tensor(indices), torch.tensor(offsets)), torch.ones(2, 3)
    if name == "dhe_bag_backward":
        stack = torch.ones(4, 2, dtype=torch.int32), [torch.ones(3, 2)], [torch.ones(3)]
        arguments = (*bags, *stack, "universal", "relu", "none", 0, None, True, -1, False)
    else:
        arguments = (torch.ones(5, 3), *bags, 0, None, True, -1, False, False, True, False)
    with pytest.raises(error):
        getattr(torch.ops.mprec, name)(grad, *arguments)


class _Seen(TorchDispatchMode):
    """Names of the library's operators that the dispatcher was asked for."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        if operator.namespace == "mprec":
            self.names.add(operator._schema.name.removeprefix("mprec::"))
        return operator(*arguments, **(options or {}))


@pytest.mark.parametrize("name", ["embedding_bag", "embedding_bag_multi"])
@pytest.mark.parametrize("sparse", [False, True])
def test_training_is_the_same_watched_and_unwatched(name, sparse):
    """Without a mode, kernels of a forward and backward pass are called past the dispatcher."""
    several = name == "embedding_bag_multi"
    indices, offsets = torch.tensor([1, 3, 3, 0]), torch.tensor([0, 3, 4] if several else [0, 3])

    def run(mode):
        tables = [torch.arange(8.0).view(4, 2).requires_grad_() for _ in range(1 + several)]
        with mode:
            operator = getattr(torch.ops.mprec, name)
            pooled = operator(tables if several else tables[0], indices, offsets, sparse=sparse)
            pooled.square().sum().backward()
        return [pooled.detach(), *(table.grad.to_dense() for table in tables)]

    seen = _Seen()
    watched, unwatched = run(seen), run(contextlib.nullcontext())
    assert seen.names == {name, f"{name}_backward"}
    for a, b in zip(watched, unwatched, strict=True):
        assert torch.equal(a, b)


def test_training_without_memory_gives_shapes():
    table = torch.empty(4, 2, device="meta", requires_grad=True)
    indices, offsets = torch.empty(5, dtype=torch.int64, device="meta"), torch.arange(3, device="meta")
    pooled = torch.ops.mprec.embedding_bag(table, indices, offsets)
    pooled.backward(torch.ones_like(pooled))
    assert (pooled.device.type, pooled.shape, table.grad.shape) == ("meta", (3, 2), (4, 2))
