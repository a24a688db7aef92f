"""The same calls from several Python threads at once."""

import threading

import torch


def assert_same_concurrently(path, work, want, times, same=torch.equal):
    """One thread for each of ``work`` calls ``path`` so many times, and always gets what is wanted."""
    failures = []

    def call(i):
        for _ in range(times):
            if not same(path(*work[i]), want[i]):
                failures.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
