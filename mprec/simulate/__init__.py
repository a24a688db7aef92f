"""Serving in virtual time: what an engine would do on devices that are described, under loads that are
drawn."""

from mprec.simulate.simulator import Result, SimulatedExecutor, SimulatedPath, simulate

__all__ = ["Result", "SimulatedExecutor", "SimulatedPath", "simulate"]
