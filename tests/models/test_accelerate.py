"""Batches and optimizers in accelerate: moved, accumulated, clipped, step for step as in a plain loop."""

import copy

import pytest
import torch
from test_torch_data import dataset

import mprec.optim
from mprec.data import Batch, collate
from mprec.models import DLRM
from mprec.nn import FeatureConfig

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
accelerate = pytest.importorskip("accelerate", exc_type=ImportError)
FEATURES = [FeatureConfig("a", 9, 4), FeatureConfig("b", 5, 4)]


def loss_of(model, batch):
    logits = model(batch.dense, batch.bags)
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)


def optimizers_of(model, ours):
    tables, rest = mprec.optim.split_parameters(model)
    kind = (lambda p: mprec.optim.Adagrad(p, lr=0.1, in_backward=False)) if ours else torch.optim.Adagrad
    return [kind(tables) if ours else kind(tables, lr=0.1), torch.optim.SGD(rest, lr=0.1)]


def test_accumulation_and_clipping():
    torch.manual_seed(0)
    model = DLRM(FEATURES, 2, 4, (8,), (8,))
    twin = copy.deepcopy(model)
    loader = torch.utils.data.DataLoader(dataset(16), 4, collate_fn=collate)
    batches = list(loader)

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, tables, rest, loader = accelerator.prepare(model, *optimizers_of(model, True), loader)
    for batch in loader:
        assert isinstance(batch, Batch)
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.05)
            for optimizer in (tables, rest):
                optimizer.step()
                optimizer.zero_grad()

    plain = optimizers_of(twin, False)
    for number, batch in enumerate(batches):
        (loss_of(twin, batch) / 2).backward()
        if number % 2:
            assert torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05) > 0.05
            for optimizer in plain:
                optimizer.step()
                optimizer.zero_grad()
    for ours, expected in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)
