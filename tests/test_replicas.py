"""Replicas on two processes, whose gradients DistributedDataParallel exchanges.

Every representation with every optimizer of mprec.optim stays equal on both, and equal to one process that
has all samples.

The two processes are started once, train every case and write the parameters that they end with.
"""

import itertools
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import mprec.optim
from mprec.models import DLRM
from mprec.nn import DheConfig, EmbeddingBagCollection, FeatureConfig, with_representation
from mprec.representations import REPRESENTATIONS, SELECT

RANKS, STEPS, SAMPLES, DIM = 2, 3, 4, 8
FEATURES = [FeatureConfig("a", 96, DIM), FeatureConfig("b", 48, DIM)]  # 6 and 3 hot IDs
OPTIMIZERS = {name: getattr(mprec.optim, name) for name in mprec.optim.__all__ if name != "split_parameters"}


class Case(NamedTuple):
    representation: str
    optimizer: str  # of the tables; others have torch's SGD
    gradients: str = "dense"  # or "sparse"
    dtype: str = "float32"  # of the tables
    replicas: str = ""  # an option of DistributedDataParallel

    def __str__(self) -> str:
        return "-".join(filter(None, self))


CASES = [
    *(Case(*each) for each in itertools.product((*REPRESENTATIONS, SELECT), OPTIMIZERS, ("dense", "sparse"))),
    *(Case("table", name, dtype=dtype) for name in OPTIMIZERS for dtype in ("float16", "bfloat16")),
    *(Case("hybrid", "RowWiseAdagrad", replicas=o) for o in ("static_graph", "find_unused_parameters")),
]


def model_of(case):
    torch.manual_seed(0)
    features = with_representation(FEATURES, case.representation, DheConfig(k=8, hidden=(4,)), 1)
    model = DLRM(features, 2, DIM, (4,), (4,))
    if case.dtype != "float32":
        model.embeddings = Narrow(features, dtype=getattr(torch, case.dtype))
    for module in model.modules():
        if hasattr(module, "sparse"):
            module.sparse = case.gradients == "sparse"
    return model


class Narrow(EmbeddingBagCollection):
    """Tables of 16 bits for dense layers of 32."""

    def forward(self, *batch):
        return super().forward(*batch).float()


def batch(rank, step):
    """In the first step one rank has hot IDs only, the other one none."""
    generator = torch.Generator().manual_seed(RANKS * step + rank)
    indices = []
    for feature in FEATURES:
        hot, count = feature.num_embeddings // 16, feature.num_embeddings
        bounds = ((0, hot), (hot, count))[rank] if step == 0 else (0, count)
        indices.append(torch.randint(*bounds, (2 * SAMPLES,), generator=generator))
    offsets = torch.arange(0, 2 * len(FEATURES) * SAMPLES + 1, 2)
    return torch.randn(SAMPLES, 2, generator=generator), torch.cat(indices), offsets


def loss_of(model, ranks, step):
    return sum(model(*batch(rank, step)).square().mean() for rank in ranks) / len(ranks)


def parameters_of(model):
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def trained(case, ranks, replicated):
    """The parameters after some steps with the samples of these ranks."""
    model = model_of(case)
    tables, rest = mprec.optim.split_parameters(model)
    optimizers = [torch.optim.SGD(rest, lr=0.1)]
    if tables:  # deep hash embeddings have none
        optimizers.append(OPTIMIZERS[case.optimizer](tables, lr=0.1, in_backward=False))
    options = {case.replicas: True} if case.replicas else {}
    inner = DistributedDataParallel(model, **options) if replicated else model
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(inner, ranks, step).backward()
        for optimizer in optimizers:
            optimizer.step()
    return parameters_of(model)


def updated_in_backward(case, sharded, rank):
    """(what a pass that updates tables says, the parameters after it)."""
    model = model_of(case)
    tables, _ = mprec.optim.split_parameters(model)
    owner = OPTIMIZERS[case.optimizer](tables, lr=0.1, sharded=sharded)
    message = ""
    try:
        loss_of(model, [rank], 1).backward()
    except RuntimeError as error:
        message = str(error)
    owner.release()
    return message, parameters_of(model)


IN_BACKWARD = [case for case in CASES if case.representation != "dhe" and not case.replicas]


def rank_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    found = {
        "trained": {str(case): trained(case, [rank], True) for case in CASES},
        "alone": {str(case): updated_in_backward(case, False, rank) for case in IN_BACKWARD},
        "sharded": {str(case): updated_in_backward(case, True, rank) for case in IN_BACKWARD},
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank found."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replicas_stay_equal_and_equal_one_process(ranks, case):
    first, second = (found["trained"][str(case)] for found in ranks)
    assert torch.equal(first, second)
    # Of 16 bits, a gradient is rounded on each rank before it is exchanged.
    close = {} if case.dtype == "float32" else {"rtol": 0.02, "atol": 0.002}
    torch.testing.assert_close(first.float(), trained(case, range(RANKS), False).float(), **close)
    assert not torch.equal(first, parameters_of(model_of(case)))


@pytest.mark.parametrize("case", IN_BACKWARD, ids=str)
def test_updates_in_the_backward_pass_are_refused_unless_tables_are_sharded(ranks, case):
    for rank, found in enumerate(ranks):
        message, after = found["alone"][str(case)]
        assert "sharded=True" in message
        assert "replicas would drift apart" in message
        assert torch.equal(after, parameters_of(model_of(case)))
        message, after = found["sharded"][str(case)]
        assert not message
        torch.testing.assert_close(after, updated_in_backward(case, False, rank)[1])
        assert not torch.equal(after, parameters_of(model_of(case)))


if __name__ == "__main__":
    rank_of_two(int(sys.argv[1]), sys.argv[2])
