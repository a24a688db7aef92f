"""Optimizers applied in the backward pass, against torch's own over many steps."""

import copy
import pickle

import pytest
import torch

from mprec import ops, optim
from mprec.bags import Bags
from mprec.errors import IdOutOfRangeError, InvalidOffsetsError
from mprec.ops import fused


class TorchRowWiseAdagrad:
    """FBGEMM's exact row-wise Adagrad in plain torch, on coalesced sparse gradients."""

    def __init__(self, params, lr, eps):
        self.params, self.lr, self.eps = list(params), lr, eps
        self.sums = [torch.zeros(len(p), 1, dtype=p.dtype) for p in self.params]

    @torch.no_grad()
    def step(self):
        for p, total in zip(self.params, self.sums, strict=True):
            grad = p.grad.coalesce()
            rows, values = grad.indices()[0], grad.values()
            total[rows] += values.square().mean(1, keepdim=True)
            p[rows] -= self.lr * values / (total[rows].sqrt() + self.eps)

    def zero_grad(self):
        for p in self.params:
            p.grad = None


PAIRS = {
    "sgd": (lambda p: optim.SGD(p, lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "adagrad": (
        lambda p: optim.Adagrad(p, lr=0.1, lr_decay=0.01, initial_accumulator_value=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.01, initial_accumulator_value=0.1),
    ),
    "rowwise_adagrad": (
        lambda p: optim.RowWiseAdagrad(p, lr=0.1, eps=1e-6),
        lambda p: TorchRowWiseAdagrad(p, lr=0.1, eps=1e-6),
    ),
    "adam": (
        lambda p: optim.Adam(p, lr=0.01, betas=(0.8, 0.95)),
        lambda p: torch.optim.SparseAdam(p, lr=0.01, betas=(0.8, 0.95)),
    ),
}


def _bags(
    generator: torch.Generator, rows: int, bags: int, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.randint(0, longest + 1, (bags,), generator=generator)
    lengths[0] = max(int(lengths[0]), 1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    # squared: hot rows, as in a click log
    ids = (torch.rand(int(offsets[-1]), generator=generator).square() * rows).long()
    return ids, offsets


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_50_steps_equal_torch(name, mode):
    ours_, theirs_ = PAIRS[name]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(60, 19, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    our_optimizer, their_optimizer = ours_([ours]), theirs_([theirs])
    for _ in range(50):
        ids, offsets = _bags(generator, 60, 17, 6)
        target = torch.randn(17, 19, generator=generator)
        kwargs = {"mode": mode, "include_last_offset": True, "sparse": True}
        ((ops.embedding_bag(ids, ours, offsets, **kwargs) - target) ** 2).sum().backward()
        our_optimizer.step()
        theirs.grad = None
        out = torch.nn.functional.embedding_bag(ids, theirs, offsets, **kwargs)
        ((out - target) ** 2).sum().backward()
        their_optimizer.step()
    assert ours.grad is None
    assert not torch.equal(ours, start)
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-5)


class _Decayed:
    """torch's optimizer in float64 after a decay of some rows."""

    def __init__(self, weight, make, decay):
        self.weight, self.optimizer, self.decay, self.steps = weight, make([weight]), decay, 0

    @torch.no_grad()
    def step(self, rows, lr_decay):
        rate = self.optimizer.lr if isinstance(self.optimizer, TorchRowWiseAdagrad) else None
        rate = rate or self.optimizer.param_groups[0]["lr"]
        self.weight[rows] *= 1 - rate / (1 + self.steps * lr_decay) * self.decay
        self.steps += 1
        self.optimizer.step()


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("in_backward", [True, False])
@pytest.mark.parametrize("dim", [3, 16, 19, 70])
def test_decay_of_the_rows_of_a_batch(name, in_backward, dim):
    ours_, theirs_ = PAIRS[name]
    generator = torch.Generator().manual_seed(5)
    ours = torch.nn.Parameter(torch.randn(40, dim, generator=generator))
    start = ours.detach().clone()
    theirs = _Decayed(torch.nn.Parameter(start.double()), theirs_, 0.3)
    kind = type(ours_([torch.nn.Parameter(torch.zeros(1, 1))]))
    options = dict(ours_([torch.nn.Parameter(torch.zeros(1, 1))]).defaults)
    optimizer = kind([ours], **{**options, "weight_decay": 0.3}, in_backward=in_backward)
    for _ in range(20):
        ids, offsets = _bags(generator, 30, 17, 6)
        target = torch.randn(17, dim, generator=generator)
        arguments = {"mode": "sum", "include_last_offset": True, "sparse": True, "padding_idx": 2}
        ((ops.embedding_bag(ids, ours, offsets, **arguments) - target) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.weight.grad = None
        out = torch.nn.functional.embedding_bag(ids, theirs.weight, offsets, **arguments)
        ((out - target) ** 2).sum().backward()
        theirs.step(ids[ids != 2].unique(), 0.01 if name == "adagrad" else 0.0)
    torch.testing.assert_close(ours.double(), theirs.weight, rtol=2e-4, atol=2e-5)
    assert torch.equal(ours[30:], start[30:])  # no batch met them
    assert torch.equal(ours[2], start[2])


def test_decay_of_a_dense_gradient_is_of_every_row():
    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = optim.SGD([weight], lr=0.5, weight_decay=0.5, in_backward=False)
    weight.grad = torch.zeros(4, 3)
    optimizer.step()
    assert torch.equal(weight, torch.full((4, 3), 0.75))


def test_decay_is_kept_by_a_state_and_not_taken_from_torchs():
    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = optim.Adagrad([weight], weight_decay=0.5)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    state = torch.optim.Adagrad([torch.nn.Parameter(torch.ones(4, 3))], weight_decay=0.1).state_dict()
    with pytest.raises(ValueError, match=r"weight_decay=0\.1 is not supported"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    optimizer.load_state_dict(torch.optim.Adagrad([torch.nn.Parameter(torch.ones(4, 3))]).state_dict())
    assert "foreach" not in optimizer.param_groups[0]
    for bad in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="weight_decay: expected a finite number >= 0"):
            optim.SGD([torch.nn.Parameter(torch.ones(4, 3))], weight_decay=bad)
    with pytest.raises(TypeError):
        optim.SGD([torch.nn.Parameter(torch.ones(4, 3))], 0.1, 0.9)  # torch's third is the momentum


@pytest.mark.parametrize("name", PAIRS)
def test_many_tables_in_one_call_equal_one_by_one(name):
    ours_, _ = PAIRS[name]
    generator = torch.Generator().manual_seed(1)
    dims = (4, 16, 33)
    together = [torch.nn.Parameter(torch.randn(30, d, generator=generator)) for d in dims]
    alone = [copy.deepcopy(p) for p in together]
    optimizers = [ours_(together), *(ours_([p]) for p in alone)]
    for _ in range(3):
        parts = [_bags(generator, 30, 9, 4) for _ in dims]
        indices = torch.cat([ids for ids, _ in parts])
        offsets, total = [torch.zeros(1, dtype=torch.int64)], 0
        for ids, own in parts:
            offsets.append(own[1:] + total)
            total += len(ids)
        weights = torch.rand(len(indices), generator=generator)
        out = ops.embedding_bag_multi(together, indices, torch.cat(offsets), per_sample_weights=weights)
        grad = torch.randn(out.shape, generator=generator)
        out.backward(grad)
        split = zip(alone, parts, grad.split(dims, 1), weights.split([len(i) for i, _ in parts]), strict=True)
        for p, (ids, own), g, w in split:
            pooled = ops.embedding_bag(
                ids, p, own, mode="sum", include_last_offset=True, per_sample_weights=w
            )
            pooled.backward(g)
    assert len(optimizers) == 4
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("ids", "offsets", "error"),
    [
        ([0, 9], [0, 2], IdOutOfRangeError),
        ([0, -1], [0, 2], IdOutOfRangeError),
        ([0, 1], [0, 3], InvalidOffsetsError),
        ([0, 1], [1, 2], InvalidOffsetsError),
    ],
)
def test_bad_input_changes_nothing(ids, offsets, error):
    weight = torch.zeros(9, 4)
    optimizer = optim.SGD([torch.nn.Parameter(weight)], lr=1.0)
    parameter = optimizer.param_groups[0]["params"][0]
    with pytest.raises(error):
        optimizer.apply_bags([parameter], Bags(torch.tensor(ids), torch.tensor(offsets)), torch.ones(1, 4))
    assert torch.equal(parameter, torch.zeros(9, 4))


def test_bad_hyperparameters_are_named():
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"lr.*-1"):
        optim.SGD([weight], lr=-1)
    with pytest.raises(ValueError, match=r"betas\[1\]"):
        optim.Adam([weight], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="float32"):
        optim.SGD([torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))])
    with pytest.raises(ValueError, match=r"\(3,\)"):
        optim.SGD([torch.nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adagrad, optim.RowWiseAdagrad, optim.Adam])
@pytest.mark.parametrize("option", ["momentum", "maximize", "max_norm", "max_gradient", "gradient_clipping"])
def test_what_an_optimizer_lacks_is_refused_and_takes_no_table(kind, option):
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    with pytest.raises(TypeError, match=option):
        kind([weight], **{option: 1.0})
    assert fused.owner_of(weight) is None


@pytest.mark.parametrize("name", PAIRS)
def test_state_dict_round_trip_continues_alike(name):
    generator = torch.Generator().manual_seed(3)
    first = torch.nn.Parameter(torch.randn(20, 5, generator=generator))
    optimizer = PAIRS[name][0]([first])

    def one_step(weight):
        own = torch.Generator().manual_seed(4)
        ids, offsets = _bags(own, 20, 6, 5)
        out = ops.embedding_bag(ids, weight, offsets, mode="sum", include_last_offset=True)
        out.square().sum().backward()

    one_step(first)
    saved, state = first.detach().clone(), pickle.loads(pickle.dumps(optimizer.state_dict()))
    one_step(first)
    second = torch.nn.Parameter(saved)
    restored = PAIRS[name][0]([second])
    restored.load_state_dict(state)
    one_step(second)
    assert torch.equal(first, second)


def test_learning_rate_schedulers_work():
    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = optim.SGD([weight], lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for expected in (1.0, 0.5, 0.25):
        before = weight.detach().clone()
        ops.embedding_bag(torch.tensor([[2]]), weight, mode="sum").sum().backward()
        optimizer.step()
        schedule.step()
        torch.testing.assert_close(before[2] - weight[2], torch.full((3,), expected))
        assert torch.equal(before[:2], weight[:2])


def test_gradients_that_came_another_way_are_applied_by_step():
    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = optim.SGD([weight], lr=1.0)
    weight.grad = torch.sparse_coo_tensor(
        torch.tensor([[1, 1]]), torch.tensor([[1.0, 2, 3], [1, 1, 1]]), (4, 3)
    )
    optimizer.step()
    assert torch.equal(weight[1], torch.tensor([-1.0, -2.0, -3.0]))
    optimizer.zero_grad()
    weight.grad = torch.ones(4, 3)
    optimizer.step()
    assert torch.equal(weight[0], torch.zeros(3))


def test_version_counter_sees_the_update():
    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = optim.SGD([weight], lr=1.0)
    before = weight._version
    ops.embedding_bag(torch.tensor([[2]]), weight, mode="sum").sum().backward()
    assert weight._version > before
    assert weight.grad is None
    del optimizer  # gives the table back
    ops.embedding_bag(torch.tensor([[2]]), weight, mode="sum").sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("multi", [False, True])
def test_backward_passes_after_an_update_of_the_table(mode, multi):
    weight = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = optim.SGD([weight], lr=1.0)
    ids, offsets = torch.tensor([2, 3]), torch.tensor([0, 1, 2])
    if multi:
        outs = [ops.embedding_bag_multi([weight], ids, offsets, mode) for _ in range(2)]
    else:
        outs = [ops.embedding_bag(ids[:, None], weight, mode=mode) for _ in range(2)]
    for out in outs:
        out.sum().backward()  # the first updates the table that the second came from
    assert torch.equal(weight, torch.tensor([1.0, 1, -1, -1])[:, None].expand(4, 3))
    del optimizer


def test_a_maximum_of_a_table_updated_since_goes_where_it_was_taken_from():
    weight = torch.nn.Parameter(torch.ones(4, 3))
    out = ops.embedding_bag(torch.tensor([[2, 3]]), weight, mode="max")
    with torch.no_grad():
        weight[3] += 1
    out.sum().backward()
    assert torch.equal(weight.grad, torch.tensor([0.0, 0, 1, 0])[:, None].expand(4, 3))
