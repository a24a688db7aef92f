"""Native calls with several threads: from several Python threads at once, and after a fork."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from mprec.nn import EmbeddingBag, EmbeddingBagCollection, FeatureConfig
from mprec.optim import RowWiseAdagrad


@pytest.fixture
def threads():
    """Sets torch's number of threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def collection() -> EmbeddingBagCollection:
    torch.manual_seed(7)
    return EmbeddingBagCollection([FeatureConfig(f"f{t}", 1000 + t, 16) for t in range(5)])


def bags(batch: int = 700) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, 4, (5 * batch,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return torch.randint(0, 1000, (int(offsets[-1]),), generator=generator), offsets


def trained(steps: int = 3) -> list[torch.Tensor]:
    """Tables after some steps on the same batch."""
    tables = collection()
    optimizer = RowWiseAdagrad(tables.parameters(), lr=0.1)
    ids, offsets = bags()
    for _ in range(steps):
        out = tables(ids, offsets)
        out.backward(out.detach())
    assert len(optimizer.state) == 5
    return [p.detach() for p in tables.parameters()]


def test_updates_are_the_same_with_any_number_of_threads(threads):
    threads(1)
    alone = trained()
    for count in (2, 3, 4):
        threads(count)
        assert all(map(torch.equal, trained(), alone)), count


def test_one_table_shared_among_threads(threads):
    """Its rows are cut into shares; most IDs are of a few rows."""
    ids = torch.cat([torch.randint(0, 5, (4000,)), torch.randint(0, 3000, (2000,))])
    offsets = torch.arange(0, 6000, 2)

    def table() -> torch.Tensor:
        torch.manual_seed(1)
        bag = EmbeddingBag(3000, 8, mode="sum")
        holder = RowWiseAdagrad(bag.parameters())
        out = bag(ids, offsets)
        out.backward(out.detach())
        del holder
        return bag.weight.detach()

    threads(1)
    alone = table()
    for count in (2, 3, 4):
        threads(count)
        assert torch.equal(table(), alone), count


def test_several_python_threads_call_at_once(threads):
    threads(3)
    tables = collection()
    ids, offsets = bags()
    with torch.no_grad():
        want = tables(ids, offsets)
    wrong = []

    def call():
        with torch.no_grad():
            for _ in range(200):
                if not torch.equal(tables(ids, offsets), want):
                    wrong.append(threading.get_ident())

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


FORK = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
import test_threads
torch.set_num_threads(3)
tables, (ids, offsets) = test_threads.collection(), test_threads.bags()
with torch.no_grad():
    want = tables(ids, offsets)
    pid = os.fork()
    torch.set_num_threads(3)
    same = all(torch.equal(tables(ids, offsets), want) for _ in range(20))
if pid == 0:
    os._exit(0 if same else 3)
assert same and os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
"""


def test_the_child_of_a_fork_has_threads_of_its_own():
    command = [sys.executable, "-c", FORK, os.path.dirname(__file__)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run(command, env=environment, timeout=120, check=True)
