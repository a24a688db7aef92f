import signal

import pytest


def pytest_configure() -> None:
    """Signals as a terminal gives them: what runs in the background, or under nohup, has some ignored,
    and so have the processes that tests start."""
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
        (signal.SIGTERM, signal.SIG_DFL),
    ):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Checkpoints of a small table model and a small hybrid."""
    from small_checkpoints import save

    folder = tmp_path_factory.mktemp("checkpoints")
    return [save(folder, "table"), save(folder, "hybrid")]


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """An empty cache directory for profiles. The caches of the CPU are not emptied: it takes too long."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("mprec.dispatch.profile.Evict", lambda: lambda: None)


@pytest.fixture
def one_thread():
    """torch's threads during a test."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
