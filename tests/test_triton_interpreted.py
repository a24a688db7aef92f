"""Runs tests/triton by Triton's CPU interpreter where no GPU can run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "triton"


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/triton runs on the GPU itself")
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_by_interpreter(file, request):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)]
    if marks := request.config.getoption("markexpr"):
        command += ["-m", marks]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    print(done.stdout[-8000:], done.stderr[-4000:])
    assert done.returncode in (0, 5), f"{file} failed under the interpreter"  # 5: all deselected
