"""Which neurons of which library become nodes of the traced graph."""

from __future__ import annotations

from torch import Tensor

from ikun.adapters import norse_nodes, sinabs_nodes, snntorch_nodes, spikingjelly_nodes
from ikun.adapters.base import Library
from ikun.adapters.neuron_nodes import Fit, use_nodes
from ikun.adapters.time_loop import InTime

FITS: dict[str, Fit] = {
    "spikingjelly": spikingjelly_nodes.fit,
    "snntorch": snntorch_nodes.fit,
    "norse": norse_nodes.fit,
    "sinabs": sinabs_nodes.fit,
}


def replace_neurons(name: str, library: Library, wrapped: InTime, few: Tensor) -> dict[str, str]:
    """Replace the neurons of a network by nodes where that changes nothing.

    Args:
        name: Name of the library.
        library: The library.
        wrapped: The network.
        few: A few inputs [N, ...].

    Returns:
        Why a neuron was not replaced, by its path; empty for neurons that were.
    """
    if name not in FITS:
        return {}
    return use_nodes(wrapped.network, library, FITS[name], lambda: wrapped.forward_once(few))
