"""Files import each other without a circle, and importing the package changes nothing for the process."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"mprec": ROOT / "mprec", "mprec.triton_kernels": ROOT / "triton_kernels"}


def modules() -> dict[str, Path]:
    """Every file by its name as a module."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = file
    return found


def imports(tree: ast.AST, known: set[str]) -> set[str]:
    """Modules of the package that a file imports anywhere, in functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                member = f"{node.module}.{alias.name}"
                names.add(member if member in known else node.module)
    return names & known


def order(graph: dict[str, set[str]]) -> list[str]:
    """Modules, each after those it imports. ``graphlib.CycleError`` names a circle, if there is one."""
    return list(graphlib.TopologicalSorter(graph).static_order())


def test_no_import_circle():
    files = modules()
    graph = {
        name: imports(ast.parse(file.read_text(encoding="utf-8")), set(files)) for name, file in files.items()
    }
    assert "mprec.ops" in graph["mprec.nn.collection"]
    assert len(order(graph)) == len(files) > 150


def test_a_circle_is_found():
    source = {"mprec.a": "def f():\n from mprec.b import g", "mprec.b": "import mprec.a"}
    graph = {name: imports(ast.parse(text), set(source)) for name, text in source.items()}
    with pytest.raises(graphlib.CycleError):
        order(graph)


def test_native_functions_are_called_from_ops_alone():
    """Others import classes and lists by name, which says at the top of a module what it stands on."""
    called = re.compile(r"(?<!torch\.)\b_C\.\w+\(")
    callers = {name for name, file in modules().items() if called.search(file.read_text(encoding="utf-8"))}
    assert {name.rpartition(".")[0] for name in callers} == {"mprec.ops"}


HOOKS = """
import torch
from torch.optim.optimizer import _global_optimizer_post_hooks as hooks
import mprec.nn
assert not hooks
bag = mprec.nn.DeepHashEmbeddingBag(8, mprec.nn.DheConfig(k=32, hidden=(16,)))
ids, offsets = torch.arange(4), torch.arange(4)
for _ in range(2):
    with torch.no_grad():
        before = bag(ids, offsets)
    assert len(hooks) == 1, hooks
# What the hook is for: torch's fused optimizers change weights without counting it.
optimizer = torch.optim.Adam(bag.parameters(), lr=0.1, fused=True)
bag(ids, offsets).sum().backward()
optimizer.step()
with torch.no_grad():
    assert not torch.equal(bag(ids, offsets), before)
"""


def test_the_first_packed_decoder_installs_the_optimizer_hook():
    done = subprocess.run([sys.executable, "-c", HOOKS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
