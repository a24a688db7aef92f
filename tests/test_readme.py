"""What README shows runs."""

import argparse
import re
from pathlib import Path

import pytest

from mprec import cli

README = Path(__file__).parents[1] / "README.md"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), flags=re.M | re.S)


def test_python_examples_run():
    exec(compile("\n".join(_blocks("python")), str(README), "exec"), {})


def test_commands_are_understood():
    commands = re.findall(r"^mprec (.+)$", "\n".join(_blocks("sh")), flags=re.M)
    assert len(commands) >= 6
    for command in commands:
        assert isinstance(cli.parse(command.split()), argparse.Namespace)


def test_a_wrong_command_would_be_noticed(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["info", "--no-such-option"])
    assert "no-such-option" in capsys.readouterr().err
