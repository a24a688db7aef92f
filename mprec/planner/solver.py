"""The integer program under a plan: one option and one device per feature, lexicographic in quality and time.

With x[f, o, d] = 1 where feature f takes option o on device d:

    maximise  sum quality[f, o] x[f, o, d]      then, at that quality,      minimise  T
    subject to  sum over o, d of x[f, o, d] = 1              for every feature
                sum over f, o of bytes[f, o] x[f, o, d] <= budget[d]   for every device
                sum over f, o of seconds[f, o, d] x[f, o, d] <= T      for every device (side by side)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack

__all__ = ["Infeasible", "solve"]

_SCALE = 1e4  # objectives are scaled to this range, so that HiGHS's absolute tolerances (1e-6) are tight


class Infeasible(ValueError):
    """Nothing fits the budgets. ``feature`` is the number of one of which no option fits even alone, if there
    is one.
    """

    def __init__(self, message: str, feature: int | None = None) -> None:
        super().__init__(message)
        self.feature = feature


def solve(
    quality: Sequence[Sequence[float]],
    nbytes: Sequence[Sequence[int]],
    seconds: Sequence[Sequence[Sequence[float]]],
    budgets: Sequence[int],
    *,
    objective: str = "quality",
    max_seconds: float = math.inf,
) -> list[tuple[int, int]]:
    """(option, device) of every feature: ``quality[f][o]``, ``nbytes[f][o]``, ``seconds[f][o][d]``, budgets
    in bytes.

    ``objective="quality"``: the highest sum of qualities, then the least time; ``"seconds"``: the least
    time, then the highest quality. ``max_seconds`` bounds the time of every device; an infinite time means
    that an option cannot run there. Budgets hold to the byte. ``Infeasible`` if nothing fits.
    """
    if objective not in ("quality", "seconds"):
        raise ValueError(f"objective: expected quality or seconds, got {objective!r}")
    if not quality or not budgets:
        raise ValueError("features, devices: expected at least one of each")
    cells = [
        (f, o, d)
        for f, options in enumerate(quality)
        for o in range(len(options))
        for d in range(len(budgets))
        if nbytes[f][o] <= budgets[d] and seconds[f][o][d] <= max_seconds and math.isfinite(seconds[f][o][d])
    ]
    program = _Program(cells, quality, nbytes, seconds, max_seconds)
    while True:
        chosen = program.run(budgets, objective)
        used = [sum(nbytes[f][o] for f, o, where in chosen if where == d) for d in range(len(budgets))]
        if all(u <= b for u, b in zip(used, budgets, strict=True)):
            return [(o, d) for _, o, d in chosen]
        program.forbid(chosen)  # the solver's tolerance let a few bytes too many through


class _Program:
    """The constraints that do not change between the two stages."""

    def __init__(self, cells, quality, nbytes, seconds, max_seconds) -> None:
        features = len(quality)
        if lacking := sorted(set(range(features)) - {f for f, _, _ in cells}):
            raise Infeasible(f"no option of feature {lacking[0]} fits any device", lacking[0])
        self.cells = cells
        self.quality = np.array([quality[f][o] for f, o, _ in cells], dtype=np.float64)
        if not np.isfinite(self.quality).all():
            raise ValueError("qualities: expected finite numbers, got NaN or infinity")
        seconds = np.array([seconds[f][o][d] for f, o, d in cells], dtype=np.float64)
        self.time_unit = max(seconds.max(initial=0.0), 1e-12)
        devices = np.array([d for _, _, d in cells])
        self.devices = 1 + int(devices.max())
        columns = np.arange(len(cells))
        one = csr_array((np.ones(len(cells)), ([f for f, _, _ in cells], columns)), (features, len(cells)))
        self.one = LinearConstraint(hstack([one, csr_array((features, 1))]), 1, 1)
        self.bytes = csr_array(([float(nbytes[f][o]) for f, o, _ in cells], (devices, columns)))
        self.seconds = csr_array((seconds / self.time_unit, (devices, columns)))
        self.max_time = max_seconds / self.time_unit
        spread = max(np.ptp(self.quality), 1e-300)
        self.cuts: list[LinearConstraint] = []
        self.scaled_quality = self.quality * min(_SCALE / spread, 1e12)

    def forbid(self, chosen) -> None:
        """Never again exactly this choice."""
        row = [float(cell in set(chosen)) for cell in self.cells]
        self.cuts.append(LinearConstraint(csr_array([[*row, 0.0]]), -np.inf, len(chosen) - 1))

    def run(self, budgets, objective) -> list[tuple[int, int, int]]:
        # The last variable is T, in units of the longest single time.
        n = len(self.cells)
        unit = np.array([max(b, 1) for b in budgets], dtype=np.float64)[: self.devices, None]
        memory = LinearConstraint(
            hstack([self.bytes / unit, csr_array((self.devices, 1))]),
            -np.inf,
            np.array([min(b, 1) if b > 0 else 0.0 for b in budgets])[: self.devices],
        )
        time = LinearConstraint(hstack([self.seconds, csr_array(-np.ones((self.devices, 1)))]), -np.inf, 0)
        constraints = [self.one, memory, time, *self.cuts]
        best_quality = np.append(-self.scaled_quality, 0.0)
        least_time = np.append(np.zeros(n), _SCALE)
        first, second = (best_quality, least_time) if objective == "quality" else (least_time, best_quality)
        x = self._milp(first, constraints)
        reached = float(first @ x)
        # Stage 2 keeps stage 1's value, up to the solver's tolerance.
        kept = LinearConstraint(
            csr_array(first[None, :]), -np.inf, reached + 1e-6 * max(1.0, abs(reached) * 1e-3)
        )
        x = self._milp(second, [*constraints, kept])
        return [self.cells[i] for i in np.flatnonzero(x[:n] > 0.5)]

    def _milp(self, objective, constraints) -> np.ndarray:
        n = len(self.cells)
        result = milp(
            objective,
            integrality=np.append(np.ones(n), 0),
            bounds=Bounds(np.zeros(n + 1), np.append(np.ones(n), self.max_time)),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            if result.status == 2:
                raise Infeasible("no choice of options fits the budgets")
            raise RuntimeError(f"the integer program was not solved: {result.message}")
        x = result.x.copy()
        x[:n] = np.rint(x[:n])
        x[n] = (self.seconds @ x[:n]).max()  # T of the rounded choice
        return x
