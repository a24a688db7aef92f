"""A training that is cut off and goes on is the training that was not cut off, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from mprec import checkpoint
from mprec.data import load
from mprec.errors import CheckpointError, TrainingInterruptedError
from mprec.nn import DheConfig
from mprec.training import Interruption, Keep, TrainOptions, build_model, train

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"dim": 8, "dhe": DheConfig(k=64, hidden=(16,)), "bottom": (16,), "top": (16,)}
OPTIONS = {"epochs": 3, "batch_size": 128, "seed": 3, "warmup_steps": 5, "decay": "cosine", "clip_norm": 0.5}


@pytest.fixture(scope="module")
def dataset():
    return load("synthetic:rows=3000,features=3,vocabulary=40,seed=1,dense=2,bag=2")


def run(dataset, options, representation="hybrid", **keep):
    model = build_model(dataset, representation, seed=options.seed, **SMALL)
    result = train(model, *dataset.split()[:2], options, fresh=True, keep=Keep(**keep))
    return model.state_dict(), result


class After:
    """True from the n-th time on that it is asked."""

    def __init__(self, batches):
        self.left = batches

    def __call__(self):
        self.left -= 1
        return self.left < 0


def without_seconds(history):
    return [{key: value for key, value in epoch.items() if key != "seconds"} for epoch in history]


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("optimizer", ["adam", "sparse_adam", "rowwise_adagrad"])
def test_interrupted_and_resumed_is_uninterrupted(dataset, tmp_path, optimizer, mapped):
    options = TrainOptions(**OPTIONS, table_optimizer=optimizer, mapped_tables=mapped)
    whole, expected = run(dataset, options)
    file = tmp_path / "snapshot"
    for batches in (0, 7, 12, 19, 11):  # 19 batches an epoch: before the first one, within epochs, at an end
        with pytest.raises(TrainingInterruptedError, match=r"interrupted at epoch \d, before step \d+ of 19"):
            run(dataset, options, snapshot=file, resume=True, stop=After(batches))
    state, result = run(dataset, options, snapshot=file, resume=True)
    assert state.keys() == whole.keys()
    assert all(torch.equal(state[name], whole[name]) for name in whole)
    assert without_seconds(result.history) == without_seconds(expected.history)
    assert (result.best_epoch, result.valid) == (expected.best_epoch, expected.valid)
    # What has come to its end is there again without a further batch.
    again, result = run(dataset, options, snapshot=file, resume=True, stop=lambda: True)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_a_snapshot_of_another_training_is_refused(dataset, tmp_path):
    file = tmp_path / "snapshot"
    run(dataset, TrainOptions(epochs=1), "table", snapshot=file)
    with pytest.raises(ValueError, match=r"another options: batch_size \(1024, now 512\)"):
        run(dataset, TrainOptions(epochs=1, batch_size=512), "table", snapshot=file, resume=True)
    other = load("synthetic:rows=3000,features=3,vocabulary=40,seed=2,dense=2,bag=2")
    with pytest.raises(ValueError, match="another training part"):
        run(other, TrainOptions(epochs=1), "table", snapshot=file, resume=True)
    with pytest.raises(ValueError, match="another model"):
        run(dataset, TrainOptions(epochs=1), "hybrid", snapshot=file, resume=True)
    # Without resume it begins anew.
    run(dataset, TrainOptions(epochs=1, batch_size=512), "table", snapshot=file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        run(dataset, TrainOptions(epochs=1, batch_size=512), "table", snapshot=file, resume=True)


def test_keep_is_asked_for_a_snapshot_to_resume_from():
    with pytest.raises(ValueError, match="resume: there is no snapshot"):
        Keep(resume=True)


def test_each_better_epoch_is_told_when_it_is_reached(dataset):
    told = []
    options = TrainOptions(epochs=4, batch_size=128, table_learning_rate=0.02)
    _, result = run(dataset, options, "table", best=lambda model, so_far: told.append(so_far))
    assert told[-1].best_epoch == result.best_epoch
    assert told[-1].valid == result.valid
    best = float("-inf")
    expected = [e["epoch"] for e in result.history if e["auc"] > best and (best := e["auc"])]
    assert [each.best_epoch for each in told] == expected
    assert [len(each.history) for each in told] == expected


def test_the_second_signal_does_what_it_did_before():
    with Interruption() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop()
            signal.raise_signal(signal.SIGTERM)
            assert stop.signal == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


COMMAND = (
    "train --data synthetic:rows=20000,features=3,vocabulary=50 --representation table --epochs 3 --dim 8 "
)
COMMAND += "--top 8 --bottom 8 --batch-size 32 --seed 5 --json"
QUIET = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(output, *more):
    return [sys.executable, "-m", "mprec", *COMMAND.split(), "--output", str(output), *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoint of the command, not interrupted."""
    file = tmp_path_factory.mktemp("whole") / "whole.pt"
    subprocess.run(command(file), check=True, capture_output=True, env=QUIET)
    return file


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_a_checkpoint_and_what_resumes(tmp_path, whole, number):
    cut = tmp_path / "cut.pt"
    process = subprocess.Popen(
        command(cut), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=QUIET
    )
    deadline = time.monotonic() + 60
    while not cut.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert "with --resume goes on" in error
    model, metadata = checkpoint.load(cut)  # the best epoch so far
    assert set(metadata["metrics"]) == {"valid"}
    done = subprocess.run(command(cut, "--resume"), capture_output=True, text=True, env=QUIET)
    assert done.returncode == 0, done.stderr
    assert not cut.with_name("cut.pt.training").exists()
    (model, metadata), (expected, wanted) = checkpoint.load(cut), checkpoint.load(whole)
    state, target = model.state_dict(), expected.state_dict()
    assert all(torch.equal(state[name], target[name]) for name in target)
    assert metadata["metrics"] == wanted["metrics"]
    assert len(json.loads(done.stdout)["history"]) == 3
