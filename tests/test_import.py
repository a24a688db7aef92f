"""``import mprec`` where it cannot work says why and what to do."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mprec.testing import runnable_isas


def import_mprec(
    before: str = "", path: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    """Runs ``before``, then imports mprec and prints its ISA, in a fresh interpreter."""
    code = f"{before}\nimport mprec\nfrom mprec import _native\nprint(_native._C.isa())"
    variables = {**os.environ, **environment}
    if path:
        variables["PYTHONPATH"] = str(path)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120)


def refusal(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1, done.stdout + done.stderr
    message = done.stderr.strip()
    assert "\nImportError: " in message, message
    return message.rpartition("\nImportError: ")[2]


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise ImportError({message!r})
sys.meta_path.insert(0, Block())
"""


@pytest.mark.parametrize("isa", runnable_isas())
def test_environment_chooses_the_isa(isa):
    done = import_mprec(MPREC_ISA=isa)
    assert done.stdout.strip() == isa, done.stderr


@pytest.mark.parametrize("isa", ["avx1024", "AVX2", "scalar "])
def test_unknown_isa(isa):
    message = refusal(import_mprec(MPREC_ISA=isa))
    assert "environment variable MPREC_ISA" in message
    assert f"'{isa}' is none of scalar, avx2, avx512" in message


def test_native_module_that_does_not_load():
    message = refusal(import_mprec(BLOCK.format(name="mprec._C", message="libgomp.so.1: not found")))
    assert "native module did not load" in message
    assert "libgomp.so.1: not found" in message
    assert "pip install" in message


def test_without_torch():
    message = refusal(import_mprec(BLOCK.format(name="torch", message="No module named 'torch'")))
    assert "torch >= 2.10" in message
    assert "pip install torch" in message


def test_torch_too_old(tmp_path):
    (tmp_path / "torch.py").write_text("__version__ = '2.4.1'\nclass Tensor: pass\n")
    message = refusal(import_mprec(path=tmp_path))
    assert "torch >= 2.10" in message
    assert "2.4.1" in message


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=120
    )


def test_the_package_alone_imports_no_torch():
    done = run("import sys, mprec; assert {'nn', 'ops', 'serving', '__version__'} <= set(dir(mprec))\n"
               "print('torch' in sys.modules)")  # fmt: skip
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(
    "use",
    [
        "mprec.nn.EmbeddingBag",
        "mprec.ops.embedding_bag",
        "mprec.serving.Engine",
        "mprec._C.isa()",
        "mprec.__version__",
    ],
)
def test_attributes_are_imported_on_first_use(use):
    done = run(f"import mprec; assert {use}")
    assert done.returncode == 0, done.stderr


def test_modules_that_use_operators_register_them():
    done = run("import mprec.ops, torch; torch.ops.mprec.embedding_bag.default")
    assert done.returncode == 0, done.stderr


def test_every_module_of_the_docstring_is_an_attribute():
    import mprec

    named = re.findall(r"^:mod:`mprec\.(\w+)`", mprec.__doc__, flags=re.M)
    assert len(named) > 10
    for name in named:
        assert getattr(mprec, name).__name__ == f"mprec.{name}"
        assert name in dir(mprec)


def test_unknown_attributes_are_attribute_errors():
    import mprec

    with pytest.raises(AttributeError, match="module 'mprec' has no attribute 'nothing'"):
        mprec.nothing  # noqa: B018


@pytest.mark.parametrize("statement", ["from mprec import nn", "import mprec; mprec.serving"])
def test_first_use_without_torch_says_what_is_needed(statement):
    message = refusal(run(BLOCK.format(name="torch", message="No module named 'torch'") + statement))
    assert "pip install torch" in message
