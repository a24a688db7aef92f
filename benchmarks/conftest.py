"""``pytest benchmarks``: rows of equal work in one table, the peers side by side."""

import pytest

#: Parameters that say who does the work, rather than which.
PEERS = ("who", "peer")


@pytest.fixture(autouse=True)
def _by_work(request):
    if "benchmark" not in request.fixturenames:
        return
    benchmark = request.getfixturevalue("benchmark")
    spec = getattr(request.node, "callspec", None)
    work = {} if spec is None else {k: v for k, v in spec.params.items() if k not in PEERS}
    benchmark.group = ", ".join([request.path.stem, *(f"{k}={v}" for k, v in sorted(work.items()))])
