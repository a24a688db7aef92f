"""The command line as a user meets it: in a process of its own."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mprec import _native, cli

_WITHOUT = """
import sys
import mprec.cli
try:
    status = mprec.cli.main(sys.argv[1:])
except SystemExit as exit_:
    status = exit_.code
slow = sorted({"torch", "numpy", "scipy", "rich", "mprec._C"} & set(sys.modules))
print(status, *slow, file=sys.stderr)
"""


def _mprec(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mprec", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_info_names_what_a_bug_report_needs():
    facts = json.loads(_mprec("info", "--json").stdout)
    assert facts["mprec"] == _native.__version__
    assert facts["isa"] in facts["isa_runnable"]
    assert facts["threads"]["torch"] >= 1
    assert {"torch", "cpu", "gpu", "compiler", "triton_kernels"} <= facts.keys()
    text = _mprec("info").stdout
    assert f"ISA in use  {facts['isa']}" in text


def test_isa_is_chosen_by_the_environment():
    assert json.loads(_mprec("info", "--json", MPREC_ISA="scalar").stdout)["isa"] == "scalar"


def test_an_unknown_isa_is_named():
    done = _mprec("info", MPREC_ISA="avx3")
    assert done.returncode != 0
    assert "MPREC_ISA" in done.stderr
    assert "'avx3' is none of scalar, avx2, avx512, avx512vnni, avx512bf16, amx" in done.stderr


def test_bad_input_is_one_line_and_status_2(tmp_path):
    done = _mprec("report", str(tmp_path / "absent.json"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "absent.json" in done.stderr


def test_an_interrupt_while_modules_are_imported_is_one_line_and_status_130(monkeypatch, capsys):
    """Torch takes seconds to import."""

    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("importlib.import_module", interrupted)
    assert cli.main(["train", "--data", "synthetic"]) == 130
    assert capsys.readouterr().err == "mprec: interrupted\n"


def test_every_subcommand_has_help(capsys):
    for name in cli.SUBCOMMANDS:
        with pytest.raises(SystemExit) as exit_:
            cli.main([name, "--help"])
        assert exit_.value.code == 0
        assert f"mprec {name}" in capsys.readouterr().out


def test_no_subcommand_is_an_error(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([])
    assert exit_.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], []])
def test_what_names_no_subcommand_imports_nothing_slow(arguments):
    done = subprocess.run([sys.executable, "-c", _WITHOUT, *arguments], capture_output=True, text=True)
    status = "0" if arguments else "2"
    assert done.stderr.splitlines()[-1] == status, done.stderr
    assert "COMMAND" in done.stdout + done.stderr


def test_help_lists_every_subcommand_with_its_line(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, line in cli.SUBCOMMANDS.items():
        assert f"{name} {line}" in shown


def test_every_module_of_a_subcommand_is_listed():
    folder = Path(cli.__file__).parent
    modules = {file.stem for file in folder.glob("*.py") if not file.stem.startswith("_")}
    assert modules == set(cli.SUBCOMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"mprec {_native.__version__}\n"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_training_tells_torchs_threads_not_to_hold_their_cores(environment, expected):
    program = (
        "import os, sys; from mprec import cli; cli.parse(sys.argv[1:]); "
        "print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    )
    own = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    arguments = ["train", "--data", "synthetic", "--representation", "table", "--output", "model.pt"]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=own | environment
    )
    assert done.stdout.split() == [expected, "True"], done.stderr


def test_once_torch_is_there_the_environment_is_left_alone(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    importlib.import_module("torch")
    cli.parse(["train", "--data", "synthetic", "--representation", "table", "--output", "model.pt"])
    assert "torch" in sys.modules
    assert "GOMP_SPINCOUNT" not in os.environ
