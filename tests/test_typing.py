"""What a type checker sees of the package from a user's script."""

import re
from pathlib import Path

import pytest

import mprec

SCRIPT = """
import torch

import mprec
import mprec.nn

bag = mprec.nn.EmbeddingBag(10, 4, mode="sum")
optimizer = mprec.optim.SGD(bag.parameters(), lr=0.1)
report = mprec.nn.swap(torch.nn.Sequential(bag))
names: list[str] = [entry.name for entry in report.replaced]
config: mprec.nn.DheConfig = mprec.nn.DheConfig(k=8)
"""
#: Lines that are wrong, and what is to be said of them.
PLANTED = {
    'mprec.optim.SGD(bag.parameters(), lr="x")': 'Argument "lr" to "SGD" has incompatible type "str"',
    "mprec.nn.DheConfig(k='many')": 'Argument "k" to "DheConfig" has incompatible type "str"',
    "wrong: int = report.replaced[0].name": 'Incompatible types in assignment .*"str".*"int"',
    "mprec.data.nothing": 'Module has no attribute "nothing"',
    "mprec.nn.EmbeddingBag(10)": 'Missing positional argument "embedding_dim"',
}


def test_the_stub_names_what_there_is():
    stub = (Path(mprec.__file__).parent / "__init__.pyi").read_text()
    named = re.findall(r"^from mprec(?:\.\w+)? import \w+ as (\w+)$", stub, flags=re.M)
    assert set(named) == {*mprec._MODULES, *mprec._FUNCTIONS, *mprec._NATIVE} - {"__version__"}
    assert "__version__: str" in stub


@pytest.mark.slow
def test_mypy_sees_types_and_finds_planted_errors(tmp_path, monkeypatch):
    api = pytest.importorskip("mypy.api")
    monkeypatch.setenv("MYPYPATH", str(Path(mprec.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)

    def check(script):
        (tmp_path / "script.py").write_text(script)
        options = ["--strict", "--follow-imports=silent", "--cache-dir", str(tmp_path / "cache")]
        return api.run([*options, "script.py"])

    said, failed, status = check(SCRIPT)
    assert status == 0, said + failed
    said, _, status = check(SCRIPT + "\n".join(PLANTED) + "\n")
    assert status == 1
    first = SCRIPT.count("\n") + 1
    for line, message in enumerate(PLANTED.values(), first):
        assert re.search(rf"^script\.py:{line}: error: .*{message}", said, flags=re.M), (message, said)
