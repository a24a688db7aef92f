"""Engines from checkpoint files: what they answer, what they prefer, what they refuse."""

import numpy as np
import pytest
import torch
from small_checkpoints import NAMES, NUM_DENSE, VOCABULARIES, expected, save

from mprec import serving
from mprec.data.zipf import zipf_batches
from mprec.dispatch import Profile
from mprec.errors import CheckpointError
from mprec.paths import paths_from_checkpoints
from mprec.serving.build import engine_from_checkpoints, model_inputs

pytestmark = pytest.mark.usefixtures("own_cache")


def rows(batch):
    ids = batch.indices.view(len(VOCABULARIES), -1).t().tolist()
    return [[[value] for value in row] for row in ids], batch.dense.tolist()


def test_inputs_of_the_models(files):
    inputs = model_inputs(files)
    assert inputs == (VOCABULARIES, NAMES, NUM_DENSE, None)
    assert inputs.vocabularies == VOCABULARIES
    assert inputs.num_dense == NUM_DENSE


@pytest.mark.parametrize("metric", ["accuracy", "auc"])
def test_answers_by_the_path_of_the_best_metric(files, metric):
    engine = engine_from_checkpoints(files, sla_s=60.0, metric=metric, profile_seconds=0.05)
    batch = zipf_batches(VOCABULARIES, NUM_DENSE)(9, np.random.default_rng(3))
    with engine:
        answer = engine.submit(batch).result(timeout=60)
    best = {"accuracy": 1, "auc": 0}[metric]  # the table's AUC is the higher one
    assert answer.paths == {["table", "hybrid"][best]: 9}
    torch.testing.assert_close(answer.scores, torch.tensor(expected(files[best], *rows(batch))))


def test_is_not_started_and_takes_the_engines_options(files):
    engine = engine_from_checkpoints(files, sla_s=0.5, profile_seconds=0.05, max_batch=64, max_queue=100)
    assert isinstance(engine, serving.Engine)
    assert (engine.sla_s, engine.max_batch) == (0.5, 64)
    batch = zipf_batches(VOCABULARIES, NUM_DENSE)(101, np.random.default_rng(0))
    with pytest.raises(serving.QueryRefusedError) as refused:
        engine.submit(batch).result(timeout=1)
    assert refused.value.reason == "full"
    future = engine.submit(zipf_batches(VOCABULARIES, NUM_DENSE)(3, np.random.default_rng(0)))
    assert not future.done()
    engine.close(drain=False)


def test_measures_once_on_the_inputs_given(files, tmp_path):
    drawn = []

    def make_input(size, rng):
        drawn.append(size)
        return zipf_batches(VOCABULARIES, NUM_DENSE)(size, rng)

    options = {"sla_s": 1.0, "profile": tmp_path / "profile.json", "profile_seconds": 0.05}
    engine_from_checkpoints(files, make_input=make_input, **options)
    assert {1, 2048} <= set(drawn)
    Profile.load(tmp_path / "profile.json", paths_from_checkpoints(files))  # raises if it is not theirs
    drawn.clear()
    engine_from_checkpoints(files, make_input=make_input, **options)
    assert drawn == []


def test_takes_a_profile(files):
    paths = paths_from_checkpoints(files)
    profile = Profile.measure(paths, zipf_batches(VOCABULARIES, NUM_DENSE), (1, 64), seconds=0.05)

    def unused(size, rng):
        raise AssertionError("measured although a profile was given")

    engine = engine_from_checkpoints(files, sla_s=1.0, profile=profile, make_input=unused)
    with engine:
        batch = zipf_batches(VOCABULARIES, NUM_DENSE)(2, np.random.default_rng(0))
        assert len(engine.submit(batch).result(timeout=60).scores) == 2


def test_bad_files_and_options(files, tmp_path):
    for build in (model_inputs, lambda files: engine_from_checkpoints(files, sla_s=1.0)):
        with pytest.raises(ValueError, match="at least one checkpoint"):
            build([])
        with pytest.raises(CheckpointError, match="cannot read"):
            build([tmp_path / "absent.pt"])
        for number, other in enumerate(({"num_dense": 3}, {"vocabularies": [50, 8]})):
            folder = tmp_path / f"{build.__name__}{number}"
            folder.mkdir()
            with pytest.raises(ValueError, match="takes other inputs"):
                build([files[0], save(folder, "hybrid", **other)])
    damaged = tmp_path / "damaged.pt"
    content = files[0].read_bytes()
    damaged.write_bytes(content[: len(content) // 2] + bytes(64) + content[len(content) // 2 + 64 :])
    with pytest.raises(CheckpointError):
        model_inputs([damaged])
    with pytest.raises(ValueError, match="sla_s"):
        engine_from_checkpoints(files, sla_s=0.0, profile_seconds=0.05)
