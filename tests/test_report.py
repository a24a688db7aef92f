"""The page and the terminal table, from a made-up result."""

import copy
import io
import json
import re
from html.parser import HTMLParser

import pytest
from dispatch_fakes import fake_profile
from rich.console import Console

from mprec import report
from mprec.cli import report as report_command
from mprec.report import figures, latency, sweep
from mprec.report.load_tables import load_table, sweep_tables


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
        "training": {"representation": "table", "history": [0.6, 0.7, 0.75]},
        "representations": [
            {
                "representation": name,
                "auc": 0.78 + 0.001 * i,
                "log_loss": 0.5,
                "accuracy": 0.71,
                "parameters": 1000 * (i + 1),
                "embedding_bytes": 4096 * (i + 1),
                "latency_ms": dict(zip(batches, (0.1, 0.2, 3.0), strict=True)),
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


@pytest.mark.parametrize("width", [80, 100, 200])
def test_no_figure_of_a_load_is_cut(width):
    row = {"p50_ms": 2.46, "p99_ms": 109.71, "violations": 0.198, "accuracy": 0.6816, "max_qps": 21925.0}
    row |= {"correct_per_s": 1234567.0, "correct_per_s_error": 56789.0, "path": "dispatcher"}
    row |= {"chosen": {"hybrid": 0.6, "table": 0.4}}
    result = {
        "data": "criteo",
        "queries": 1012,
        "samples": 127955,
        "qps": 1031.0,
        "sla_ms": 10.0,
        "rows": [row],
    }
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(load_table(result))
    words = set(console.export_text().split())
    assert {
        "2.46",
        "109.71",
        "19.8",
        "0.6816",
        "1,234,567",
        "±56,789",
        "21925",
        "60",
        "40",
        "hybrid",
    } <= words
    swept = {"sla_ms": 10.0, "load": 0.9, "ratio": 0.951, "ratio_error": 0.063, "late": 0.125, "failed": 1}
    swept |= {"refused": {"overload": 2}, "queries": 10}
    told = {"arrivals": "poisson", "capacity_of": "table", "capacity_qps": 1031.0, "dispatcher": "dispatcher"}
    console.print(*sweep_tables({**told, "rows": [row | swept]}))
    words = set(console.export_text().split())
    assert {"0.9", "1,234,567", "±56,789", "0.951", "±0.063", "12.5", "30.0", "109.7", "dispatcher"} <= words


def test_the_dispatcher_stands_in_its_place_by_rank():
    result = _result()
    result["load"]["rows"][-1]["correct_per_s"] = 8950.0
    result["load"]["rows"][-1]["correct_per_s_error"] = 40.0
    console = Console(width=200, record=True)
    console.print(report.demo_table(result))
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    names = {"table", "dhe", "select", "hybrid", "dispatcher"}
    order = ["table", "dispatcher", "dhe", "select", "hybrid"]
    assert [words[0] for words in lines if words[0] in names] == order
    assert "±40" in next(words for words in lines if words[0] == "dispatcher")
    page = report.render(result)
    body = page[page.index("<tbody>") :]
    places = [body.index(f"<td>{name}</td>") for name in order]
    assert places == sorted(places)


def test_the_picture_of_shares_is_of_the_dispatchers_row():
    """Static rows have shares too: 100 % of their own path. The dispatcher's row may stand anywhere."""
    result = _result()
    for row in result["load"]["rows"][:-1]:
        row["chosen"] = {row["path"]: 1.0}
    for rows in (result["load"]["rows"], result["load"]["rows"][::-1]):
        result["load"]["rows"] = rows
        # SVG text is drawn as paths, each after a comment of what it says.
        picture = figures.chosen_shares(result)
        assert "<!-- hybrid 75% -->" in picture
        assert "<!-- table 25% -->" in picture
        assert "100%" not in picture.replace("<!-- 100% -->", "", 1)  # the axis has one


@pytest.mark.parametrize(
    ("correct", "error", "words"),
    [
        (8600.0, 0.01, "lost to table, the best static path: 0.956 ± 0.010 times"),
        (8950.0, 0.01, "was level with table"),
        (9900.0, 0.01, "beat table, the best static path: 1.100 ± 0.010 .*in the other rounds"),
        (
            9900.0,
            None,
            "1.100 times as many correct predictions per second as table.*error of that is unknown",
        ),
    ],
)
def test_the_page_says_how_the_dispatcher_fared(correct, error, words):
    result = _result()
    result["load"]["rows"][-1]["correct_per_s"] = correct
    result["load"]["ratio_error"] = error
    sentences = report.verdicts(result)
    assert re.search(words, sentences[0])
    assert len(sentences) == 1  # its p99 of 6 ms is within the SLA of 10
    assert sentences[0] in report.render(result)


def test_rounds_of_the_best_two_are_told():
    result = _result()
    result["load"] |= {"ratio": 1.2, "ratio_error": 0.01, "ratio_rounds": 24}
    assert "1.200 ± 0.010" in report.verdicts(result)[0]
    assert report.verdicts(result)[0].endswith("(in 24 further rounds of these two).")


def test_a_p99_above_the_sla_is_marked():
    result = _result()
    assert 'class="over" title' not in report.render(result)
    result["load"]["rows"][-1]["p99_ms"] = 12.345
    assert "p99 of 12.35 ms exceeds the SLA of 10 ms" in report.verdicts(result)[-1]
    page = report.render(result)
    assert page.count('class="over" title') == 1
    assert re.search(r'class="over" title="above the SLA">12.3[45]<', page)


def test_a_dispatcher_that_answered_nothing_has_a_page_too():
    result = _result()
    empty = {
        "p50_ms": None,
        "p95_ms": None,
        "p99_ms": None,
        "accuracy": None,
        "correct_per_s": 0.0,
        "chosen": {},
    }
    result["load"]["rows"][-1].update(empty)
    assert report.verdicts(result)[-1] == "The dispatcher answered no query."
    assert "answered no query" in report.render(result)
    Console(width=200, record=True).print(report.demo_table(result))


def test_the_sweeps_picture_has_what_the_rows_say(tmp_path, monkeypatch):
    """The drawn lines and bars are read back from the figure."""
    rows = [
        {
            "load": load,
            "sla_ms": 10.0,
            "path": path,
            "correct_per_s": 100.0 * load * (i + 1),
            "correct_per_s_error": None if load == 1 else 5.0,
            "violations": 0.1 * i,
            "chosen": {"table": 0.25, "table+cache": 0.75} if path == "dispatcher" else {path: 1.0},
        }
        for load in (1.0, 0.3)
        for i, path in enumerate(("table", "table+cache", "dispatcher"))
    ]
    kept = []
    monkeypatch.setattr(sweep.plt, "close", kept.append)
    sweep.draw({"rows": rows, "dispatcher": "dispatcher", "capacity_of": "table"}, tmp_path / "sweep.png")
    monkeypatch.undo()
    (figure,) = kept
    correct, missed, mix = figure.axes
    drawn = {box.get_label(): box.lines[0].get_xydata().tolist() for box in correct.containers}
    assert drawn["dispatcher"] == [[0.3, 90.0], [1.0, 300.0]]
    assert drawn["table"] == [[0.3, 30.0], [1.0, 100.0]]
    assert [line.get_ydata().tolist() for line in missed.lines] == [[0.0] * 2, [0.1] * 2, [0.2] * 2]
    assert [bar.get_height() for bar in mix.patches] == [0.25, 0.75] * 2
    assert mix.patches[0].get_facecolor() != mix.patches[1].get_facecolor()
    assert mix.get_xlabel() == "load, in capacities of table"
    sweep.plt.close(figure)


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
