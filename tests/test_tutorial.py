"""docs/tutorial.md, run as printed: its Python in one program, then its commands one after another; and the
Python of docs/new_ids.md."""

import json
import re
import shlex
import signal
from pathlib import Path

import pytest
from test_cli_serving import ask, serve_process, wait_until_ready

from mprec import cli

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"
pytestmark = pytest.mark.usefixtures("one_thread", "own_cache")


def blocks():
    """(language, text) of each block, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", TUTORIAL.read_text(), flags=re.M | re.S)


def commands():
    """Each command of the page, as its shell would split it."""
    text = "".join(text for language, text in blocks() if language == "sh")
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]


def served(arguments, query):
    """The server's answer to the page's query."""
    with serve_process(*arguments, "--threads", 1, "--profile-seconds", 0.2) as (server, said):
        wait_until_ready(said["url"])
        answer = ask(f"{said['url']}/score", query)
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
        assert server.returncode == 0
    return answer


def test_the_page_of_new_ids_runs():
    page = TUTORIAL.with_name("new_ids.md").read_text()
    program = "".join(re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S))
    assert program.count("assert") == 2
    exec(compile(program, "docs/new_ids.md", "exec"), {})


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorial_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert {language for language, _ in blocks()} == {"python", "sh"}
    program = "".join(text for language, text in blocks() if language == "python")
    exec(compile(program, str(TUTORIAL), "exec"), {"__name__": "tutorial"})
    seen, serving = [], None
    for name, *arguments in commands():
        if name == "curl":
            url, option, body = arguments
            assert (url, option) == ("localhost:8000/score", "-d")
            query = json.loads(body)
            status, answer = served(serving, query)
            assert status == 200, answer
            assert len(answer["scores"]) == len(query["ids"]) == sum(answer["paths"].values())
            continue
        assert name == "mprec"
        seen.append(arguments[0])
        if arguments[0] == "serve":
            serving = arguments[1:]
        else:
            assert cli.main(arguments) == 0, arguments
    assert seen == ["train", "derive", "plan", "profile", "loadtest", "serve"]
    assert {file.name for file in tmp_path.iterdir()} >= {
        "model.pt",
        "hybrid.pt",
        "bundle",
        "small",
        "profile.json",
    }
