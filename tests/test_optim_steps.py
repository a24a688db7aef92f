"""Optimizers whose step() updates tables: accumulation, clipping, scaling; and who owns a table.

Replicas are in test_replicas.py.
"""

import copy
import gc

import pytest
import torch
from torch import nn

import mprec.nn
import mprec.optim

#: Ours, torch's of the same meaning for sparse gradients, arguments of both.
PAIRS = {
    "sgd": (mprec.optim.SGD, torch.optim.SGD),
    "adagrad": (mprec.optim.Adagrad, torch.optim.Adagrad),
    "adam": (mprec.optim.Adam, torch.optim.SparseAdam),
}
BATCHES = [torch.tensor([[1, 2], [2, 9]]), torch.tensor([[2, 3], [1, 1]])]


def bags(sparse=False):
    torch.manual_seed(0)
    ours = mprec.nn.EmbeddingBag(10, 4, mode="sum", sparse=sparse)
    theirs = nn.EmbeddingBag(10, 4, mode="sum", sparse=sparse)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def loss(bag, ids):
    return (bag(ids) * torch.arange(1.0, 5)).square().sum()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("sparse", [False, True])
def test_accumulated_gradients_make_one_step(name, sparse):
    if name == "adam" and not sparse:
        pytest.skip("torch's SparseAdam has no dense gradients")
    ours, theirs = bags(sparse)
    a = PAIRS[name][0](ours.parameters(), lr=0.1, in_backward=False)
    b = PAIRS[name][1](theirs.parameters(), lr=0.1)
    for _ in range(3):
        for bag, optimizer in ((ours, a), (theirs, b)):
            before = bag.weight.detach().clone()
            optimizer.zero_grad()
            for ids in BATCHES:
                loss(bag, ids).backward()
                assert torch.equal(bag.weight, before)
            assert bag.weight.grad.is_sparse == sparse
            optimizer.step()
        torch.testing.assert_close(ours.weight, theirs.weight)
    assert a.state[ours.weight]["step"] == 3


def test_clipping():
    ours, theirs = bags()
    a = mprec.optim.SGD(ours.parameters(), lr=0.1, in_backward=False)
    b = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for bag, optimizer in ((ours, a), (theirs, b)):
        loss(bag, BATCHES[0]).backward()
        assert nn.utils.clip_grad_norm_(bag.parameters(), 0.5) > 0.5
        optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_clipping_passes_by_what_the_backward_pass_has_applied():
    ours, twin = bags()
    top = nn.Linear(4, 1)
    a = mprec.optim.SGD(ours.parameters(), lr=0.1)
    b = torch.optim.SGD(twin.parameters(), lr=0.1)
    for bag, optimizer in ((ours, a), (twin, b)):
        top.zero_grad()
        (loss(bag, BATCHES[0]) + top(bag(BATCHES[0])).sum()).backward()
        optimizer.step()
    torch.testing.assert_close(ours.weight, twin.weight)
    assert nn.utils.clip_grad_norm_(ours.parameters(), 0.5) == 0.0
    both = nn.utils.clip_grad_norm_([*ours.parameters(), *top.parameters()], 1e9)
    assert both == nn.utils.get_total_norm([p.grad for p in top.parameters()])


@pytest.mark.parametrize("sparse", [False, True])
def test_grad_scaler_unscales_and_skips_what_is_not_finite(sparse):
    ours, theirs = bags(sparse)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    a = mprec.optim.RowWiseAdagrad(ours.parameters(), lr=0.1, in_backward=False)
    scaler.scale(loss(ours, BATCHES[0])).backward()
    scaler.step(a)
    scaler.update()
    b = mprec.optim.RowWiseAdagrad(theirs.parameters(), lr=0.1, in_backward=False)
    loss(theirs, BATCHES[0]).backward()
    b.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    a.zero_grad()
    before = ours.weight.detach().clone()
    scaler.scale(loss(ours, BATCHES[1]) * float("inf")).backward()
    scaler.step(a)
    scaler.update()
    assert torch.equal(ours.weight, before)
    assert a.state[ours.weight]["step"] == 1
    assert scaler.get_scale() == 512.0


def test_grad_scaler_is_told_what_it_needs():
    """A backward pass that updates tables leaves nothing to unscale."""
    ours, _ = bags()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = mprec.optim.SGD(ours.parameters(), lr=0.1)
    scaler.scale(loss(ours, BATCHES[0])).backward()
    with pytest.raises(RuntimeError, match="GradScaler needs in_backward=False"):
        scaler.step(optimizer)


def check_hooks_are_refused(ours):
    before = ours.weight.detach().clone()
    with pytest.raises(RuntimeError, match="has hooks on its gradient"):
        loss(ours, BATCHES[0]).backward()
    assert torch.equal(ours.weight, before)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_no_hook_on_a_gradient_is_passed_over(kind):
    ours, _ = bags()
    seen = []
    handle = getattr(ours.weight, kind)(lambda of: seen.append(of) and None)
    optimizer = mprec.optim.SGD(ours.parameters(), lr=0.1)
    check_hooks_are_refused(ours)
    before = ours.weight.detach().clone()
    handle.remove()
    loss(ours, BATCHES[0]).backward()
    assert not torch.equal(ours.weight, before)
    optimizer.release()
    getattr(ours.weight, kind)(lambda of: seen.append(of) and None)
    optimizer = mprec.optim.SGD(ours.parameters(), lr=0.1, in_backward=False)
    loss(ours, BATCHES[0]).backward()
    assert len(seen) == 1


def test_hooks_see_gradients_or_are_refused():
    ours, twin = bags()
    ours.weight.register_hook(lambda grad: 2 * grad)
    optimizer = mprec.optim.SGD(ours.parameters(), lr=0.1)
    check_hooks_are_refused(ours)
    optimizer.release()
    optimizer = mprec.optim.SGD(ours.parameters(), lr=0.1, in_backward=False)
    (plain,) = torch.autograd.grad(loss(twin, BATCHES[0]), twin.weight)
    loss(ours, BATCHES[0]).backward()
    torch.testing.assert_close(ours.weight.grad, 2 * plain)


@pytest.mark.parametrize("in_backward", [True, False])
def test_a_table_has_one_owner(in_backward):
    ours, _ = bags()
    other = nn.EmbeddingBag(3, 2)
    first = mprec.optim.SGD(ours.parameters(), lr=0.1, in_backward=in_backward)
    with pytest.raises(
        ValueError, match=r"\(10, 4\) belongs to another optimizer of mprec\.optim, SGD"
    ) as error:
        mprec.optim.Adagrad([other.weight, ours.weight])
    mprec.optim.Adagrad([other.weight])  # what failed owns nothing, though the traceback holds it
    del error
    loss(ours, BATCHES[0]).backward()
    assert (ours.weight.grad is None) == in_backward
    first.release()
    second = mprec.optim.Adagrad(ours.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(second, 1)  # a circle
    gc.disable()
    try:
        del second, scheduler
        third = mprec.optim.Adagrad(ours.parameters())
    finally:
        gc.enable()
    assert third.state[ours.weight]["step"] == 0
    third.add_param_group({"params": [other.weight]})
    with pytest.raises(ValueError, match="split_parameters"):
        third.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(third.param_groups) == 2


def test_copies_keep_the_mode():
    ours, _ = bags()
    optimizer = mprec.optim.SGD(ours.parameters(), lr=0.1, in_backward=False)
    assert not copy.deepcopy(optimizer).in_backward
