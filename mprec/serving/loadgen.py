"""MLPerf LoadGen (PyPI ``mlcommons-loadgen``, an optional extra) as the driver of an engine.

Its Server scenario issues single-sample queries as a Poisson process and says whether a latency bound holds
at a percentile: an independent generator and judge. A *sample* of LoadGen's is here one query, that is a
batch of the load test's sizes, so that its queries per second are ours.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mprec.data import Batch
from mprec.serving.engine import Engine

__all__ = ["LoadGenResult", "run_loadgen"]

_MOST_UNANSWERED = 0.01  # of the queries
HOW_TO_GET = "the LoadGen driver needs: pip install mlcommons-loadgen"


@dataclass(frozen=True)
class LoadGenResult:
    """``valid``: LoadGen's verdict, and at most a hundredth of the queries refused or failed: LoadGen itself
    takes those for answers given at once. ``reason`` says why not. Counts are the engine's.
    """

    valid: bool
    reason: str
    target_qps: float
    queries: int
    refused: int
    failed: int
    summary: dict[str, str]


def run_loadgen(
    engine: Engine,
    queries: Sequence[Batch],
    *,
    qps: float,
    seconds: float = 10.0,
    percentile: float = 0.99,
    min_queries: int = 100,
) -> LoadGenResult:
    """Drive a started engine with ``queries`` (repeated as needed) at ``qps`` for ``seconds``.

    ``ImportError`` without mlcommons-loadgen.
    """
    try:
        import mlperf_loadgen as lg
    except ImportError as error:
        raise ImportError(HOW_TO_GET) from error
    if not qps > 0 or not seconds > 0 or not queries:
        raise ValueError(f"qps, seconds must be positive and queries not empty, got {qps}, {seconds}")

    def complete(sample_id: int):
        # The answer itself is of no interest to LoadGen: id, address and length of a response.
        return lambda future: lg.QuerySamplesComplete([lg.QuerySampleResponse(sample_id, 0, 0)])

    def issue(samples) -> None:
        for sample in samples:
            engine.submit(queries[sample.index]).add_done_callback(complete(sample.id))

    settings = lg.TestSettings()
    settings.scenario = lg.TestScenario.Server
    settings.mode = lg.TestMode.PerformanceOnly
    settings.server_target_qps = qps
    settings.server_target_latency_ns = int(engine.sla_s * 1e9)
    settings.server_target_latency_percentile = percentile
    settings.min_duration_ms = int(1e3 * seconds)
    settings.min_query_count = min_queries
    settings.server_coalesce_queries = False
    before = engine.statistics()
    with tempfile.TemporaryDirectory() as folder:
        output = lg.LogOutputSettings()
        output.outdir = folder
        logs = lg.LogSettings()
        logs.log_output = output
        system = lg.ConstructSUT(issue, lambda: None)
        library = lg.ConstructQSL(len(queries), len(queries), lambda indices: None, lambda indices: None)
        try:
            lg.StartTestWithLogSettings(system, library, settings, logs)
        finally:
            lg.DestroyQSL(library)
            lg.DestroySUT(system)
        text = (Path(folder) / "mlperf_log_summary.txt").read_text()
    after = engine.statistics()
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    summary = {key.strip(): value.strip() for key, value in pairs}
    queries = after["queries"] - before["queries"]
    refused = sum(after["refused"].values()) - sum(before["refused"].values())
    failed = after["failed"] - before["failed"]
    reasons = []
    if summary.get("Result is") != "VALID":
        conditions = [line.strip(" *") for line in text.splitlines() if line.strip().startswith("*")]
        unmet = [key for key, value in summary.items() if value.upper() == "NO"]
        reasons.append("LoadGen: " + "; ".join(unmet + conditions or ["INVALID"]))
    if refused + failed > _MOST_UNANSWERED * queries:
        reasons.append(f"{refused} of {queries} queries refused, {failed} failed")
    return LoadGenResult(not reasons, "; ".join(reasons), qps, queries, refused, failed, summary)
