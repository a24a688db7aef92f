"""Whether freed memory comes back without page faults."""

import resource
import subprocess
import sys

import pytest

from mprec import freed_memory

FAULTS = """
import resource, sys, torch
from mprec import freed_memory
if sys.argv[1] == "keep" and not freed_memory.keep():
    sys.exit(3)
def once():  # together they are more than glibc keeps: twice the largest block that was freed
    [torch.empty(1 << 20).fill_(1) for _ in range(8)]
for _ in range(10):
    once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    once()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("not glibc's allocator")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_kept_memory_is_touched_without_faults():
    pages = 20 * 8 * (4 << 20) // resource.getpagesize()
    assert _faults("keep") < pages // 100


@pytest.mark.parametrize("at_most", [-1, 1 << 31])
def test_bounds(at_most):
    with pytest.raises(ValueError, match="at_most: expected 0 to 2"):
        freed_memory.keep(at_most)
