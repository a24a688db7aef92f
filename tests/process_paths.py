"""Models that a worker process imports: what it is given must be importable by name."""

import os
import signal
import time

import torch

from mprec.errors import IdOutOfRangeError


class Custom(Exception):
    pass


def echo(batch):
    """Scores that depend on all that a batch has."""
    features = (len(batch.offsets) - 1) // len(batch)
    bags = torch.segment_reduce(batch.indices.double(), "sum", offsets=batch.offsets, initial=0)
    return (bags.view(features, -1).sum(0) + batch.dense.double().sum(1) + 2 * batch.labels).float()


def double(batch):
    return echo(batch).double()


def raising(batch):
    """What it raises is said by the first ID."""
    kind = int(batch.indices[0])
    if kind == 1:
        raise IdOutOfRangeError("ID 1 is bad")
    if kind == 2:
        raise KeyError("name")
    if kind == 3:
        raise Custom("of my own")
    if kind == 4:
        raise SystemExit(7)
    if kind == 5:
        b"\xff".decode()
    return echo(batch)


def mortal(batch):
    """Dies of the first ID 666, without a word."""
    if int(batch.indices[0]) == 666:
        os.kill(os.getpid(), signal.SIGKILL)
    return echo(batch)


def slow(batch):
    time.sleep(0.005)
    return echo(batch)


def threads(batch):
    return torch.full((len(batch),), float(torch.get_num_threads()))


def process(batch):
    return torch.full((len(batch),), float(os.getpid()))
