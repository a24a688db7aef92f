"""The programs in examples/, run as their hosts would run them."""

import asyncio
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from small_checkpoints import expected

EXAMPLES = Path(__file__).parent.parent / "examples"
TRITON = EXAMPLES / "triton_repository" / "mprec_dlrm"
IDS = [[[3], [6]], [[49], [0]], [[0], [1]]]
DENSE = [[0.5, -1.0], [0.0, 2.0], [0.25, 0.125]]


pytestmark = pytest.mark.usefixtures("own_cache")


def load(file, name):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- NVIDIA Triton Inference Server


class Tensor:
    def __init__(self, name, array):
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class TritonError:
    def __init__(self, message):
        self._message = message

    def message(self):
        return self._message


class InferenceResponse:
    def __init__(self, output_tensors, error=None):
        self._tensors, self._error = output_tensors, error

    def output_tensors(self):
        return self._tensors

    def has_error(self):
        return self._error is not None

    def error(self):
        return self._error


class InferenceRequest:
    def __init__(self, **inputs):
        self._inputs = [Tensor(name, array) for name, array in inputs.items()]

    def inputs(self):
        return self._inputs


def get_input_tensor_by_name(request, name):
    return next((tensor for tensor in request.inputs() if tensor.name() == name), None)


@pytest.fixture
def triton(monkeypatch, files):
    """The model as the server would have it: loaded, not yet initialized, with its ``args``."""
    backend = types.ModuleType("triton_python_backend_utils")
    for item in (Tensor, TritonError, InferenceResponse, InferenceRequest, get_input_tensor_by_name):
        setattr(backend, item.__name__, item)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    module = load(TRITON / "1" / "model.py", "triton_model")
    parameters = {
        "checkpoints": {"string_value": " ".join(file.name for file in files)},
        "sla_ms": {"string_value": "60000"},
    }
    folder = files[0].parent
    args = {
        "model_config": json.dumps({"name": "mprec_dlrm", "parameters": parameters}),
        "model_repository": str(folder.parent),
        "model_version": folder.name,
        "model_name": "mprec_dlrm",
    }
    original = module.engine_from_checkpoints
    monkeypatch.setattr(
        module, "engine_from_checkpoints", lambda *a, **o: original(*a, profile_seconds=0.05, **o)
    )
    return module, args


def request(ids=IDS, dense=DENSE):
    longest = max(len(bag) for row in ids for bag in row)
    padded = [[bag + [-1] * (longest - len(bag)) for bag in row] for row in ids]
    return InferenceRequest(IDS=np.array(padded, np.int64), DENSE=np.array(dense, np.float32))


def test_triton_scores_requests_together(triton, files):
    module, args = triton
    bags = [[[3, 7, 3], []], [[49], [0, 6]]]
    model = module.TritonPythonModel()
    model.initialize(args)
    responses = model.execute([request(), request(bags, DENSE[:2]), request(IDS[:1], DENSE[:1])])
    model.finalize()
    wanted = [(IDS, DENSE), (bags, DENSE[:2]), (IDS[:1], DENSE[:1])]
    for response, (ids, dense) in zip(responses, wanted, strict=True):
        assert not response.has_error()
        (scores,) = response.output_tensors()
        assert scores.name() == "SCORES"
        assert scores.as_numpy().dtype == np.float32
        np.testing.assert_allclose(scores.as_numpy(), expected(files[1], ids, dense), rtol=1e-4)


def test_triton_tells_each_bad_request_alone(triton, files):
    module, args = triton
    model = module.TritonPythonModel()
    model.initialize(args)
    bad = {
        r"IDS\[1, 0\]: expected IDs in \[0, 50\), got 50": request([[[1], [2]], [[50], [2]]], DENSE[:2]),
        r"IDS\[0, 1\]: expected IDs in \[0, 7\), got -2": request([[[1], [-2]]], DENSE[:1]),
        r"IDS: expected \[samples, 2, longest bag\], got \[1, 1, 1\]": request([[[1]]], DENSE[:1]),
        r"DENSE: expected \[3, 2\], got \[2, 2\]": request(IDS, DENSE[:2]),
        r"DENSE: expected \[1, 2\], got \[1, 0\]": InferenceRequest(IDS=np.ones((1, 2, 1), np.int64)),
        r"at least one sample": InferenceRequest(
            IDS=np.ones((0, 2, 1), np.int64), DENSE=np.ones((0, 2), np.float32)
        ),
    }
    responses = model.execute([*bad.values(), request()])
    for message, response in zip(bad, responses, strict=False):
        assert response.output_tensors() == []
        assert re.search(message, response.error().message())
    (scores,) = responses[-1].output_tensors()
    np.testing.assert_allclose(scores.as_numpy(), expected(files[1], IDS, DENSE), rtol=1e-4)
    model.finalize()
    (after,) = model.execute([request()])
    assert "closed" in after.error().message()


def test_triton_refuses_damaged_checkpoints(triton, files, tmp_path):
    module, args = triton
    (tmp_path / "1").mkdir()
    for file in files:
        (tmp_path / "1" / file.name).write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        module.TritonPythonModel().initialize(
            {**args, "model_repository": str(tmp_path), "model_version": "1"}
        )


def test_triton_config_and_model_name_the_same():
    config, model = (TRITON / "config.pbtxt").read_text(), (TRITON / "1" / "model.py").read_text()
    names = re.findall(r'\bname: "(\w+)"', config)
    assert names == [TRITON.name, "IDS", "DENSE", "SCORES"]
    assert set(re.findall(r'"([A-Z]+)"', model)) == {"IDS", "DENSE", "SCORES"}
    assert set(re.findall(r'key: "(\w+)"', config)) == set(re.findall(r'parameters\["(\w+)"\]', model))
    assert config.count("{") == config.count("}")


# -- FastAPI


def test_fastapi(monkeypatch, files):
    pytest.importorskip("fastapi", reason="fastapi is not installed")
    httpx = pytest.importorskip("httpx", reason="httpx is not installed")
    monkeypatch.setenv("MPREC_CHECKPOINTS", " ".join(map(str, files)))
    monkeypatch.setenv("MPREC_SLA_MS", "60000")
    module = load(EXAMPLES / "fastapi_app.py", "fastapi_app")
    app = module.app

    async def talk():
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://app") as client,
        ):
            query = {"ids": IDS, "dense": DENSE}
            good = await asyncio.gather(*(client.post("/score", json=query) for _ in range(5)))
            bad = [
                await client.post("/score", content=body)
                for body in (b"{", b"[]", b"{}", json.dumps({"ids": [[[50], [0]]], "dense": [[0, 0]]}))
            ]
            app.state.engine.close()
            return good, bad, await client.post("/score", json=query)

    good, bad, closed = asyncio.run(talk())
    for reply in good:
        assert reply.status_code == 200
        np.testing.assert_allclose(reply.json()["scores"], expected(files[1], IDS, DENSE), rtol=1e-4)
        assert reply.json()["paths"] == {"hybrid": 3}
    assert [reply.status_code for reply in bad] == [400] * 4
    assert closed.status_code == 503
    assert closed.json()["detail"]["reason"] == "closed"


# -- Ray Serve


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def post(url, body):
    """The status and the text of an answer: Ray's own, as before the first route is known, are no JSON."""
    try:
        with urllib.request.urlopen(url, body, timeout=60) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ray_serve(files, tmp_path):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed: pip install 'mprec[ray]'")
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    options = ["--sla-ms", "60000", "--replicas", "2", "--port", str(port)]
    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen(
        [sys.executable, EXAMPLES / "ray_serve.py", "--checkpoints", *files, *options],
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        good = json.dumps({"ids": IDS, "dense": DENSE}).encode()
        end = time.monotonic() + 240
        while True:
            try:
                status, answer = post(url, good)
                if status == 200:
                    break
            except OSError:
                pass  # not up yet
            assert server.poll() is None, Path(log.name).read_text()[-3000:]
            assert time.monotonic() < end, Path(log.name).read_text()[-3000:]
            time.sleep(0.5)
        for _ in range(5):
            scores = json.loads(answer)["scores"]
            np.testing.assert_allclose(scores, expected(files[1], IDS, DENSE), rtol=1e-4)
            status, answer = post(url, good)
        for body in (b"{", b"[]", json.dumps({"ids": [[[50], [0]]], "dense": [[0, 0]]}).encode()):
            status, answer = post(url, body)
            assert status == 400
            assert json.loads(answer)["error"]
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        log.close()
