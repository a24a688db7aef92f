"""Answering queries: an engine with a bounded queue and dynamic batching, a load test, and a server
(:mod:`mprec.serving.http`).

    with Engine(dispatcher, sla_s=0.010) as engine:
        answer = engine.score(batch)  # waits; engine.submit(batch) gives a future

The dispatcher lives in the engine's worker, next to the kernels.
"""

from mprec.serving.engine import Answer, Engine, QueryRefusedError
from mprec.serving.executors import CudaExecutor, Executor, LocalExecutor, SimulatedExecutor
from mprec.serving.process_executor import ProcessExecutor
from mprec.serving.rows import QueryTooLargeError, rows_to_batch

__all__ = [
    "Answer",
    "CudaExecutor",
    "Engine",
    "Executor",
    "LocalExecutor",
    "ProcessExecutor",
    "QueryRefusedError",
    "QueryTooLargeError",
    "SimulatedExecutor",
    "rows_to_batch",
]
