import os
import signal

import numpy as np
import pytest
import torch
from dispatch_fakes import fake_profile

from mprec.data import Batch
from mprec.dispatch import Path
from mprec.models import DLRM
from mprec.nn import DheConfig, FeatureConfig, with_representation
from mprec.serving import Engine
from mprec.serving.process_executor import ProcessExecutor

COSTS = {"hybrid": (3e-4, 3e-6), "poison": (1e-4, 1e-6)}
POISON = 7


class Scorer:
    """Click probabilities by a DLRM."""

    def __init__(self, model):
        self.model = model.eval()

    @torch.inference_mode()
    def __call__(self, batch):
        return self.model(batch.dense, batch.indices, batch.offsets).sigmoid()


class Poisoned(Scorer):
    def __call__(self, batch):
        if (batch.indices == POISON).any():
            raise IndexError(f"ID {POISON} is out of range")
        return super().__call__(batch)


def paths():
    torch.manual_seed(0)
    features = [FeatureConfig("user", 500, 8), FeatureConfig("item", 50, 8)]
    features = with_representation(features, "hybrid", dhe=DheConfig(k=16, hidden=(8,)))
    model = DLRM(features, 3, 8, bottom=(16,), top=(16,))
    return [
        Path("hybrid", "hybrid", 0.8, Scorer(model), "shape of hybrid", inputs=(2, 3)),
        Path("poison", "hybrid", 0.7, Poisoned(model), "shape of poison", inputs=(2, 3)),
    ]


def query(size, seed=0):
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(8, 50, 2 * size))
    dense = torch.from_numpy(rng.random((size, 3), dtype=np.float32))
    return Batch(dense, ids, torch.arange(2 * size + 1), torch.zeros(size))


@pytest.fixture(scope="module")
def executor():
    made = ProcessExecutor("worker", paths(), fake_profile(COSTS), arena_bytes=1 << 16)
    made.start()
    yield made
    made.close()


def test_scores_are_those_of_the_path_itself(executor):
    for size in (1, 7, 128, 3000):  # the last does not fit the block of shared memory
        batch = query(size, size)
        torch.testing.assert_close(executor.run("hybrid", batch), executor.paths[0].model(batch))


def test_weights_are_shared(executor):
    batch = query(16)
    model = executor.paths[0].model.model
    before = executor.run("hybrid", batch)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    after = executor.run("hybrid", batch)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, executor.paths[0].model(batch))


def test_errors_come_back(executor):
    batch = query(4)
    batch.indices[2] = POISON
    with pytest.raises(IndexError, match="ID 7 is out of range"):
        executor.run("poison", batch)
    assert len(executor.run("poison", query(4))) == 4
    with pytest.raises(KeyError):
        executor.run("nobody", batch)


def test_a_process_that_dies_loses_no_query_and_is_started_again(executor):
    other = ProcessExecutor("other", executor.paths[:1], executor.profile)
    engine = Engine(executors=[other, executor], sla_s=30.0, max_batch=64)
    rng = np.random.default_rng(1)
    with engine:
        batches = [query(int(size), i) for i, size in enumerate(rng.integers(1, 200, 60))]
        futures = [engine.submit(batch) for batch in batches]
        os.kill(other._process.pid, signal.SIGKILL)
        futures += [engine.submit(batch) for batch in batches]
        for batch, future in zip(batches + batches, futures, strict=True):
            answer = future.exception(60)
            if answer is None:
                torch.testing.assert_close(future.result().scores, executor.paths[0].model(batch))
        answered = sum(future.exception() is None for future in futures)
    counts = engine.statistics()
    assert counts["queries"] == len(futures) == counts["answered"] + counts["failed"]
    assert answered == counts["answered"] >= len(futures) - 8  # one batch may die with the process
    assert counts["executors"]["worker"]["batches"] > 0
    executor.start()  # closed with the engine; the fixture's other tests may follow


def test_bad_arguments():
    with pytest.raises(ValueError, match="threads"):
        ProcessExecutor("w", paths(), fake_profile(COSTS), threads=0)
    with pytest.raises(ValueError, match="paths"):
        ProcessExecutor("w", [], fake_profile(COSTS))
