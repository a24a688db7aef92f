"""The native module, all its names: loaded after torch, whose tensors it takes, or why it cannot be.

A module that wraps a native class or list imports that by name from here. What computes on tensors goes
through :mod:`mprec.ops`, which alone calls the module's functions as ``_C.name``.
"""

import os
import platform
import sys

try:
    import torch
except ImportError as error:  # pragma: no cover - exercised in a subprocess
    raise ImportError("mprec needs torch >= 2.10: pip install torch") from error

if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    raise ImportError(
        f"mprec needs torch >= 2.10 (it exchanges tensors by DLPack's C API), found {torch.__version__}"
    )

try:
    from mprec import _C as _C
    from mprec._C import *  # noqa: F403
    from mprec._C import use_isa, version
except ImportError as error:
    raise ImportError(
        "mprec's native module did not load:\n"
        f"  {error}\n"
        f"on Python {platform.python_version()}, {platform.machine()} {sys.platform}, "
        f"torch {torch.__version__}.\n"
        "Likely causes: the package was not built (pip install . needs g++ >= 11); it was "
        "built for another Python version; or Python was started inside the source folder with mprec not "
        "installed (pip install --no-build-isolation -e .)."
    ) from error

if wanted := os.environ.get("MPREC_ISA"):
    try:
        use_isa(wanted)
    except ValueError as error:
        raise ImportError(f"environment variable MPREC_ISA: {error}") from error

__version__: str = version
