"""The HTML page: one file, nothing fetched."""

import json
from collections.abc import Mapping
from importlib import resources

import jinja2

from mprec.report import figures
from mprec.report.terminal import format_bytes
from mprec.report.verdict import dispatcher_row, ranked, verdicts

__all__ = ["render"]


def render(result: Mapping) -> str:
    """The page of a demo's result (see the package's docstring for its keys)."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["bytes"] = format_bytes
    environment.filters["figure"] = lambda value, form: "-" if value is None else form % value
    template = environment.from_string(
        resources.files("mprec.report").joinpath("page.html").read_text("utf-8")
    )
    pictures = {
        "latency": figures.latency_curves(result),
        "size": figures.quality_against_size(result),
        "throughput": figures.correct_throughput(result),
        "chosen": figures.chosen_shares(result),
        "learning_curve": figures.learning_curve(result),
    }
    mine = dispatcher_row(result)
    return template.render(
        result=result,
        entries={entry["representation"]: entry for entry in result["representations"]},
        rows=ranked(result),
        dispatcher=None if mine is None else mine["path"],
        verdicts=verdicts(result),
        pictures={name: jinja2.utils.markupsafe.Markup(svg) for name, svg in pictures.items()},
        raw=json.dumps(result, indent=1),
    )
