"""Spans of OpenTelemetry for queries, where the program is traced: by ``opentelemetry-instrument mprec
serve``, or by a provider that it has set up itself. Elsewhere nothing of OpenTelemetry is imported.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

__all__ = ["Tracing", "find_tracing"]


def find_tracing(clock: Callable[[], float]) -> Tracing | None:
    """None unless the program has imported OpenTelemetry's API."""
    return Tracing(clock) if "opentelemetry.trace" in sys.modules else None


class Tracing:
    """Writes the spans of a query when it has ended, so that until then it costs nothing. ``clock`` is in
    seconds; spans have the time of day."""

    def __init__(self, clock: Callable[[], float]) -> None:
        from opentelemetry import propagate, trace

        self._clock, self._trace, self._extract = clock, trace, propagate.extract
        self._tracer = trace.get_tracer("mprec")

    def record(
        self,
        headers: Sequence[tuple[bytes, bytes]],
        status: int,
        times: Sequence[tuple[str, float, float]],
        paths: dict[str, int] | None,
    ) -> None:
        """``times``: (name, begin, end) of the query, first, and of its parts, on the clock. ``headers`` may
        name the client's own span. ``paths``: samples scored by each."""
        now = time.time_ns() - int(1e9 * self._clock())
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        context = self._extract(carrier)
        (name, begin, end), *parts = times
        root = self._tracer.start_span(
            name, context, self._trace.SpanKind.SERVER, start_time=now + int(1e9 * begin)
        )
        root.set_attribute("http.response.status_code", status)
        for path, samples in (paths or {}).items():
            root.set_attribute(f"mprec.samples.{path}", samples)
        context = self._trace.set_span_in_context(root, context)
        for part, since, until in parts:
            self._tracer.start_span(part, context, start_time=now + int(1e9 * since)).end(
                now + int(1e9 * until)
            )
        root.end(now + int(1e9 * end))
