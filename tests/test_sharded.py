"""Models that torch.distributed shards: FSDP trains them as one process does."""

import os
import subprocess
import sys

import pytest

RANK = """
import copy, os, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
import mprec.optim
from mprec.models import DLRM
from mprec.nn import DheConfig, FeatureConfig, with_representation

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
features = [FeatureConfig("a", 20, 4), FeatureConfig("b", 9, 4)]
dhe = DheConfig(k=8, hidden=(4,))

def batch(rank, step):
    g = torch.Generator().manual_seed(10 * step + rank)
    indices = torch.cat([torch.randint(0, f.num_embeddings, (4,), generator=g) for f in features])
    return torch.randn(4, 2, generator=g), indices, torch.arange(9)

def sharded(model, how):
    if how == "flat":
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    if how == "each":
        fully_shard(model.embeddings, mesh=mesh)
    return fully_shard(model, mesh=mesh)

for representation in ("table", "dhe", "hybrid", "low_rank", "select"):
    for how in ("flat", "whole", "each"):
        torch.manual_seed(0)
        model = DLRM(with_representation(features, representation, dhe, 1), 2, 4, (4,), (4,))
        alone = copy.deepcopy(model)
        model = sharded(model, how)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, alone)]
        for step in range(3):
            model(*batch(rank, step)).square().mean().backward()
            (sum(alone(*batch(r, step)).square().mean() for r in (0, 1)) / 2).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(model(*batch(0, 9)), alone(*batch(0, 9)), msg=lambda m: f"{how}: {m}")

tables, _ = mprec.optim.split_parameters(sharded(DLRM(features, 2, 4, (4,), (4,)), "whole"))
assert len(tables) == 2
for in_backward in (True, False):
    try:
        mprec.optim.SGD(tables, in_backward=in_backward)
    except ValueError as error:
        assert "got DTensor" in str(error), error
    else:
        raise AssertionError("taken")
dist.destroy_process_group()
print("done")
"""


@pytest.mark.slow
def test_sharded_models_train_as_one_process_does(tmp_path):
    def start(rank):
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29739"}
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", RANK], env={**os.environ, **variables}, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    for process in [start(0), start(1)]:
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        assert "done" in out
