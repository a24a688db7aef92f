"""What an HTTP server serves: an engine that may come later, be replaced, and be closed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from mprec.serving.build import ModelInputs
from mprec.serving.engine import Engine
from mprec.serving.executors import Executor
from mprec.serving.http.metrics import Metrics
from mprec.serving.http.parse import Limits
from mprec.serving.http.pulse import Pulse

__all__ = ["ReloadError", "Service"]

PATIENCE_S = 5.0


class ReloadError(RuntimeError):
    """Other models could not be taken; those before go on serving. ``is_busy``: another reload runs."""

    def __init__(self, message: str, is_busy: bool = False) -> None:
        super().__init__(message)
        self.is_busy = is_busy


class Service:
    """``inputs``: what a sample consists of. ``reload()`` -> (executors, inputs) loads the models again, for
    as many executors as the engine has; without it there is no hot reload. ``reload_token``, if given, is
    what ``POST /reload`` must bear.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        limits: Limits | None = None,
        *,
        reload: Callable[[], tuple[Sequence[Executor], ModelInputs]] | None = None,
        reload_token: str | None = None,
    ) -> None:
        self.inputs, self.limits = inputs, limits or Limits()
        self.engine: Engine | None = None
        self.clock: Callable[[], float] = time.perf_counter
        self.reload_token = reload_token
        self.detail = "the models are being loaded and measured"
        self.is_draining = False
        self.connections: set = set()  # the server's
        self.pulse = Pulse(PATIENCE_S)
        self.metrics = Metrics(
            lambda: self.engine and self.engine.statistics(),
            lambda: self.status() == "ready",
            lambda: len(self.connections),
        )
        self._reload = reload
        self._reloading = threading.Lock()

    def take(self, engine: Engine) -> None:
        """Serve by this engine, which has been started, from now on. ``RuntimeError`` if there is one."""
        if self.engine is not None:
            raise RuntimeError("there is an engine already: use its replace()")
        self.clock, self.engine = engine.clock, engine

    def limit_connections(self, count: int) -> None:
        """At most ``count`` connections from now on."""
        self.limits = replace(self.limits, max_connections=count)

    def status(self) -> str:
        """``starting``, ``ready``, ``silent`` (queries come and none is answered) or ``draining``."""
        if self.is_draining:
            return "draining"
        if self.engine is None:
            return "starting"
        return "silent" if self.pulse.is_silent(self.clock()) else "ready"

    def statistics(self) -> dict:
        """What ``/stats`` says; JSON-able."""
        counts = {} if self.engine is None else self.engine.statistics()
        return {
            **counts,
            "status": self.status(),
            "sla_ms": None if self.engine is None else 1e3 * self.engine.sla_s,
            "latency_ms": self.metrics.recent(self.clock()),
            "connections": len(self.connections),
        }

    def reload(self) -> list[str]:
        """Load the models again and serve by them; names of the paths. Queries go on meanwhile.

        ``ReloadError`` says why not: they take other inputs, a file is bad, another reload runs.
        """
        if self._reload is None or self.engine is None:
            raise ReloadError("there is nothing to load again yet")
        if not self._reloading.acquire(blocking=False):
            raise ReloadError("another reload is under way", is_busy=True)
        try:
            executors, inputs = self._reload()
            try:
                _check_inputs(self.inputs, inputs)
                self.engine.replace(executors=executors)
            except BaseException:
                for executor in executors:
                    executor.close()
                raise
            self.inputs = inputs  # after: no query may have IDs that the models before do not know
        except (ValueError, OSError, RuntimeError, LookupError) as error:
            raise ReloadError(f"{type(error).__name__}: {error}") from error
        finally:
            self._reloading.release()
        return self.engine.paths


def _check_inputs(before: ModelInputs, after: ModelInputs) -> None:
    """Queries that wait were checked against ``before``: they must fit the models that come after."""
    if (before.names, before.num_dense) != (after.names, after.num_dense):
        raise ValueError("the models take other features or dense numbers than those that serve")
    for name, was, now in zip(before.names, before.vocabularies, after.vocabularies, strict=True):
        if now < was:
            raise ValueError(f"feature {name!r}: expected a vocabulary of at least {was}, as now, got {now}")
