"""Forms of embeddings in the protocol of "Clustering the Sketch" (Tsang and Ahle, NeurIPS 2023, CCE), beside
the values that its authors published.

    python benchmarks/cce.py --keep models --seconds 100

MovieLens-1M without ratings of 3; 4 and 5 are the positive ones; each user's last two ratings are held out.
The model is a factorisation: the dot product of a user's and an item's vector of 32 numbers is the logit.
AdamW as torch has it, batches of 4096, at most 30 epochs, three seeds; the AUC is that of the held-out
ratings at the epoch where it is best, as published (so that it is a little optimistic, for all forms alike).
A budget is a number of parameters per dimension and table: at 512 a table may have 512 * 32 numbers of 4
bytes.

| form | how it is made |
|---|---|
| ``full`` | a row of 32 numbers each, whatever the budget |
| ``mapped`` | the same, through a learnt map in training |
| ``low_rank`` | trained, the largest rank that the budget allows |
| ``dhe`` | trained; k hashes and hidden layers of k, as many as the authors take |
| ``low_rank int8`` | weighted SVD of ``full``, codes of a byte, the largest rank in the budget's bytes |
| ``dhe distilled`` | the ``dhe`` taught by the rows of ``full`` |

Appends to ``benchmarks/results/cce.csv`` what has no row yet. After ``--seconds`` it ends with status 75:
start it again and it goes on, at the last whole epoch in the folder ``--keep``. The published values are in
``benchmarks/results/cce_published.csv``.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from quality import MORE_TO_DO, append_new, present
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from mprec import metrics
from mprec.data import ClickDataset, Column, movielens
from mprec.derive import distil, low_rank, sensitivity
from mprec.derive.factorise import code_limits
from mprec.nn import (
    DheConfig,
    EmbeddingBagCollection,
    FeatureConfig,
    LowRankEmbeddingBagCollection,
    MappedEmbeddingBagCollection,
    folded,
)

DIM, BATCH, EPOCHS = 32, 4096, 30
BUDGETS = (128, 512, 2048, 8192)
#: Those that are trained, each with whether a budget matters; the others are made of ``full``.
TRAINED = {"full": False, "mapped": False, "low_rank": True, "dhe": True}
MADE = ("low_rank int8", "dhe distilled")
KEYS = ("form", "budget", "seed")


class Late(Exception):
    """There is no time left in this run."""


class GMF(nn.Module):
    """Logits of (user, item): the dot product of their vectors."""

    _mixing = None
    num_dense = 0

    def __init__(self, embeddings: EmbeddingBagCollection) -> None:
        super().__init__()
        self.embeddings = embeddings

    def mix(self, embedded: torch.Tensor, mixing) -> torch.Tensor:
        return embedded

    def score(self, dense: torch.Tensor, embedded: torch.Tensor) -> torch.Tensor:
        user, item = embedded.split(DIM, dim=1)
        return (user * item).sum(1)

    def forward(self, indices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.score(None, self.embeddings(indices, offsets))


def read() -> tuple[ClickDataset, ClickDataset]:
    """(train, held out), with users and items alone."""
    folder = movielens.find_installed_1m()
    if folder is None:
        raise SystemExit(movielens.HOW_TO_GET_1M)
    users, items, ratings, times = {}, {}, [], []
    ids = [], []
    with next(folder.glob("*.inter")).open() as file:
        next(file)
        for line in file:
            user, item, rating, moment = line.rstrip("\n").split("\t")
            if float(rating) != 3:
                ids[0].append(users.setdefault(user, len(users)))
                ids[1].append(items.setdefault(item, len(items)))
                ratings.append(float(rating))
                times.append(float(moment))
    columns = [
        Column(name, len(known), np.array(column, dtype=np.int32))
        for name, known, column in zip(("user", "item"), (users, items), ids, strict=True)
    ]
    dataset = ClickDataset("ml-1m without 3", columns, np.array(ratings) > 3)
    # Rows of equal time keep their order, as they do in the authors' code if its sort does.
    order = np.lexsort((times, columns[0].ids))
    ends = np.cumsum(np.bincount(columns[0].ids, minlength=columns[0].vocabulary))
    held_out = np.zeros(len(dataset), dtype=bool)
    for back in (1, 2):
        held_out[order[ends - back]] = True
    return dataset.take(np.flatnonzero(~held_out)), dataset.take(np.flatnonzero(held_out))


def dhe_config(budget: int, seed: int) -> DheConfig | None:
    """The widest decoder in the budget: the authors take as many hidden layers as the fourth root of k."""
    found = None
    for k in range(1, 1025):
        config = DheConfig(k, (k,) * math.ceil(k**0.25), last_activation="none", seed=seed)
        if config.num_parameters(DIM) > budget * DIM:
            break
        found = config
    return found


def fresh(form: str, budget: int, seed: int, train: ClickDataset) -> EmbeddingBagCollection | None:
    """Untrained embeddings; None if the budget is too small for the form."""
    torch.manual_seed(seed)
    features = []
    for name, size in train.features:
        match form:
            case "low_rank":
                rank = min(budget * DIM // (size + DIM), DIM)
                if not rank:
                    return None
                options = {"representation": "low_rank", "parameters": {"rank": rank}}
            case "dhe":
                options = {"representation": "dhe", "dhe": dhe_config(budget, seed)}
            case _:
                options = {}
        features.append(FeatureConfig(name, size, DIM, **options))
    collection = EmbeddingBagCollection(features)
    with torch.no_grad():
        if form == "full":  # as the authors' tables start
            for table in collection.tables.values():
                table.weight.uniform_(-(DIM**-0.5), DIM**-0.5)
    return MappedEmbeddingBagCollection(collection, fresh=True) if form == "mapped" else collection


@torch.no_grad()
def auc_of(model: GMF, held_out: ClickDataset) -> float:
    batch = held_out.batch(slice(None))
    return metrics.auc(held_out.labels, model(batch.indices, batch.offsets).numpy())


def fit(
    model: GMF, train: ClickDataset, held_out: ClickDataset, seed: int, file: Path, is_late: Callable
) -> dict:
    """{"auc", "epoch", "state"} of the best epoch; ``Late`` after a whole one that ``file`` keeps."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    done = {"epoch": 0, "best": {"auc": 0.0}}
    if file.exists():
        done = torch.load(file)
        model.load_state_dict(done["model"])
        optimizer.load_state_dict(done["optimizer"])
    # Half the epochs of the longest runs go by without a better one.
    while done["epoch"] < EPOCHS and done["epoch"] - done["best"].get("epoch", 0) < 5:
        if is_late():
            raise Late
        for batch in train.batches(BATCH, seed=[seed, done["epoch"]]):
            optimizer.zero_grad()
            binary_cross_entropy_with_logits(model(batch.indices, batch.offsets), batch.labels).backward()
            optimizer.step()
        done["epoch"] += 1
        plain = folded(model)
        auc = auc_of(plain, held_out)
        if auc > done["best"]["auc"]:
            state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
            done["best"] = {"auc": auc, "epoch": done["epoch"], "state": state}
        done |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(done, file)
    return done["best"]


def made(form: str, budget: int, seed: int, teacher: GMF, train: ClickDataset) -> tuple[GMF, int]:
    """(a model with tables that say what the form does, its parameters of 4 bytes)."""
    metric = sensitivity(teacher, train)
    rows, size = {}, 0
    for f in teacher.embeddings.features:
        weight = teacher.embeddings.tables[f.name].weight.detach()
        counts = torch.from_numpy(train.counts(f.name))
        if form == "dhe distilled":
            config = dhe_config(budget, seed)
            module = distil(weight, counts, config, metric=metric[f.name], seed=seed)
            with torch.no_grad():
                rows[f.name] = module(torch.arange(len(weight)), torch.arange(len(weight) + 1))
            size += config.num_parameters(DIM)
            continue
        # A code a row, a scale folded into each row of the projection, and the mean row.
        rank = min((4 * budget * DIM - 4 * DIM) // (len(weight) + 4 * DIM), DIM)
        table = low_rank(weight, counts, rank, metric[f.name])
        stored = LowRankEmbeddingBagCollection(
            [f], {f.name: table}, precision="int8", limits={f.name: code_limits(table, counts)}
        )
        rows[f.name] = stored.rows(f.name)
        size += stored.nbytes // 4
    model = GMF(EmbeddingBagCollection(teacher.embeddings.features))
    for name, weight in rows.items():
        model.embeddings.tables[name].weight = nn.Parameter(weight)
    return model, size


def teacher_of(seed: int, train: ClickDataset, keep: Path) -> GMF | None:
    """The trained ``full``, if it is kept."""
    file = keep / f"cce full 0 {seed}.pt"
    if not file.exists():
        return None
    model = GMF(EmbeddingBagCollection([FeatureConfig(name, size, DIM) for name, size in train.features]))
    model.load_state_dict(torch.load(file)["best"]["state"])
    return model


def run(form: str, budget: int, seed: int, parts, keep: Path, is_late: Callable) -> dict | None:
    """A row; None if the budget is too small. ``Late`` as :func:`fit`."""
    train, held_out = parts
    if form in MADE:
        if is_late():
            raise Late
        teacher = teacher_of(seed, train, keep)
        if teacher is None:
            raise SystemExit(f"{form}: train full first, into --keep {keep}")
        model, size = made(form, budget, seed, teacher, train)
        return {"auc": auc_of(model, held_out), "parameters": size, "epoch": ""}
    embeddings = fresh(form, budget, seed, train)
    if embeddings is None:
        return None
    size = sum(f.num_parameters() for f in embeddings.features)
    found = fit(GMF(embeddings), train, held_out, seed, keep / f"cce {form} {budget} {seed}.pt", is_late)
    return {"auc": found["auc"], "parameters": size, "epoch": found["epoch"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--forms", nargs="+", choices=(*TRAINED, *MADE), default=(*TRAINED, *MADE))
    parser.add_argument("--budgets", nargs="+", type=int, default=BUDGETS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, required=True, help="folder for what is being trained")
    parser.add_argument("--seconds", type=float, default=1e9, help="end after so long, with status 75")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.keep.mkdir(exist_ok=True)
    end = time.monotonic() + args.seconds
    parts = None
    for form in args.forms:
        for seed in range(args.seeds):
            for budget in args.budgets if TRAINED.get(form, True) else (0,):
                if (form, str(budget), str(seed)) in present("cce", KEYS):
                    continue
                parts = parts or read()
                try:
                    found = run(form, budget, seed, parts, args.keep, lambda: time.monotonic() > end)
                except Late:
                    return MORE_TO_DO
                if found is None:
                    continue
                row = {"form": form, "budget": budget, "seed": seed, "parameters": found["parameters"]}
                append_new("cce", KEYS, [row | {"auc": f"{found['auc']:.5f}", "epoch": found["epoch"]}])
    return 0


if __name__ == "__main__":
    sys.exit(main())
