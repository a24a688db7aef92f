"""Rows of ``compare.py``: calls with two threads against the same with one, on idle cores and with one core
taken by another process."""

import contextlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import harness
import torch
from compare import Row
from compare_whole_path import KAGGLE
from dhe_peers import SHAPES
from embedding_bag_peers import draw_ids

import mprec
from mprec.dispatch.microbenchmark import no_collection
from mprec.models import DLRM
from mprec.nn import DeepHashEmbeddingBag, DheConfig, EmbeddingBagCollection, FeatureConfig
from mprec.optim import RowWiseAdagrad

BATCHES = (64, 128, 512, 2048)
WORKS = (
    "bags 26 tables d16",
    "DHE 1024-128-16",
    "whole path kaggle d16",
    "row-wise Adagrad step 26 tables d16",
)
#: By whether another process takes a core: of the time with one thread to that with two.
TARGETS = {False: 1.0, True: 1 / 1.3}
SIZES = (*KAGGLE, 286181, *[10**6] * 5)


def _name(work: str, batch: int, busy: bool) -> str:
    return f"2 threads{', a busy core' if busy else ''}: {work} batch {batch}"


def names() -> list[str]:
    return [_name(work, batch, busy) for busy in TARGETS for work in WORKS for batch in BATCHES]


@contextlib.contextmanager
def busy_core():
    """Another process that takes the last core of this one's, as far as it is let."""
    core = max(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    neighbour = subprocess.Popen([sys.executable, "-c", code])
    try:
        time.sleep(0.2)
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


def rows(seconds: float, only: str) -> Iterator[Row]:
    wanted = [name for name in names() if only in name]
    with torch.inference_mode(False):
        calls = {work: _calls(work) for work in WORKS if any(work in name for name in wanted)}
    for busy, target in TARGETS.items():
        with busy_core() if busy else contextlib.nullcontext():
            for work, of_batch in calls.items():
                for batch in BATCHES:
                    if (name := _name(work, batch, busy)) in wanted:
                        one, two = _means(of_batch(batch), seconds)
                        yield Row(name, "itself with 1", two * 1e6, one * 1e6, target, "means of all calls")


def _means(call: Callable[[], object], seconds: float, turn_s: float = 0.05) -> tuple[float, float]:
    """Seconds a call with one thread and with two, in turns much longer than a scheduler's slice: means, for
    a call that waits for a core is rare and long."""
    turns: dict[int, list[float]] = {1: [], 2: []}
    with no_collection():
        end = time.perf_counter() + max(seconds, 6 * turn_s)
        while time.perf_counter() < end:
            for threads, means in turns.items():
                with harness.threads(threads):
                    call()
                    begin, count = time.perf_counter(), 0
                    while (now := time.perf_counter()) < begin + turn_s:
                        call()
                        count += 1
                    means.append((now - begin) / count)
    return statistics.fmean(turns[1]), statistics.fmean(turns[2])


def _calls(work: str) -> Callable[[int], Callable[[], object]]:
    """From a batch size to a call on fresh draws of IDs in turn."""
    features = [FeatureConfig(f"f{t}", size, 16) for t, size in enumerate(SIZES)]
    train = "step" in work
    if "DHE" in work:
        inputs, hidden, dim = SHAPES["1024-128-16"]
        module = DeepHashEmbeddingBag(dim, DheConfig(inputs, hidden), include_last_offset=True)
        sizes = (10**6,)
    elif "path" in work:
        model = DLRM(features, 13, 16, (512, 256, 64), (512, 256)).eval()
        module, sizes = mprec.compile_path(model), SIZES
    else:
        module, sizes = EmbeddingBagCollection(features), SIZES
    optimizer = RowWiseAdagrad(module.parameters(), lr=0.01) if train else None

    def of_batch(batch: int) -> Callable[[], object]:
        # Made outside of inference mode, for a backward pass keeps them.
        with torch.inference_mode(False):
            return _of_batch(batch)

    def _of_batch(batch: int) -> Callable[[], object]:
        draws = [draw_ids(sizes, batch) for _ in range(16)]
        offsets = torch.arange(len(sizes) * batch + 1)
        dense = (torch.rand(batch, 13),) if "path" in work else ()
        grad = torch.ones(batch, len(sizes) * 16)

        def call() -> None:
            draws.append(ids := draws.pop(0))
            with torch.inference_mode(not train), torch.set_grad_enabled(train):
                out = module(*dense, ids, offsets)
                if optimizer is not None:
                    out.backward(grad)

        return call

    return of_batch
