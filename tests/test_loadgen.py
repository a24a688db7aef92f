import time

import pytest
import torch
from dispatch_fakes import fake_profile

from mprec.bags import Bags
from mprec.data import Batch
from mprec.dispatch import Dispatcher, ScoringPath
from mprec.serving import Engine
from mprec.serving.loadgen import run_loadgen

pytest.importorskip("mlperf_loadgen", reason="mlcommons-loadgen is not installed")


def query(size):
    return Batch(torch.zeros(size, 0), Bags(torch.arange(size), torch.arange(size + 1)), torch.zeros(size))


def test_loadgen_drives_an_engine_and_judges():
    path = ScoringPath("p", "table", 0.5, lambda b: b.indices.float(), "shape of p")
    dispatcher = Dispatcher([path], fake_profile({"p": (1e-5, 1e-8)}))
    with Engine(dispatcher, sla_s=5.0, admission=False) as engine:
        result = run_loadgen(engine, [query(4), query(9)], qps=200.0, seconds=0.5, min_queries=50)
        assert result.valid == (result.summary["Result is"] == "VALID")
        assert float(result.summary["99.00 percentile latency (ns)"]) > 0
        assert (result.refused, result.failed) == (0, 0)
        assert result.summary["Scenario"] == "Server"
        assert engine.statistics()["answered"] >= 50
        assert float(result.summary["target_qps"]) == 200.0
        with pytest.raises(ValueError, match="qps"):
            run_loadgen(engine, [query(1)], qps=0.0)


def test_refused_queries_make_a_run_invalid_and_the_reason_is_told():
    """LoadGen takes a refusal for an answer given at once: by itself it would call this run valid."""
    path = ScoringPath("p", "table", 0.5, lambda b: b.indices.float(), "shape of p")
    dispatcher = Dispatcher([path], fake_profile({"p": (1e-5, 1e-8)}))
    with Engine(dispatcher, sla_s=5.0) as engine:
        engine.close()
        result = run_loadgen(engine, [query(4)], qps=200.0, seconds=0.5, min_queries=50)
    assert not result.valid
    assert result.refused == result.queries >= 50
    assert f"{result.refused} of {result.queries} queries refused" in result.reason


def test_loadgens_own_reason_is_told():
    """An answer that takes four times the target: LoadGen names the condition that was not met."""

    def slow(batch):
        time.sleep(0.02)
        return batch.indices.float()

    path = ScoringPath("p", "table", 0.5, slow, "shape of p")
    dispatcher = Dispatcher([path], fake_profile({"p": (2e-2, 1e-8)}))
    with Engine(dispatcher, sla_s=0.005, admission=False) as engine:
        result = run_loadgen(engine, [query(4)], qps=20.0, seconds=0.5, min_queries=5)
    assert not result.valid
    assert result.reason.startswith("LoadGen: ")
    assert "Performance constraints satisfied" in result.reason
