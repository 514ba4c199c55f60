"""Spiking network architectures.

- csnn: `depth` convolutions with 2 x 2 pooling after the first two, a hidden linear layer, and a readout. The network
  of arXiv 2411.18250 has depth 2.
- mlp: linear layers with the sizes in `hidden`, and a readout.
- resnet: SEW ResNet with ADD (Fang et al. 2021, arXiv 2102.04159). It has a convolution, `depth` residual blocks and a
  readout. A block has two convolutions, and their output spikes are added to the input of the block. Pooling follows
  the first convolution if the images are at least 4 x 4, and follows the middle block if at least 8 x 8 pixels are
  left.
- rsnn: recurrent layers with the sizes in `hidden`, whose input current is W x[t] + V s[t-1], and a readout.

Spiking neurons follow every convolution and every linear layer, including the readout. A normalization layer precedes
the neurons of all layers except the linear layers of the csnn and all readouts. A `Spec` contains everything that is
needed to build a network, and checkpoints store it. Layers are named conv1, norm1, spike1, pool1, ..., fc1, rec1, so
that parameters can be selected by a pattern such as 'conv*' or 'fc1.weight'.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from ikun.data.encoding import CODINGS
from ikun.layers import Add, Branch, Dropout, MaxPool, Recurrent
from ikun.neurons import NEURONS, RESETS, Dynamics, Neuron
from ikun.nodes.layer import fire
from ikun.nodes.rewriting import TRACING
from ikun.surrogates import Surrogate

MODELS = ("csnn", "mlp", "resnet", "rsnn")
NORMS = ("none", "bn", "tdbn")
TIES = ("first", "last")
# Fields that were added to Spec later. Older descriptions do not contain them and get the default.
ADDED = ("depth", "dropout")


@dataclass(frozen=True)
class Spec:
    """The description of a network: its architecture, its neurons and its input coding.

    Attributes:
        model: Architecture, one of `MODELS`.
        input_shape: Shape of an image, (channels, height, width).
        classes: Number of outputs.
        channels: Number of channels of every convolution. Only for csnn and resnet.
        hidden: Sizes of the hidden layers. Only for mlp and rsnn.
        norm: "none", "bn" (BatchNorm) or "tdbn". tdbn is a BatchNorm whose weight is initialized to the threshold, and
            to threshold / sqrt(2) at the end of a residual branch (Zheng et al. 2021). Both normalize over time,
            samples and space.
        neuron: Neuron model, one of `ikun.neurons.NEURONS`.
        tau: Time constant in steps, for lif and plif.
        threshold: Firing threshold.
        v_reset: Potential at rest and after a hard reset.
        reset: "hard" or "soft".
        detach_reset: Whether derivatives ignore the spike in the reset.
        surrogate: Surrogate derivative, as parsed by `ikun.surrogates.Surrogate.parse`.
        timesteps: Number of time steps T.
        coding: Input coding, one of `ikun.data.encoding.CODINGS`.
        ties: Which of several equal entries a max-pooling window selects in row-major order, "first" or "last".
        relaxed: Whether spikes are replaced by F(h - threshold) in the forward pass.
        depth: Number of convolutions (csnn) or residual blocks (resnet).
        dropout: Probability of dropping the output of a hidden neuron. The mask is the same at all time steps.

    Raises:
        ValueError: If a network with these values cannot be built. The message names the field.
    """

    model: str = "csnn"
    input_shape: tuple[int, int, int] = (1, 8, 8)
    classes: int = 10
    channels: int = 16
    hidden: tuple[int, ...] = (128, 128)
    norm: str = "bn"
    neuron: str = "if"
    tau: float = 2.0
    threshold: float = 1.0
    v_reset: float = 0.0
    reset: str = "hard"
    detach_reset: bool = False
    surrogate: str = "atan:2"
    timesteps: int = 4
    coding: str = "direct"
    ties: str = "first"
    relaxed: bool = False
    depth: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in (
            ("model", MODELS),
            ("norm", NORMS),
            ("neuron", NEURONS),
            ("reset", RESETS),
            ("coding", CODINGS),
            ("ties", TIES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not '{getattr(self, name)}'")
        Surrogate.parse(self.surrogate)
        for name, top in (("classes", 100_000), ("channels", 4096), ("timesteps", 10_000), ("depth", 200)):
            if not 1 <= getattr(self, name) <= top:
                raise ValueError(f"{name} must lie between 1 and {top}, not {getattr(self, name)}")
        if len(self.input_shape) != 3 or not all(1 <= n <= 4096 for n in self.input_shape):
            raise ValueError(
                f"input_shape must be (channels, height, width), each from 1 to 4096, not {self.input_shape}"
            )
        if self.model == "csnn" and min(self.input_shape[1:]) < (least := 2 ** min(self.depth, 2)):
            raise ValueError(
                f"images of {self.input_shape[1:]} are too small: this csnn needs at least {least} x {least} pixels"
            )
        if len(self.hidden) > 1000 or not all(1 <= n <= 1_000_000 for n in self.hidden):
            raise ValueError(f"hidden sizes must lie between 1 and 1,000,000, not {self.hidden}")
        if self.model == "rsnn" and not self.hidden:
            raise ValueError("the rsnn needs at least one hidden layer: set `hidden`")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if not self.tau > 1:
            raise ValueError(f"tau must exceed 1, not {self.tau}")
        if not self.threshold > self.v_reset:
            raise ValueError(f"the threshold ({self.threshold}) must exceed the reset potential ({self.v_reset})")
        if not all(math.isfinite(v) for v in (self.tau, self.threshold, self.v_reset)):
            raise ValueError(f"tau, threshold and v_reset must be finite, not {self.tau, self.threshold, self.v_reset}")

    @staticmethod
    def from_dict(values: dict[str, object]) -> Spec:
        """Build a Spec from a plain dict, as stored in a checkpoint.

        Args:
            values: The fields of the Spec. Fields in `ADDED` may be missing.

        Returns:
            The description.

        Raises:
            ValueError: If a field is missing, unknown, of the wrong type, or has a value that cannot be built.
        """
        kinds = {"str": str, "int": int, "float": (int, float), "bool": bool}
        expected = {f.name: str(f.type) for f in fields(Spec)}
        if set(expected) - set(ADDED) - set(values) or set(values) - set(expected):
            raise ValueError(f"network description: missing or unknown fields: {sorted(set(values) ^ set(expected))}")
        clean: dict[str, object] = {}
        for name, value in values.items():
            if expected[name].startswith("tuple"):
                if not isinstance(value, list | tuple) or not all(type(n) is int for n in value):
                    raise ValueError(f"network description: {name} must be a list of integers")
                clean[name] = tuple(value)
            elif not isinstance(value, kinds[expected[name]]) or (  # type: ignore[arg-type]
                isinstance(value, bool) and expected[name] != "bool"
            ):
                raise ValueError(f"network description: {name} must be {expected[name]}")
            else:
                clean[name] = value
        return Spec(**clean)  # type: ignore[arg-type]


Named = tuple[str, nn.Module]


def _layers(spec: Spec) -> Iterator[Named]:
    """Yield the kind and the module of every layer in order."""
    channels, height, width = spec.input_shape
    inputs = channels * height * width
    if spec.model == "csnn":
        for i in range(spec.depth):
            yield from _conv(spec, channels if i == 0 else spec.channels, pool=i < 2)
            height, width = (height // 2, width // 2) if i < 2 else (height, width)
        inputs = spec.channels * height * width
        yield "flatten", nn.Flatten()
        yield "fc", nn.Linear(inputs, spec.channels * 16, bias=False)
        yield from _fire(spec)
        inputs = spec.channels * 16
    elif spec.model == "resnet":
        pool = min(height, width) >= 4
        yield from _conv(spec, channels, pool=pool)
        height, width = (height // 2, width // 2) if pool else (height, width)
        for i in range(1, spec.depth + 1):
            yield "branch", Branch()
            yield from _conv(spec, spec.channels)
            yield from _conv(spec, spec.channels, alpha=math.sqrt(0.5))
            yield "add", Add()
            if i == spec.depth // 2 and min(height, width) >= 8:
                yield "pool", MaxPool(spec.ties)
                height, width = height // 2, width // 2
        inputs = spec.channels * height * width
        yield "flatten", nn.Flatten()
    else:
        yield "flatten", nn.Flatten()
        for size in spec.hidden:
            yield "fc", nn.Linear(inputs, size, bias=False)
            yield from _norm(spec, nn.BatchNorm1d(size))
            if spec.model == "rsnn":
                yield "rec", Recurrent(size)
            yield from _fire(spec)
            inputs = size
    yield "fc", nn.Linear(inputs, spec.classes, bias=False)
    yield "spike", _neuron(spec)


def _conv(spec: Spec, inputs: int, *, pool: bool = False, alpha: float = 1.0) -> Iterator[Named]:
    """Yield a 3 x 3 convolution with its norm, neurons and optional pooling. alpha: see `_norm`."""
    yield "conv", nn.Conv2d(inputs, spec.channels, 3, padding=1, bias=False)
    yield from _norm(spec, nn.BatchNorm2d(spec.channels), alpha)
    yield from _fire(spec, pool)


def _norm(spec: Spec, norm: nn.BatchNorm1d | nn.BatchNorm2d, alpha: float = 1.0) -> Iterator[Named]:
    """Yield the norm unless there is none. alpha: initial tdbn weight, relative to the threshold."""
    if spec.norm == "tdbn":
        nn.init.constant_(norm.weight, alpha * spec.threshold)
    if spec.norm != "none":
        yield "norm", norm


def _fire(spec: Spec, pool: bool = False) -> Iterator[Named]:
    """Yield neurons, followed by pooling and dropout where the network has them."""
    yield "spike", _neuron(spec)
    if pool:
        yield "pool", MaxPool(spec.ties)
    if spec.dropout:
        yield "drop", Dropout(spec.dropout)


def _neuron(spec: Spec) -> Neuron:
    dynamics = Dynamics(
        Surrogate.parse(spec.surrogate), spec.threshold, spec.v_reset, spec.reset, spec.detach_reset, spec.relaxed
    )
    return Neuron(spec.neuron, dynamics, spec.tau)


def _heard(module: nn.Module) -> bool:
    """Whether hooks wait for calls of a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


class Network(nn.Module):
    """A spiking network that maps images or coded inputs to mean firing rates.

    Images [N, C, H, W] are repeated at all T time steps. Coded inputs are [N, T, C, H, W]. The output is [N, classes].

    Args:
        spec: Description of the network.
    """

    tracing = TRACING

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        counts: Counter[str] = Counter()
        for kind, layer in _layers(spec):
            counts[kind] += 1
            self.add_module(kind if kind == "flatten" else f"{kind}{counts[kind]}", layer)

    def _units(self) -> Iterator[tuple[nn.Module, MaxPool | None]]:
        """Yield the layers in order. Neurons come together with the pooling that directly follows them."""
        layers = [*self.children(), None]
        for before, layer, following in zip([None, *layers], layers, layers[1:], strict=False):
            if isinstance(layer, Neuron):
                yield layer, following if isinstance(following, MaxPool) else None
            elif layer is not None and not (isinstance(layer, MaxPool) and isinstance(before, Neuron)):
                yield layer, None

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        """Return the mean firing rates [N, classes] of `spikes`."""
        return self.spikes(x, plain).mean(0)

    def spikes(self, x: Tensor, plain: bool = False) -> Tensor:
        """Return the spikes of the readout [T, N, classes]. They can be differentiated twice.

        Args:
            x: Images [N, C, H, W], or coded inputs [N, T, C, H, W].
            plain: Whether all neurons run step by step in plain torch, as those with hooks do, and all neurons under a
                transform of `torch.func`. The spikes are the same. Recurrent layers do unless the network is traced.

        Returns:
            The spikes.

        Raises:
            ValueError: If x has another shape.
        """
        plain = plain or torch._C._are_functorch_transforms_active()
        steps = self.spec.timesteps
        static = x.dim() == 4  # a repeated image: the layers before the first neuron run once, not T times
        if not static:
            if x.dim() != 5 or x.shape[1] != steps:
                raise ValueError(f"input must be [N, C, H, W] or [N, {steps}, C, H, W], not {list(x.shape)}")
            x = x.transpose(0, 1)
        shortcut, feedback = x, None
        for layer, pool in self._units():
            if isinstance(layer, Neuron):
                x = x[None] if static else x
                eager = feedback is not None and not torch._C._len_torch_function_stack()  # step by step, as plain does
                if plain or eager or _heard(layer) or (pool is not None and _heard(pool)):
                    x = layer(x.expand(steps, *x.shape[1:]), feedback)
                    x = x if pool is None else pool(x)
                else:
                    x = fire(layer, x, steps, pool, feedback)
                static, feedback = False, None
            elif isinstance(layer, Recurrent):
                feedback = layer
            elif isinstance(layer, Branch):
                shortcut = x
            elif isinstance(layer, Add):
                x = x + shortcut
            elif static or isinstance(layer, MaxPool | Dropout):
                x = layer(x)
            else:
                x = layer(x.flatten(0, 1)).unflatten(0, (steps, -1))
        return x

    def stages(self) -> Iterator[tuple[str, nn.Conv2d | nn.Linear, nn.Module | None, str, Neuron]]:
        """Iterate over the weight layers in order.

        The recurrent weights of a layer ('rec1') follow its input weights ('fc1') and have the same neurons.

        Yields:
            Layer name, weight layer, norm or None, neuron name, and neurons.
        """
        waiting: list[tuple[str, nn.Conv2d | nn.Linear, nn.Module | None]] = []
        for name, layer in self.named_children():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                waiting.append((name, layer, None))
            elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and waiting:
                waiting[-1] = (*waiting[-1][:2], layer)
            elif isinstance(layer, Neuron):
                yield from ((*weights, name, layer) for weights in waiting)
                waiting = []


class OverTime(Network):
    """A network whose outputs are the spikes of the readout over time [N, T, classes].

    Args:
        network: The network, whose weights are shared.
    """

    def __init__(self, network: Network) -> None:
        super().__init__(network.spec)
        self._modules = network._modules

    def forward(self, x: Tensor, plain: bool = False) -> Tensor:
        """Return the spikes [N, T, classes] (see `Network.spikes`)."""
        return self.spikes(x, plain).transpose(0, 1)
