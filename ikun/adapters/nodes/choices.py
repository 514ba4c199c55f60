"""Which neurons of which library become nodes of the traced graph."""

from __future__ import annotations

from torch import Tensor

from ikun.adapters.base import Library
from ikun.adapters.nodes import norse, sinabs, snntorch, spikingjelly
from ikun.adapters.nodes.replacement import Fit, use_nodes
from ikun.adapters.time.loop import InTime

FITS: dict[str, Fit] = {
    "spikingjelly": spikingjelly.spikingjelly_node,
    "snntorch": snntorch.snntorch_node,
    "norse": norse.norse_node,
    "sinabs": sinabs.sinabs_node,
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
