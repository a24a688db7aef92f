"""Serving in virtual time: what an engine would do on devices that are described, under loads that are
drawn."""

from mprec.simulate.devices import Device, device_names, load_device
from mprec.simulate.roofline import curve, fits, latency_s, resident, to_profile
from mprec.simulate.shapes import ModelShape, kaggle, load_shape, terabyte
from mprec.simulate.simulator import Result, SimulatedExecutor, SimulatedPath, simulate

__all__ = [
    "Device",
    "ModelShape",
    "Result",
    "SimulatedExecutor",
    "SimulatedPath",
    "curve",
    "device_names",
    "fits",
    "kaggle",
    "latency_s",
    "load_device",
    "load_shape",
    "resident",
    "simulate",
    "terabyte",
    "to_profile",
]
