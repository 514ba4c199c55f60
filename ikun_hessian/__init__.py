"""Curvature and flatness of spiking networks in one call, and the command line.

    import ikun_hessian as ih

    r = ih.analyze(model, (x, y), loss="ce", timesteps=4)

The names in `__all__` are the public API; `__init__.pyi` says where each is defined. They are imported on first use.
"""

import os
import sys
from typing import Any

import lazy_loader

from hessian_tools.runtime.allocator import keep_freed_memory
from hessian_tools.runtime.cores import available_cores

# Without this, MKL on some processors (AMD with AVX-512, for one) gives other bits for other alignments of its arrays,
# and a resumed analysis would not end with the same bits. MKL reads the variable once, so it is set before torch loads.
# OpenMP's threads wait without spinning, so that they do not take the cores from other processes. There are as many as
# cores that the process may use; torch does not know the quota of a container.
if "torch" not in sys.modules:
    os.environ.setdefault("MKL_CBWR", "AUTO")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))
    keep_freed_memory()

_import, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        import hessian_tools

        return hessian_tools.__version__
    return _import(name)


def __dir__() -> list[str]:
    return __all__
