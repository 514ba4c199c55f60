"""Networks of other libraries, and their files, made ready for `make_objective`.

adapted = adapt(model, x)                       # spikingjelly, snntorch, norse or plain torch
objective = make_objective(adapted.model, loss, (x, y), reset=adapted.reset)
"""

from ikun.adapters.adapt_network import Adapted, Found, adapt
from ikun.adapters.base import AdapterError
from ikun.adapters.state_dict import load_weights, read_weights, state_dict_of

__all__ = ["Adapted", "AdapterError", "Found", "adapt", "load_weights", "read_weights", "state_dict_of"]
