"""These tests run kernels: on a GPU if there is one, else on the CPU by Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is defined, so `tests/test_triton_interpreted.py` runs them in a
process of their own; without a GPU and without the variable, pytest passes them by.
"""

import os

import pytest
import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)
