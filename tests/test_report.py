"""The page and the terminal table, from a made-up result."""

import copy
import json
from html.parser import HTMLParser

import pytest
from dispatch_fakes import fake_profile
from rich.console import Console

from mprec import report
from mprec.cli import report as report_command
from mprec.report import latency


def _result() -> dict:
    names = ("table", "dhe", "select", "hybrid")
    batches = ("1", "128", "2048")
    rows = [
        {
            "path": name,
            "p50_ms": 0.5,
            "p95_ms": 1.0,
            "p99_ms": 2.0 + i,
            "violations": 0.01 * i,
            "accuracy": 0.7,
            "correct_per_s": 9000.0 - 100 * i,
        }
        for i, name in enumerate((*names, "dispatcher"))
    ]
    rows[-1]["chosen"] = {"hybrid": 0.75, "table": 0.25}
    return {
        "environment": {
            "cpu": "A <CPU> & more",
            "isa": "avx2",
            "threads": {"torch": 2},
            "torch": "2.13.0",
            "mprec": "0.1.0",
        },
        "data": {
            "name": "synthetic",
            "rows": 1000,
            "features": [["user", 10]],
            "split": {"train": 800, "valid": 100, "test": 100},
        },
        "representations": [
            {
                "representation": name,
                "auc": 0.78 + 0.001 * i,
                "log_loss": 0.5,
                "accuracy": 0.71,
                "parameters": 1000 * (i + 1),
                "embedding_bytes": 4096 * (i + 1),
                "train_s": 1.0,
                "latency_ms": dict(zip(batches, (0.1, 0.2, 3.0), strict=True)),
                "history": [0.6, 0.7, 0.75],
            }
            for i, name in enumerate(names)
        ],
        "load": {"sla_ms": 10.0, "qps": 100.0, "queries": 500, "rows": rows},
        "plan": {
            "memory_bytes": 65536,
            "rows": [{"feature": "user", "vocabulary": 10, "choice": "table", "bytes": 640}],
        },
    }


class _Tags(HTMLParser):
    """Counts tags, and records whatever the page would fetch."""

    def __init__(self):
        super().__init__()
        self.count, self.fetched = {}, []

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.fetched += [
            value for name, value in attrs if name == "src" or (tag == "link" and name == "href")
        ]


def test_page_is_self_contained_and_escaped():
    page = report.render(_result())
    tags = _Tags()
    tags.feed(page)
    assert tags.fetched == []
    assert tags.count["svg"] == 5
    assert "A &lt;CPU&gt; &amp; more" in page
    assert "<CPU>" not in page


def test_equal_results_make_equal_pages():
    assert report.render(_result()) == report.render(copy.deepcopy(_result()))


def test_terminal_table_has_every_path():
    console = Console(width=200, record=True)
    console.print(report.demo_table(_result()))
    text = console.export_text()
    lines = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert {"table", "dhe", "select", "hybrid", "dispatcher"} <= lines.keys()
    assert "8,600" in lines["dispatcher"]
    assert "0.7800" in lines["table"]


def test_command_draws_a_saved_result_again(tmp_path, capsys):
    source, page = tmp_path / "result.json", tmp_path / "page.html"
    source.write_text(json.dumps(_result()))
    parser = report_command.argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    report_command.add_arguments(parser)
    assert report_command.run(parser.parse_args([str(source), "--output", str(page), "--json"])) == 0
    assert json.loads(capsys.readouterr().out) == {"page": str(page)}
    assert page.read_text() == report.render(_result())


@pytest.mark.parametrize("content", ["", "{}", '{"load": 3}', "\x00"])
def test_command_refuses_what_is_no_result(tmp_path, content):
    source = tmp_path / "result.json"
    source.write_text(content)
    parser = report_command.argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    report_command.add_arguments(parser)
    with pytest.raises((ValueError,), match=r"result\.json"):
        report_command.run(parser.parse_args([str(source)]))


def test_chart_of_a_latency_that_falls_with_the_batch():
    """As where a second thread sets in: the extremes are not the curve's ends."""
    profile = fake_profile({"dhe": (1e-4, 1e-6)}, batch_sizes=(1, 8, 64))
    cell = profile.cells["dhe"]["warm"]
    for quantile in ("p50", "p95", "p99"):
        cell[quantile] = [2e-4, 9e-4, 1e-4]
    lines = latency.text_chart(profile, width=40, height=9).splitlines()
    assert max(map(len, lines)) == 40
    assert lines[0].startswith("    0.9 ms")
    assert lines[8].startswith("    0.1 ms")
    assert "a" in lines[0]
    assert lines[8].endswith("a")
