"""Checkpoints: round trip, atomicity, and every kind of damaged or foreign file."""

import contextlib
import os
import pickle
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch

from mprec import checkpoint
from mprec.data import RawValues, Vocabulary
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
    with pytest.raises(TypeError, match="model: expected one of"):
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


def as_version(version, path):
    """The same model as mprec wrote it before there were digests (1), or vocabularies (2)."""
    content = {**torch.load(path, weights_only=True), "version": version}
    del content["digest"], content["vocabularies"]
    if version == 2:
        content["digest"] = checkpoint.digest_of(content)
    torch.save(content, path)


@pytest.fixture(params=[1, 2, 3])
def either(request, path):
    """A checkpoint of each version."""
    if request.param < checkpoint.VERSION:
        as_version(request.param, path)
    assert torch.load(path, weights_only=True)["version"] == request.param
    return path


def assert_whole(path, model):
    loaded, metadata = checkpoint.load(path)
    assert metadata == METADATA
    assert loaded.config() == model.config()
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_every_flipped_bit_is_noticed_or_harmless(either, model):
    content = either.read_bytes()
    rng = np.random.default_rng(0)
    noticed = 0
    for bit in rng.choice(8 * len(content), 200, replace=False).tolist():
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        either.write_bytes(damaged)
        try:
            assert_whole(either, model)
        except CheckpointError:
            noticed += 1
    assert noticed > 50  # the others fell on padding and on what only says where things are


def test_every_flipped_bit_of_the_weights_is_noticed(either, model):
    content = either.read_bytes()
    noticed = 0
    for tensor in model.state_dict().values():
        raw = tensor.numpy().tobytes()
        start = content.index(raw) if len(raw) > 8 else -1
        if start < 0:
            continue
        damaged = bytearray(content)
        damaged[start + len(raw) // 2] ^= 1
        either.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            checkpoint.load(either)
        noticed += 1
    assert noticed > 5


@pytest.mark.parametrize("zeroed", [1, 16, 300])
def test_every_run_of_lost_bytes_is_noticed_or_harmless(either, model, zeroed):
    content = either.read_bytes()
    for start in np.random.default_rng(1).integers(len(content) - zeroed, size=60).tolist():
        either.write_bytes(content[:start] + bytes(zeroed) + content[start + zeroed :])
        with contextlib.suppress(CheckpointError):
            assert_whole(either, model)


def test_every_truncation_is_refused(either):
    content = either.read_bytes()
    lengths = {*range(0, len(content), len(content) // 100), *range(len(content) - 100, len(content))}
    for length in sorted(lengths):
        either.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="damaged or no checkpoint"):
            checkpoint.load(either)


@pytest.mark.parametrize("part", ["kind", "config", "metadata", "state", "digest"])
def test_the_digest_covers_everything(path, part):
    """Edited through torch, which makes the archive's checksums fit again."""
    content = torch.load(path, weights_only=True)
    edited = {
        "kind": "multi-path dlrm",
        "config": {**content["config"], "hybrid": "mean"},
        "metadata": {**content["metadata"], "seed": 4},
        "state": {**content["state"], "constant": torch.zeros(4)},
        "digest": content["digest"][::-1],
    }
    torch.save({**content, part: edited[part]}, path)
    with pytest.raises(CheckpointError, match="the digest does not fit"):
        checkpoint.load(path)
    without = {key: value for key, value in content.items() if key != part}
    torch.save(without, path)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.load(path)


def test_the_digest_knows_names_dtypes_and_shapes():
    a = torch.arange(8, dtype=torch.int32)
    states = [
        {"a": a},
        {"b": a},
        {"a": a.view(2, 4)},
        {"a": a.view(torch.float32)},
        {"a": a[:4], "b": a[4:]},
        {"a": a[:2], "b": a[2:]},
        {"a": a.flip(0)},
        {"a": a.to(torch.int64)},
        {},
    ]
    digests = [checkpoint.digest_of({"state": state}) for state in states]
    assert len(set(digests)) == len(states)
    square = torch.arange(9.0).view(3, 3)
    transposed = {"state": {"a": square.t(), "b": torch.tensor(1.0), "c": torch.zeros(0, 2).bfloat16()}}
    copied = {"state": {name: t.clone() for name, t in reversed(transposed["state"].items())}}
    assert checkpoint.digest_of(transposed) == checkpoint.digest_of(copied)


def test_version_1_still_loads(path, model):
    as_version(1, path)
    assert_whole(path, model)


def test_describe(either, model):
    assert checkpoint.describe(either) == (model.config(), METADATA)
    either.write_bytes(either.read_bytes()[:-1])
    with pytest.raises(CheckpointError):
        checkpoint.describe(either)


MEMORY = """
import sys
from pathlib import Path
from mprec import checkpoint
from mprec.data import RawValues, Vocabulary
from mprec.models import DLRM

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

plain = DLRM.load_state_dict
def load_state_dict(self, state):
    result = plain(self, state)
    print(private() - before)  # what was read and the model are both alive
    return result

DLRM.load_state_dict = load_state_dict
before = private()
model, _ = checkpoint.load(sys.argv[1])
print(private() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("version", [1, 2])
def test_loading_does_not_hold_the_weights_twice(tmp_path, version):
    size = 64 << 20
    checkpoint.save(tmp_path / "large.pt", DLRM([FeatureConfig("a", size // 64, 16)], 0, 16), {})
    if version == 1:
        as_version(1, tmp_path / "large.pt")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "large.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(0.9 * size < int(grown) < 1.5 * size for grown in done.stdout.split()), done.stdout
    assert len(done.stdout.split()) == 2


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


def test_newer_version(path):
    torch.save({**torch.load(path, weights_only=True), "version": 99}, path)
    with pytest.raises(CheckpointError, match="has checkpoint version 99; this mprec reads versions 1 to 3"):
        checkpoint.load(path)


def test_contents_that_do_not_fit(path):
    """Whole files, by their digest, of models that there are not."""
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
        {"metadata": 3},
    ):
        changed = {**content, **changes}
        torch.save({**changed, "digest": checkpoint.digest_of(changed)}, path)
        with pytest.raises(CheckpointError, match="do not fit the model described"):
            checkpoint.load(path)


def test_vocabularies_are_kept(tmp_path, model):
    path = tmp_path / "model.pt"
    encoders = {
        "a": Vocabulary.in_order(np.array([7, -1, 3]), 2, "integer"),
        "b": RawValues("text"),
    }
    checkpoint.save(path, model, METADATA, encoders)
    assert_whole(path, model)
    found = checkpoint.vocabularies(path)
    assert found["b"] == encoders["b"]
    assert (found["a"].oov, found["a"].kind) == (2, "integer")
    assert found["a"].encode(np.array([3, 7, -1])).tolist() == [4, 2, 3]
    content = torch.load(path, weights_only=True)
    content["vocabularies"]["a"]["oov"] = 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.vocabularies(path)
    checkpoint.save(path, model, METADATA)
    assert checkpoint.vocabularies(path) == {}
    as_version(1, path)
    assert checkpoint.vocabularies(path) == {}
