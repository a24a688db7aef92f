"""Checkpoints: round trip, atomicity, and every kind of damaged or foreign file."""

import os
import pickle
import stat

import pytest
import torch

from mprec import checkpoint
from mprec.errors import CheckpointError
from mprec.models import DLRM
from mprec.nn import DheConfig, FeatureConfig, with_representation

METADATA = {"representation": "select", "metrics": {"test": {"auc": 0.75}}, "seed": 3, "features": [["a", 9]]}


@pytest.fixture
def model():
    torch.manual_seed(0)
    features = [FeatureConfig("a", 9, 4), FeatureConfig("b", 5, 4)]
    dhe = DheConfig(k=8, hidden=(6,), seed=7)
    return DLRM(
        with_representation(features, "select", dhe=dhe, select_largest=1), 2, 4, bottom=(3,), top=(4,)
    )


@pytest.fixture
def path(model, tmp_path):
    checkpoint.save(tmp_path / "model.pt", model, METADATA)
    return tmp_path / "model.pt"


def test_round_trip(model, path):
    loaded, metadata = checkpoint.load(path)
    assert metadata == METADATA
    assert loaded.config() == model.config()
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    batch = torch.randn(2, 2), torch.tensor([3, 8, 0, 4]), torch.arange(5)
    assert torch.equal(loaded(*batch), model.eval()(*batch))


def test_torch_reads_it_with_weights_only(path):
    content = torch.load(path, weights_only=True)
    assert content["format"] == checkpoint.FORMAT
    assert content["version"] == checkpoint.VERSION


def test_nan_weights_survive(model, tmp_path):
    with torch.no_grad():
        model.top[0].weight[0, 0] = float("nan")
    checkpoint.save(tmp_path / "nan.pt", model, {})
    assert checkpoint.load(tmp_path / "nan.pt")[0].top[0].weight[0, 0].isnan()


def test_overwrites_with_the_permissions_of_a_new_file(model, path):
    checkpoint.save(path, model, {"seed": 4})
    assert checkpoint.load(path)[1] == {"seed": 4}
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    assert os.listdir(path.parent) == ["model.pt"]


@pytest.mark.parametrize("when", ["write", "sync", "rename"])
def test_a_failed_save_leaves_the_old_file_and_no_other(model, path, monkeypatch, when):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    target = {"write": (torch, "save"), "sync": (os, "fsync"), "rename": (os, "replace")}[when]
    monkeypatch.setattr(*target, fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, model, {})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["model.pt"]


def test_what_cannot_be_saved(model, tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save(tmp_path / "x.pt", model, {"auc": torch.tensor(1.0)})
    with pytest.raises(TypeError, match="model must be one of"):
        checkpoint.save(tmp_path / "x.pt", torch.nn.Linear(2, 2), {})
    with pytest.raises(FileNotFoundError):
        checkpoint.save(tmp_path / "nowhere" / "x.pt", model, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_truncated(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"model\.pt is damaged or no checkpoint"):
        checkpoint.load(path)


def test_flipped_bytes_are_noticed_or_harmless(path, model):
    """A zip file carries checksums; a flip either raises CheckpointError or leaves a model that runs."""
    content = bytearray(path.read_bytes())
    noticed = 0
    for position in range(0, len(content), max(len(content) // 60, 1)):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        try:
            loaded, _ = checkpoint.load(path)
        except CheckpointError:
            noticed += 1
        else:
            assert loaded.config().keys() == model.config().keys()
    assert noticed > 10


class Harmful:
    def __reduce__(self):
        return print, ("this must not be printed",)


def test_foreign_files(tmp_path, capsys):
    path = tmp_path / "file"
    for content in (b"", b"hello", pickle.dumps({"a": 1}), pickle.dumps(Harmful())):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
            checkpoint.load(path)
    torch.save({"state": {}}, path)
    with pytest.raises(CheckpointError, match="saved by something else"):
        checkpoint.load(path)
    torch.save(Harmful(), path)
    with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
        checkpoint.load(path)
    with pytest.raises(CheckpointError, match=r"cannot read checkpoint .*No such file"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="cannot read checkpoint"):
        checkpoint.load(tmp_path)
    assert capsys.readouterr().out == ""


def edited(path, **changes):
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


def test_newer_version(path):
    edited(path, version=99)
    with pytest.raises(CheckpointError, match="has checkpoint version 99; this mprec reads version 1"):
        checkpoint.load(path)


def test_contents_that_do_not_fit(path):
    content = torch.load(path, weights_only=True)
    state = dict(content["state"])
    state.pop(next(iter(state)))
    for changes in (
        {"state": state},
        {"kind": "nothing"},
        {"config": {}},
        {"config": {**content["config"], "embedding_dim": 8}},
        {"config": {**content["config"], "colour": 8}},
        {"config": None},
        {"state": None},
        {"metadata": 3},
    ):
        torch.save({**content, **changes}, path)
        with pytest.raises(CheckpointError, match="do not fit the model described"):
            checkpoint.load(path)
