"""The demo's result as a terminal table and as one self-contained HTML page.

Both are drawn from the same JSON-able dictionary (the *result*), so that a page can be made again from a
saved file. Its keys:

``environment``
    What ``mprec info`` prints.
``data``
    ``name``, ``rows``, ``features`` (a list of name and vocabulary), ``split`` (rows of train, valid, test).
``training``
    ``representation`` and ``history`` (AUC on the validation split after each epoch) of the model that was
    trained.
``representations``
    One entry for each path that was served: ``representation``, ``auc``, ``log_loss``, ``accuracy`` (test
    split), ``parameters``, ``embedding_bytes``, ``latency_ms`` (batch size -> median milliseconds).
``load``
    ``sla_ms``, ``qps``, ``queries``, ``rows``: one entry per static path and for the dispatcher with
    ``path``, ``p50_ms``, ``p95_ms``, ``p99_ms`` (None where nothing was answered), ``violations`` (share of
    queries late, refused or failed), ``accuracy`` (of the answered samples), ``correct_per_s``
    (latency-bounded throughput of correct predictions) and ``chosen`` (share of samples answered by each
    path). Optional: ``arrivals`` (in words), ``ratio`` and ``ratio_error`` (of the dispatcher's correct
    predictions over the best static path's, and its standard error), ``ratio_rounds`` (of these two alone,
    after the others') and ``finalists`` (their rows in these rounds), ``warnings``, and in rows
    ``correct_per_s_error``.
``plan``
    ``memory_bytes``, ``rows``: ``feature``, ``vocabulary``, ``choice``, ``bytes``.
"""

from collections.abc import Mapping
from pathlib import Path

from mprec.report.page import render
from mprec.report.terminal import demo_table
from mprec.report.verdict import verdicts

__all__ = ["demo_table", "render", "verdicts", "write"]


def write(result: Mapping, path: str | Path) -> Path:
    """Write the page of `result` to `path` and return the path."""
    path = Path(path)
    path.write_text(render(result), encoding="utf-8")
    return path
