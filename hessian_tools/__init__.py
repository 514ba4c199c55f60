"""Curvature of any torch model: Lanczos, power iteration, densities, traces, flatness, and their figures.

The names in `__all__` are the public API; `__init__.pyi` says where each is defined. They are imported on first use.
"""

from typing import Any

import lazy_loader

_import, _, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("ikun-hessian")
        except PackageNotFoundError:  # run from a source checkout that is not installed
            return "unknown"
    return _import(name)


def __dir__() -> list[str]:
    return __all__
