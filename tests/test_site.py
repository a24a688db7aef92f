"""What the documentation's site is made of: the support matrix, the list of the API, links, figures."""

import csv
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site():
    """The site's modules by name."""
    sys.path.insert(0, str(ROOT / "docs" / "_site"))
    try:
        yield importlib.import_module
    finally:
        sys.path.pop(0)


def test_the_matrix_knows_what_is_known(site):
    support = site("support")

    def cell(what, device, dtype):
        operator, arguments = support.CALLS[what]
        return support.served(operator, device, arguments(dtype))

    for device in support.DEVICES:
        assert cell("bags of many tables", device, torch.float16) == "kernel"
        assert cell("bags of many tables", device, torch.float64) == "torch"
        assert cell("gradient of a table, maximum", device, torch.float32) == "torch"
        assert cell("update of tables by SGD", device, torch.float32) == "kernel"
        assert cell("update of tables by SGD", device, torch.float64) == ""
        operator, arguments = support.rows_call("int4")
        assert support.served(operator, device, arguments) == "kernel"
    assert cell("dot interaction", "cpu", torch.float32) == "kernel"
    assert cell("dot interaction", "cuda", torch.float32) == "torch"
    operator, arguments = support.decoder_call("lut", "sign")
    assert [support.served(operator, device, arguments) for device in support.DEVICES] == ["kernel", ""]


def test_the_matrix_has_every_operator(site):
    support = site("support")  # which registers the operators
    shown = {operator for operator, _ in support.CALLS.values()}
    matrix = support.matrix()
    named = {
        name.removeprefix("mprec::") for name in torch._C._dispatch_get_all_op_names() if "mprec::" in name
    }
    assert shown <= named
    # Of many, as of one; parts of modules and of gradients; what reports bad IDs of a GPU.
    others = {"dhe_bag_multi_backward", "embedding_bag_multi_backward"}
    others |= {"cached_dhe_bag", "embedding_bag_maximal_ids", "report_faults"}
    assert {name for name in named if f"`{name}`" not in matrix} <= others


def test_every_public_module_has_a_page(site):
    reference = site("reference")
    modules = reference.modules()
    assert {"mprec.nn", "mprec.ops", "mprec.serving"} <= set(modules)
    for module in modules:
        for name in reference.names(module):
            assert f"::: {reference.path(module, name)}\n" in reference.page(module)
    assert reference.path("mprec.derive", "derive") == "mprec.derive.derive.derive"


@pytest.mark.parametrize(
    ("page", "link", "path", "uri"),
    [
        ("scheduling.md", "../csrc/scheduler/price.h", "csrc/scheduler/price.h", None),
        ("index.md", "docs/own_log.md", "docs/own_log.md", "own_log.md"),
        ("adding/format.md", "../../README.md", "README.md", "index.md"),
        ("limits.md", "../benchmarks/results/compare.csv", "benchmarks/results/compare.csv", None),
    ],
)
def test_links_lead_to_files_of_the_repository(site, page, link, path, uri):
    repository = site("repository")
    assert repository.resolve(page, link) == path
    assert (ROOT / path).is_file()
    assert repository.path_of(repository.uri_of(path)) == path
    assert uri is None or repository.uri_of(path) == uri
    assert repository.targets(page, f"see [`x`]({link}#l)\n```py\n[y](nothing)\n```\n") == [path]


def test_figures_are_those_of_the_last_whole_run(site):
    figures = site("figures")
    slower = figures.tables(figures.MARKERS["<!-- figures: peers faster -->"])
    every = figures.tables(figures.MARKERS["<!-- figures: compared -->"])
    assert set(slower.splitlines()) < set(every.splitlines())
    rows = [line for line in every.splitlines() if line.startswith("| ") and "mprec, µs" not in line]
    assert len(rows) == len(set(rows)) == sum(map(len, figures.compared().values())) > 100


def test_tables_of_quality_are_means_of_the_rows(site):
    figures = site("figures")
    shown = figures.on_page_markdown("<!-- figures: quality ml-1m -->", None, None, None)
    with (ROOT / "benchmarks" / "results" / "derived.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["data"] == "ml-1m"]
    forms = {(row["training"], row["path"]) for row in rows}
    lines = shown.splitlines()[2:]
    assert len(lines) == len(forms)
    aucs = [float(r["auc"]) for r in rows if (r["training"], r["path"]) == ("mapped", "table[int4]")]
    (line,) = (line for line in lines if "`table[int4]`" in line)
    mean, *deviation = line.split("|")[4].split("±")
    assert float(mean) == pytest.approx(np.mean(aucs), abs=6e-5)
    assert len(deviation) == (len(aucs) > 1)
    if deviation:
        assert float(deviation[0]) == pytest.approx(np.std(aucs, ddof=1), abs=6e-5)
    assert line.split("|")[-2].strip() == str(len(aucs))
    assert "| dhe, published | 0.784 ± 0.002 |" in figures.on_page_markdown(
        "<!-- figures: quality cce -->", None, None, None
    )
