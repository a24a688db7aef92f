"""Click logs: Criteo's format, MovieLens-style ratings, a flights table, and seeded synthetic logs.

    train, valid, test = mprec.data.load("movielens").split()
    batch = train.batch(slice(0, 128))

The layout of a batch is described in :mod:`mprec.data.dataset`.
"""

from mprec.data.batching import collate
from mprec.data.dataset import Batch, ClickDataset, Column
from mprec.data.registry import available, load
from mprec.data.vocabulary import RawValues, Vocabulary

__all__ = ["Batch", "ClickDataset", "Column", "RawValues", "Vocabulary", "available", "collate", "load"]
