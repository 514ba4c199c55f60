"""Names that `adapt` accepts for a library, an output and a readout. This module does not import torch."""

LIBRARIES = ("spikingjelly", "snntorch", "norse", "sinabs", "none")  # none: plain torch
OUTPUTS = ("spikes", "membrane")
READOUTS = ("mean", "sum", "last", "max", "none")  # none: the loss gets the outputs over time
