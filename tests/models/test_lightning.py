"""Batches and optimizers in Lightning: moved, converted, accumulated, clipped."""

import copy

import pytest
import torch
from test_torch_data import dataset

import mprec.optim
from mprec.bags import Bags
from mprec.data import Batch, collate
from mprec.models import DLRM
from mprec.nn import EmbeddingBagCollection, FeatureConfig

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
lightning = pytest.importorskip("pytorch_lightning", exc_type=ImportError)
FEATURES = [FeatureConfig("a", 9, 4), FeatureConfig("b", 5, 4)]


def batches(size=4):
    return torch.utils.data.DataLoader(dataset(16), size, collate_fn=collate)


def fit(module, steps, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet["enable_model_summary"] = False
    torch.manual_seed(0)
    lightning.Trainer(accelerator="cpu", devices=1, max_steps=steps, **quiet, **options).fit(
        module, batches()
    )


class Clicks(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = DLRM(FEATURES, 2, 4, (8,), (8,))
        self.seen, self.losses = [], []

    def training_step(self, batch, number):
        self.seen.append(batch)
        logits = self.model(batch.dense, batch.bags)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), batch.labels.float())
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_a_batch_is_moved_and_converted(precision):
    module = Clicks()
    fit(module, 8, precision=precision, max_epochs=2)
    assert len(module.losses) == 8
    assert sum(module.losses[-4:]) < sum(module.losses[:4])
    for batch, original in zip(module.seen, batches(), strict=False):
        assert isinstance(batch, Batch)
        assert isinstance(batch.bags, Bags)
        assert batch.dense.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
        assert torch.equal(batch.indices, original.indices)
        assert (batch.bags.num_features, len(batch)) == (2, len(original))


class Tables(lightning.LightningModule):
    """Tables alone: Lightning's automatic loop has one optimizer."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.tables, self.make = EmbeddingBagCollection(FEATURES), make

    def training_step(self, batch, number):
        return loss_of(self.tables, batch)

    def configure_optimizers(self):
        return self.make(self.parameters())


def loss_of(tables, batch):
    return (tables(batch.bags).sum(1) - batch.labels).square().mean()


def test_accumulation_and_clipping_by_the_automatic_loop():
    module = Tables(lambda p: mprec.optim.Adagrad(p, lr=0.1, in_backward=False))
    twin = copy.deepcopy(module.tables)
    fit(module, 2, accumulate_grad_batches=2, gradient_clip_val=0.05)
    optimizer = torch.optim.Adagrad(twin.parameters(), lr=0.1)
    for number, batch in enumerate(batches()):
        (loss_of(twin, batch) / 2).backward()
        if number % 2:
            assert torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.05) > 0.05
            optimizer.step()
            optimizer.zero_grad()
    for ours, plain in zip(module.tables.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, plain)


class ByHand(Clicks):
    """Tables and the rest have an optimizer each: a loop of one's own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, number):
        loss = super().training_step(batch, number)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            self.clip_gradients(optimizer, 0.5)
            optimizer.step()

    def configure_optimizers(self):
        tables, rest = mprec.optim.split_parameters(self)
        return [
            mprec.optim.RowWiseAdagrad(tables, lr=0.1, in_backward=False),
            torch.optim.Adam(rest, lr=0.01),
        ]


def test_two_optimizers_by_the_manual_loop():
    module = ByHand()
    before = copy.deepcopy(module.state_dict())
    fit(module, 16, max_epochs=2)
    assert sum(module.losses[-4:]) < sum(module.losses[:4])
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert {"model.embeddings.tables.a.weight", "model.top.0.weight"} <= changed
