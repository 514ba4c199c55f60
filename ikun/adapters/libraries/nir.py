"""Networks in the Neuromorphic Intermediate Representation, NIR (Pedersen et al. 2024).

A NIR file holds a graph of neurons as differential equations in continuous time. A Hessian also needs the time step dt
(of the forward Euler method), the first and second derivative of the spike, and the reset after a spike, which the
caller gives. A recurrent connection reads the spikes of the time step before; at the first step they are 0. Delays are
not supported.
"""

from __future__ import annotations

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ikun.adapters.base import AdapterError
from ikun.adapters.two_jet import Jet
from ikun.surrogate_check import Spike, first_line

RESETS = ("hard", "soft")
SPIKING = ("IF", "LIF", "CubaLIF")
MOST_BYTES = 2**26  # largest size of a file's arrays, plus a hundred times the size of the file
State = tuple[Tensor, ...]


def read_nir(
    path: str | Path, *, dt: float | None = None, spike: Spike | None = None, reset: str | None = None
) -> NirNetwork:
    """Read the network in a .nir file.

    Args:
        path: The file.
        dt: Time step, as in `from_nir`.
        spike: Spike function, as in `from_nir`.
        reset: "hard" or "soft", as in `from_nir`.

    Raises:
        AdapterError: If the file cannot be read, or its network cannot be built.
    """
    import nir

    if not Path(path).is_file():
        raise AdapterError(f"{path}: not a regular file" if Path(path).exists() else f"{path}: no such file")
    try:
        try_reading(path)
        graph = nir.read(path)
    except Exception as error:  # h5py and nir raise many types of errors for damaged files
        raise AdapterError(f"{path}: not a NIR file, or a damaged one ({first_line(error)})") from error
    try:
        network = from_nir(graph, dt=dt, spike=spike, reset=reset)
    except AdapterError as error:
        raise AdapterError("{}: {}", path, error) from None
    except Exception as error:  # for instance sizes that do not match, or edges between nodes that do not exist
        raise AdapterError(f"{path}: the network cannot be built from the graph ({first_line(error)})") from error
    if broken := [name for name, t in network.state_dict().items() if not bool(torch.isfinite(t).all())]:
        raise AdapterError(f"{path}: NaN or infinite values in {broken[0]}")
    return network


# A small HDF5 file can claim arrays of any size: parts that were not written read as zeros, and zeros compress well.
_READING = """
import sys, h5py, nir
path, most = sys.argv[1], int(sys.argv[2])
sizes = []
with h5py.File(path) as file:
    file.visititems(lambda _, item: sizes.append(item.nbytes) if isinstance(item, h5py.Dataset) else None)
if sum(sizes) > most:
    sys.exit(f"it claims {sum(sizes):,} bytes")
nir.read(path)
"""


def try_reading(path: str | Path, seconds: float = 60.0) -> None:
    """Try to read a .nir file in a separate process, because libhdf5 may never return from a damaged file.

    Raises:
        ValueError: If reading fails or takes longer than `seconds`.
    """
    most = MOST_BYTES + 100 * Path(path).stat().st_size
    command = [sys.executable, "-P", "-c", _READING, str(path), str(most)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise ValueError(f"reading it takes more than {seconds:g} s") from None
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or ["the process that read it was killed"])[-1])


def from_nir(
    graph: Any, *, dt: float | None = None, spike: Spike | None = None, reset: str | None = None
) -> NirNetwork:
    """Build the network of a nir.NIRGraph.

    Args:
        graph: The nir.NIRGraph.
        dt: Time step, in the unit of the graph's time constants (seconds).
        spike: A function x = v - threshold -> 0 or 1 that can be differentiated twice. Only its derivatives are used:
            the spikes are those of NIR, v > threshold. It is not needed for a graph without spiking neurons.
        reset: "hard" (v becomes v_reset) or "soft" (v decreases by the threshold). The derivative passes through the
            reset. It is not needed for a graph without spiking neurons.

    Raises:
        AdapterError: If a needed argument is missing or not valid, or the graph cannot be built.
    """
    spikes = any(kind_of(node) in SPIKING for node in graph.nodes.values())
    missing = [
        name
        for name, value in (("dt", dt), ("spike", spike), ("reset", reset))
        if value is None and (spikes or name == "dt")
    ]
    if missing:
        template = f"a NIR graph does not define {', '.join(missing)}: give {', '.join(f'{{{m}}}' for m in missing)}"
        raise AdapterError(template, **dict.fromkeys(missing, ...))
    if not dt or dt <= 0:
        raise AdapterError("{dt} is not positive", dt=dt)
    if spikes and reset not in RESETS:
        raise AdapterError(f"{{reset}} is not one of {', '.join(RESETS)}", reset=reset)
    return NirNetwork(graph, dt, None if spike is None else Jet(_above, spike), reset == "soft")


def _above(x: Tensor) -> Tensor:
    """Return the spikes of NIR: 1 where x > 0."""
    return (x > 0).to(x.dtype)


def kind_of(node: Any) -> str:
    """Return the name of a node's class."""
    return type(node).__name__


class NirNetwork(nn.Module):
    """A network that maps currents [T, N, ...] to outputs [T, N, K]. It keeps no state between calls.

    Its layers have the names of the graph's nodes.
    """

    def __init__(self, graph: Any, dt: float, spike: Jet | None, soft: bool) -> None:
        super().__init__()
        names = {name: self._free(name) for name in graph.nodes}
        before: dict[str, list[str]] = {name: [] for name in graph.nodes}
        for source, target in graph.edges:
            before[target].append(source)
        spiking = {n for n, node in graph.nodes.items() if kind_of(node) in SPIKING}
        order, late = _order(before, spiking)
        ends = {kind: [name for name in order if kind_of(graph.nodes[name]) == kind] for kind in ("Input", "Output")}
        for kind, found in ends.items():
            if len(found) != 1:
                raise AdapterError(f"the graph has {len(found)} {kind} nodes, but exactly one is needed")
        self._input, self._output = names[ends["Input"][0]], names[ends["Output"][0]]
        self._order = [names[name] for name in order]
        self._before = {names[name]: [names[source] for source in sources] for name, sources in before.items()}
        self._late = {(names[source], names[target]) for source, target in late}
        for name, node in graph.nodes.items():
            if kind_of(node) not in ends:
                self.add_module(names[name], _module(name, node, dt, spike, soft))

    def _free(self, name: str) -> str:
        """Return the name of a node as an attribute: without dots, and not the name of an attribute of nn.Module."""
        name = name.replace(".", "_")
        return name + "_" if hasattr(self, name) else name

    def forward(self, x: Tensor) -> Tensor:
        states: dict[str, State | None] = dict.fromkeys(self._order)
        outputs = []
        last = {source: self._rest(source, x[0]) for source, _ in self._late}
        for current in x:
            values = {self._input: current}
            for name in self._order:
                given = {source: (last if (source, name) in self._late else values) for source in self._before[name]}
                sources = [known[source] for source, known in given.items() if source in known]
                if not sources:
                    continue  # the input node, or a node without inputs
                value = torch.stack(sources).sum(0)
                layer = self._modules.get(name)
                if isinstance(layer, NirNeuron):
                    value, states[name] = layer(value, states[name])
                elif layer is not None:
                    value = layer(value)
                values[name] = value
            outputs.append(values[self._output])
            last = {source: values[source] for source in last}
        return torch.stack(outputs)

    def _rest(self, name: str, x: Tensor) -> Tensor:
        """Return the spikes [N, ...] of a layer before the first step."""
        return x.new_zeros(len(x), *self.get_submodule(name).get_buffer("threshold").shape)


def _order(before: dict[str, list[str]], spiking: set[str]) -> tuple[list[str], set[tuple[str, str]]]:
    """Return an order of the nodes, and the edges that take the value of the time step before.

    In every cycle this is the edge that leaves the spiking neurons with the longest way from the input.

    Raises:
        AdapterError: For a cycle without spiking neurons.
    """
    late: set[tuple[str, str]] = set()
    depth = _depth(before)
    while True:
        rest = {name: [s for s in sources if (s, name) not in late] for name, sources in before.items()}
        try:
            return list(TopologicalSorter(rest).static_order()), late
        except CycleError as error:
            cycle: list[str] = error.args[1]
            edges = [(a, b) for a, b in pairwise(cycle) if a in spiking]
            if not edges:
                raise AdapterError(f"a recurrent connection without spiking neurons: {' -> '.join(cycle)}") from None
            late.add(max(edges, key=lambda edge: depth.get(edge[0], 0)))


def _depth(before: dict[str, list[str]]) -> dict[str, int]:
    """Return the number of edges from the nodes without inputs to every node."""
    found = {name: 0 for name, sources in before.items() if not sources}
    edge = set(found)
    while edge:
        edge = {n for n, sources in before.items() if n not in found and edge & set(sources)}
        found |= {n: 1 + max(found[s] for s in before[n] if s in found) for n in edge}
    return found


class NirNeuron(nn.Module):
    """An IF, LIF, CubaLIF or LI neuron that advances by one step of the forward Euler method per call.

    CubaLIF has the synaptic current i += (dt / tau_syn) (w_in x - i), and the other neurons have i = x. Then
    v += (dt / tau) (v_leak - v + R i), or v += dt R i for IF. A spike occurs where v > threshold. LI does not spike,
    and its output is v.
    """

    def __init__(self, node: Any, dt: float, spike: Jet | None, soft: bool) -> None:
        super().__init__()
        self.kind, self.spike, self.soft = kind_of(node), spike, soft
        tau = getattr(node, "tau_mem", getattr(node, "tau", None))
        constants = {
            "r": node.r,
            "gain": dt if tau is None else dt / tau,
            "leak": 0.0 if tau is None else 1.0,
            "v_leak": getattr(node, "v_leak", 0.0),
            "threshold": getattr(node, "v_threshold", 0.0),
            "v_reset": getattr(node, "v_reset", 0.0),
            "synapse": dt / node.tau_syn if self.kind == "CubaLIF" else 1.0,
            "w_in": getattr(node, "w_in", 1.0),
        }
        for name, value in constants.items():
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float64).clone())  # as precise as the file

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        def c(name: str) -> Tensor:
            return self.get_buffer(name).to(x)

        v, i = (torch.zeros_like(x) + c("v_leak"), torch.zeros_like(x)) if state is None else state
        i = i + c("synapse") * (c("w_in") * x - i) if self.kind == "CubaLIF" else x
        v = v + c("gain") * (c("leak") * (c("v_leak") - v) + c("r") * i)
        if self.spike is None or self.kind == "LI":
            return v, (v, i)
        s: Tensor = self.spike(v - c("threshold"))
        v = v - s * c("threshold") if self.soft else v * (1 - s) + c("v_reset") * s
        return s, (v, i)


class SumPool(nn.Module):
    """Sum pooling over windows, the counterpart of AvgPool2d."""

    def __init__(self, kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...]) -> None:
        super().__init__()
        self.windows = kernel, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, *self.windows, divisor_override=1)


def _module(name: str, node: Any, dt: float, spike: Jet | None, soft: bool) -> nn.Module:
    """Build the layer of a node."""
    match kind_of(node):
        case "Affine" | "Linear":
            weight = torch.as_tensor(node.weight)
            if weight.dim() != 2:
                raise AdapterError(f"node '{name}': a weight of shape {list(weight.shape)} is not supported")
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=kind_of(node) == "Affine")
            return _filled(linear, node)
        case "Conv2d":
            weight = torch.as_tensor(node.weight)
            channels = weight.shape[1] * int(node.groups), weight.shape[0]
            kernel = (int(weight.shape[2]), int(weight.shape[3]))
            padding = _text(node.padding)
            conv = nn.Conv2d(
                *channels,
                kernel,
                stride=_pair(node.stride),
                padding=padding if isinstance(padding, str) else _pair(padding),
                dilation=_pair(node.dilation),
                groups=int(node.groups),
                bias=node.bias is not None,
            )
            return _filled(conv, node)
        case "Flatten":
            start, end = int(node.start_dim), int(node.end_dim)  # NIR has no batch axis
            return nn.Flatten(start + 1 if start >= 0 else start, end + 1 if end >= 0 else end)
        case "AvgPool2d":
            return nn.AvgPool2d(_pair(node.kernel_size), _pair(node.stride), _pair(node.padding))
        case "SumPool2d":
            return SumPool(_pair(node.kernel_size), _pair(node.stride), _pair(node.padding))
        case "IF" | "LIF" | "CubaLIF" | "LI":
            return NirNeuron(node, dt, spike, soft)
        case other:
            raise AdapterError(f"node '{name}': {other} is not supported")


def _filled(layer: nn.Linear | nn.Conv2d, node: Any) -> nn.Module:
    """Copy the weights of a node into its layer."""
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(node.weight))
        if layer.bias is not None:
            layer.bias.copy_(torch.as_tensor(node.bias))
    return layer


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _pair(value: Any) -> tuple[int, int]:
    values = torch.as_tensor(value).flatten().tolist()
    return int(values[0]), int(values[-1])
