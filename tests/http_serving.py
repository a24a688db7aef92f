"""A server of one path on a free port, in a thread, for the tests of HTTP."""

import contextlib
import http.client
import json
import socket
import threading
import time

import torch
from dispatch_fakes import fake_profile

from mprec.dispatch import Dispatcher, ScoringPath
from mprec.serving import Engine, LocalExecutor
from mprec.serving.build import ModelInputs
from mprec.serving.http import Limits, Service, listen, serve

INPUTS = ModelInputs([10, 1000], ["colour", "item"], 1)
GOOD = {"dense": [[0.5]], "ids": [[1, 2]]}


def score(batch):
    """Sum of the dense number and of all IDs of a sample."""
    size = len(batch)
    lengths = batch.offsets.diff().view(-1, size)
    owner = torch.arange(size).repeat(len(lengths)).repeat_interleave(lengths.flatten())
    return batch.dense[:, 0] + torch.zeros(size).index_add(0, owner, batch.indices.float())


def dispatcher(model=score, name="p"):
    path = ScoringPath(name, "table", 0.5, model, f"shape of {name}")
    return Dispatcher([path], fake_profile({name: (1e-5, 1e-8)}))


def executors(model=score, name="p"):
    found = dispatcher(model, name)
    return [LocalExecutor("cpu", found.paths, found.profile)]


class Server:
    def __init__(self, service, address, stop):
        self.service, self.address, self.stop = service, address, stop

    @property
    def engine(self):
        return self.service.engine

    def connect(self, timeout=20):
        return http.client.HTTPConnection(*self.address, timeout=timeout)

    def raw(self, sent=b"", timeout=20):
        connection = socket.create_connection(self.address, timeout=timeout)
        connection.sendall(sent)
        return connection

    def exchange(self, sent, timeout=20):
        """All that comes back for these bytes until the server closes."""
        with self.raw(sent, timeout) as connection:
            return read_all(connection)

    def ask(self, body=None, path="/score", method=None, headers=None, connection=None):
        """(status, content)."""
        method = method or ("GET" if body is None else "POST")
        own = connection or self.connect()
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        own.request(method, path, data, headers or {})
        response = own.getresponse()
        content = response.read()
        if connection is None:
            own.close()
        return response.status, json.loads(content)


@contextlib.contextmanager
def serving(model=score, *, limits=None, reload=None, reload_token=None, has_engine=True, **options):
    service = Service(INPUTS, Limits(**(limits or {})), reload=reload, reload_token=reload_token)
    engine = Engine(dispatcher(model), **{"sla_s": 60.0, **options}).start()
    if has_engine:
        service.take(engine)
    listener = listen("127.0.0.1", 0)
    address = listener.getsockname()
    stops, started = [], threading.Event()

    def on_start(stop):
        stops.append(stop)
        started.set()

    thread = threading.Thread(target=serve, args=(service, listener), kwargs={"on_start": on_start})
    thread.start()
    try:
        assert started.wait(20)
        yield Server(service, address, stops[0])
    finally:
        if not service.is_draining:
            stops[0]()
        thread.join(30)
        engine.close()
        assert not thread.is_alive()


def read_all(connection):
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.005)
