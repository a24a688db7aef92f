"""TorchRec's DistributedModelParallel: tables that TorchRec shards, a deep hash embedding on every rank.

    pip install mprec && pip install --no-deps -r tests/models/requirements.txt
    torchrun --standalone --nproc-per-node 2 examples/torchrec_dmp.py

The feature with the largest vocabulary has no table: its decoder is small, so it is data-parallel, and its
gradients are averaged with those of the dense layers. The other features' tables are spread over the ranks.
Each rank reads its own half of the batches.
"""

import torch
import torch.distributed as dist
import torchrec
from torch import nn
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, table_wise
from torchrec.distributed.types import ShardingEnv, ShardingPlan
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import KeyedOptimizerWrapper

import mprec.nn.torchrec
from mprec.nn import DheConfig

DIM, NUM_DENSE = 8, 3
SIZES = {"user": 2_000_000, "item": 300, "genre": 20}


def configs(names):
    return [
        torchrec.EmbeddingBagConfig(
            name=f"{name}_table", embedding_dim=DIM, num_embeddings=SIZES[name], feature_names=[name]
        )
        for name in names
    ]


class ClickModel(nn.Module):
    """``tables`` is TorchRec's own collection, which its sharders know; ``hashed`` is mprec's."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = torchrec.EmbeddingBagCollection(tables=configs(["item", "genre"]))
        self.hashed = mprec.nn.torchrec.EmbeddingBagCollection(
            tables=configs(["user"]), representation=DheConfig(k=32, hidden=(16,))
        )
        self.over = nn.Sequential(nn.Linear(3 * DIM + NUM_DENSE, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, dense, features):
        tables, hashed = self.tables(features), self.hashed(features)
        vectors = [hashed["user"], tables["item"], tables["genre"], dense]
        return self.over(torch.cat(vectors, dim=1)).squeeze(1)


def batch_of(step: int, size: int = 64):
    """A batch of the whole group: the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.stack([torch.randint(0, size_of, (size,), generator=generator) for size_of in SIZES.values()])
    dense = torch.randn(size, NUM_DENSE, generator=generator)
    labels = ((ids[1] % 7 + ids[2] % 3) / 8 + dense[:, 0] > 0.5).float()
    return dense, ids, labels


def part(batch, rank: int, ranks: int):
    """A rank's samples of it, IDs as TorchRec has them."""
    dense, ids, labels = batch
    mine = ids.chunk(ranks, dim=1)[rank].reshape(-1)
    features = torchrec.KeyedJaggedTensor.from_lengths_sync(list(SIZES), mine, torch.ones_like(mine))
    return dense.chunk(ranks)[rank], features, labels.chunk(ranks)[rank]


def distribute(model: ClickModel, lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model over all ranks, and the optimizer of what every rank has. TorchRec updates each table in the
    backward pass, on the rank that has it."""
    apply_optimizer_in_backward(torch.optim.SGD, model.tables.parameters(), {"lr": lr})
    ranks, sharder = dist.get_world_size(), EmbeddingBagCollectionSharder()
    places = {"item_table": table_wise(rank=0), "genre_table": table_wise(rank=ranks - 1)}
    tables = construct_module_sharding_plan(
        model.tables, places, sharder, local_size=ranks, world_size=ranks, device_type="cpu"
    )
    parallel = DistributedModelParallel(
        model,
        ShardingEnv.from_process_group(dist.GroupMember.WORLD),
        torch.device("cpu"),
        ShardingPlan({"tables": tables}),
        [sharder],
    )
    rest = {name: p for name, p in parallel.named_parameters() if not name.startswith("tables.")}
    return parallel, KeyedOptimizerWrapper(rest, lambda parameters: torch.optim.SGD(parameters, lr=lr))


def train(model: nn.Module, optimizer, steps: int, rank: int, ranks: int) -> list[float]:
    """The losses of the rank's samples."""
    losses = []
    for step in range(steps):
        dense, features, labels = part(batch_of(step), rank, ranks)
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(dense, features), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model, optimizer = distribute(ClickModel(), lr=0.5)
    losses = train(model, optimizer, 40, rank, ranks)
    told = f"rank {rank}: loss {losses[0]:.4f} -> {sum(losses[-5:]) / 5:.4f}"
    print(told + "\n", end="", flush=True)  # in one piece, as ranks share the terminal
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
