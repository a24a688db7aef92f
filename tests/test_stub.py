"""The stub of the native module names what the module has."""

import ast
from pathlib import Path

import mprec
from mprec._native import _C


def test_the_stub_names_what_there_is():
    tree = ast.parse((Path(mprec.__file__).parent / "_C.pyi").read_text(encoding="utf-8"))
    told: dict[str, set[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            told[node.name] = set()
        elif isinstance(node, ast.AnnAssign):
            told[node.target.id] = set()
        elif isinstance(node, ast.ClassDef):
            members = (
                getattr(m, "name", None) or m.target.id for m in node.body if not isinstance(m, ast.Expr)
            )
            told[node.name] = {name for name in members if not name.startswith("_")}
    there = {name for name in dir(_C) if not name.startswith("__")}
    assert set(told) == there
    for name in there:
        if isinstance(getattr(_C, name), type):
            assert told[name] == {m for m in vars(getattr(_C, name)) if not m.startswith("_")}, name
    assert (Path(mprec.__file__).parent / "py.typed").exists()
