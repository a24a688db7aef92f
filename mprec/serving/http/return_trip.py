"""How long answers take from the engine to the network."""

from __future__ import annotations

import math

__all__ = ["ReturnTrip"]

_GAIN, _SPREAD_GAIN = 1 / 8, 1 / 4
_SPREADS = 3.0
_FORGOTTEN_S = 1.0
_LATE_SHARE = 0.01  # of the answers, that may be late
_STEP_S = 4e-4


class ReturnTrip:
    """An upper estimate: the running mean plus three times the running mean deviation (as TCP has it for its
    retransmissions; Jacobson, "Congestion avoidance and control", 1988), and as much more as makes one answer
    in a hundred late (the quantile by stochastic approximation; Robbins and Monro, 1951): a server whose
    queue is always as long as the target allows would else be late with every one that takes longer than
    expected, in the engine too. What was seen once fades within seconds, for a server that refuses all
    because of it would see nothing new.
    """

    def __init__(self) -> None:
        self._mean = self._spread = self._more = 0.0
        self._seen = -math.inf

    def observe(self, now: float, seconds: float, late: bool = False) -> None:
        error = seconds - self._mean
        self._mean += _GAIN * error
        self._spread += _SPREAD_GAIN * (abs(error) - self._spread)
        self._more = max(self._more + _STEP_S * (late - _LATE_SHARE), 0.0)
        self._seen = now

    def expected_s(self, now: float) -> float:
        """Seconds, as of ``now`` on the clock of ``observe``."""
        expected = self._mean + _SPREADS * self._spread + self._more
        return expected * math.exp(-max(now - self._seen, 0.0) / _FORGOTTEN_S)
