"""Queries are traced where the program is traced, and OpenTelemetry is not touched elsewhere."""

import subprocess
import sys
import time
from types import SimpleNamespace

from http_serving import GOOD, serving


class Span:
    def __init__(self, log, name, context, kind, start):
        self.name, self.context, self.kind, self.start, self.attributes = name, context, kind, start, {}
        log.append(self)

    def set_attribute(self, key, value):
        self.attributes[key] = value

    def end(self, at):
        self.stop = at


def traced(monkeypatch):
    """What OpenTelemetry's API would be given, as a list of spans."""
    spans = []
    tracer = SimpleNamespace(
        start_span=lambda name, context=None, kind="internal", start_time=None: Span(
            spans, name, context, kind, start_time
        )
    )
    trace = SimpleNamespace(
        get_tracer=lambda name: tracer,
        SpanKind=SimpleNamespace(SERVER="server"),
        set_span_in_context=lambda span, context: (span, context),
    )
    propagate = SimpleNamespace(extract=lambda carrier: carrier.get("traceparent"))
    api = SimpleNamespace(trace=trace, propagate=propagate)
    monkeypatch.setitem(sys.modules, "opentelemetry", api)
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", trace)
    return spans


def test_a_query_is_a_span_with_its_parts_in_that_of_the_client(monkeypatch):
    spans = traced(monkeypatch)
    begin = time.time_ns()
    with serving() as server:
        assert server.ask(GOOD, headers={"traceparent": "the client's"})[0] == 200
        assert server.ask({**GOOD, "ids": [[-1, 2]]})[0] == 400
        # the same through the application, to which queries with other heads go
        assert server.ask(GOOD, headers={"Connection": "close"})[0] == 200
    end = time.time_ns()
    names = [span.name for span in spans]
    whole = ["POST /score", "read", "score", "reply"]
    assert names == [*whole, "POST /score", *whole]
    root, *parts = spans[:4]
    assert (root.context, root.kind) == ("the client's", "server")
    assert root.attributes == {"http.response.status_code": 200, "mprec.samples.p": 1}
    assert all(part.context == (root, "the client's") for part in parts)
    assert begin - 5e6 <= root.start == parts[0].start < parts[0].stop == parts[1].start
    assert parts[1].stop == parts[2].start <= parts[2].stop == root.stop <= end + 5e6
    assert spans[4].attributes == {"http.response.status_code": 400}


def test_nothing_of_opentelemetry_is_imported_by_itself():
    code = (
        "import sys, time; from mprec.serving.http.score import Scoring; from types import SimpleNamespace;"
        "Scoring(SimpleNamespace(clock=time.perf_counter));"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
