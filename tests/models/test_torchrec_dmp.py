"""examples/torchrec_dmp.py on two gloo processes: what two ranks learn is what one process learns from all
samples."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

EXAMPLE = Path(__file__).parents[2] / "examples" / "torchrec_dmp.py"
STEPS, RATE = 6, 0.5


def launch(*program):
    """Two ranks of a program; what they wrote."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, *map(str, program)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(autouse=True)
def _torchrec():
    for name in ("torchrec", "fbgemm_gpu"):
        pytest.importorskip(name, exc_type=ImportError)


@pytest.mark.slow
def test_the_example_learns():
    told = re.findall(r"^rank (\d): loss ([\d.]+) -> ([\d.]+)$", launch(EXAMPLE), flags=re.M)
    assert sorted(rank for rank, _, _ in told) == ["0", "1"]
    assert all(float(last) < 0.6 * float(first) for _, first, last in told)


@pytest.mark.slow
def test_two_ranks_learn_what_one_process_learns():
    assert sorted(launch(__file__).split()) == ["0", "1"]


def rank_of_two():
    """One rank: the distributed model, and the same model on its own with all samples."""
    sys.path.insert(0, str(EXAMPLE.parent))
    import torchrec_dmp as example

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    alone = example.ClickModel()
    torch.manual_seed(0)
    model, optimizer = example.distribute(example.ClickModel(), RATE)
    wanted = dict(alone.named_parameters())
    parameters = dict(model.named_parameters())
    # Each rank holds one table, whole. TorchRec starts it anew.
    (name,) = [n for n, p in parameters.items() if n.startswith("tables.") and p.numel()]
    assert ("item", "genre")[rank] in name
    held, start = parameters.pop(name).detach(), wanted[name].detach().clone()
    held.copy_(start)
    losses = example.train(model, optimizer, STEPS, rank, ranks)
    expected = example.train(alone, torch.optim.SGD(alone.parameters(), lr=RATE), STEPS, 0, 1)
    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / ranks, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(held, wanted[name].detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(held, start)
    replicated = {n: p.detach() for n, p in parameters.items() if not n.startswith("tables.")}
    assert {name.split(".")[0] for name in replicated} == {"hashed", "over"}
    for name, parameter in replicated.items():
        torch.testing.assert_close(parameter, wanted[name].detach(), rtol=1e-4, atol=1e-5)
        copies = [torch.empty_like(parameter) for _ in range(ranks)]
        dist.all_gather(copies, parameter)
        assert torch.equal(*copies), name
    print(f"{rank}\n", end="", flush=True)  # in one piece, as ranks share the pipe
    dist.destroy_process_group()


if __name__ == "__main__":
    rank_of_two()
