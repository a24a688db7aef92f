"""What Prometheus reads from ``/metrics``, and the latencies of late for ``/stats``."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

__all__ = ["Metrics"]

_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0, 5.0)
_RECENT_S = 10.0


class Metrics:
    """``statistics`` gives an engine's counts, or None while there is no engine; it, ``is_ready`` and
    ``connections`` are asked on each scrape.
    """

    def __init__(
        self,
        statistics: Callable[[], dict | None],
        is_ready: Callable[[], bool],
        connections: Callable[[], int],
    ) -> None:
        self._statistics, self._is_ready, self._connections = statistics, is_ready, connections
        self._registry = CollectorRegistry()
        self._latency = Histogram(
            "mprec_latency_seconds",
            "From a query's first byte to its answer's being handed to the network, of answered queries",
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._replies = Counter(
            "mprec_http_replies", "Replies to /score by status", ["status"], registry=self._registry
        )
        self._by_status = {}
        self._recent: deque[tuple[float, float]] = deque(maxlen=4096)
        self._registry.register(self)

    def reply(self, status: int) -> None:
        """A query was replied to."""
        child = self._by_status.get(status)
        if child is None:
            child = self._by_status[status] = self._replies.labels(str(status))
        child.inc()

    def answered(self, now: float, latency_s: float) -> None:
        """A query was answered; times in seconds."""
        self._latency.observe(latency_s)
        self._recent.append((now, latency_s))

    def recent(self, now: float) -> dict:
        """Latencies in milliseconds of the queries answered in the last ten seconds (of 4096 at most)."""
        values = [latency for at, latency in self._recent if now - at <= _RECENT_S]
        if not values:
            return {"count": 0, "p50": None, "p99": None}
        p50, p99 = np.quantile(values, (0.5, 0.99)) * 1e3
        return {"count": len(values), "p50": float(p50), "p99": float(p99)}

    def text(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """For the registry: what the engine counts."""
        yield GaugeMetricFamily("mprec_ready", "1 if queries are welcome", value=float(self._is_ready()))
        yield GaugeMetricFamily("mprec_connections", "Open connections", value=float(self._connections()))
        counts = self._statistics()
        if counts is None:
            return
        queries = CounterMetricFamily(
            "mprec_queries", "Queries by how they ended", labels=["outcome", "reason"]
        )
        queries.add_metric(["in_time", ""], counts["answered"] - counts["late"])
        for outcome in ("late", "failed", "cancelled"):
            queries.add_metric([outcome, ""], counts.get(outcome, 0))
        for reason, count in counts["refused"].items():
            queries.add_metric(["refused", reason], count)
        yield queries
        yield _by("mprec_samples", "Samples scored", CounterMetricFamily, "path", counts["samples"])
        yield _by(
            "mprec_path_errors",
            "Batches that a path failed and another answered",
            CounterMetricFamily,
            "path",
            counts.get("path_errors", {}),
        )
        yield _by(
            "mprec_correction",
            "Observed over profiled time",
            GaugeMetricFamily,
            "path",
            counts["corrections"],
        )
        yield GaugeMetricFamily("mprec_waiting_samples", "Samples that wait", value=counts["waiting_samples"])
        yield GaugeMetricFamily("mprec_waiting_queries", "Queries that wait", value=counts["waiting_queries"])
        executors = counts["executors"]
        yield _by(
            "mprec_batches",
            "Batches scored",
            CounterMetricFamily,
            "executor",
            {name: of["batches"] for name, of in executors.items()},
        )
        yield _by(
            "mprec_busy_seconds",
            "Time spent on batches",
            CounterMetricFamily,
            "executor",
            {name: of["busy_s"] for name, of in executors.items()},
        )


def _by(name: str, text: str, kind: type, label: str, values: dict) -> Metric:
    family = kind(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
