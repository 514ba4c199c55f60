"""Adapt networks of other libraries, and their files, for `make_objective`.

    adapted = adapt(model, x)  # a model of spikingjelly, snntorch, norse or plain torch
    objective = make_objective(adapted.model, loss, (x, y), reset=adapted.reset)

The names in `__all__` are imported on first use, so that `ikun.adapters.choices` loads without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ikun.adapters.adapt_network import Adapted, Found, adapt
    from ikun.adapters.base import AdapterError
    from ikun.adapters.state_dict import load_weights, read_weights, state_dict_of

__all__ = ["Adapted", "AdapterError", "Found", "adapt", "load_weights", "read_weights", "state_dict_of"]

_MODULES = {
    "adapt_network": ("Adapted", "Found", "adapt"),
    "base": ("AdapterError",),
    "state_dict": ("load_weights", "read_weights", "state_dict_of"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
