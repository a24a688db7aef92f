"""Training of click models: early stopping on held-out quality, seeded, resumable, with nothing drawn on a
screen.

    result = train(model, *dataset.split()[:2], TrainOptions(epochs=10), progress=print)

MLPs and DHE decoders are trained by Adam; tables too, if they are large on the rows of each batch only.
"""

from mprec.training.interruption import Interruption
from mprec.training.loop import Keep, train
from mprec.training.models import (
    MIXED,
    MODELS,
    MULTI_PATH,
    Trained,
    build_model,
    chosen_features,
    train_representations,
)
from mprec.training.options import DECAYS, MONITORS, TABLE_OPTIMIZERS, Progress, TrainOptions, TrainResult
from mprec.training.quality import evaluate, evaluate_paths, predict

__all__ = [
    "DECAYS",
    "MIXED",
    "MODELS",
    "MONITORS",
    "MULTI_PATH",
    "TABLE_OPTIMIZERS",
    "Interruption",
    "Keep",
    "Progress",
    "TrainOptions",
    "TrainResult",
    "Trained",
    "build_model",
    "chosen_features",
    "evaluate",
    "evaluate_paths",
    "predict",
    "train",
    "train_representations",
]
