"""The networks of networks.py, as their users write them: SpikingJelly, snnTorch, plain torch and `ikun.networks`.

Weights are drawn with seed 0. Batch norms get the statistics of the batch, so that layers spike. SpikingJelly's models
import torchvision only to download weights. A torchvision that is missing, or built for another torch, is replaced.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessian_tools.evaluation import evaluation_mode
from ikun.networks import Network, Spec

Run = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A network and a batch.

    Attributes:
        about: Sizes, for the table.
        net: The user's network.
        x: Inputs [N, ...].
        classes: Number of outputs.
        run: (net, x) -> outputs [N, classes], from a cleared state.
        reset: Clears the state of the network.
        options: Of `ikun.adapt`. None: the network is not adapted.
    """

    about: str
    net: nn.Module
    x: Tensor
    classes: int = 10
    run: Run = lambda net, x: net(x)
    reset: Callable[[nn.Module], object] = lambda net: None
    options: dict[str, Any] | None = field(default_factory=dict)


class Own(nn.Module):
    """The user's network as a module that maps x [N, ...] to outputs [N, K], without any code that is measured here.

    It stays in evaluation mode. Neurons stay in training mode, where their surrogate works.
    """

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.net, self.run, self.reset, self.few = case.net, case.run, case.reset, case.x[:2]
        self.train()

    def train(self, mode: bool = True) -> Own:
        """Set the only mode there is."""
        self.training = False
        evaluation_mode(self.net, self._try)
        return self

    def _try(self, net: nn.Module) -> None:
        self.reset(net)
        self.run(net, self.few)

    def forward(self, x: Tensor) -> Tensor:
        self.reset(self.net)
        y = self.run(self.net, x)
        self.reset(self.net)
        return y


def _without_torchvision() -> None:
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        for name in ("torchvision", "torchvision._internally_replaced_utils"):
            sys.modules[name] = ModuleType(name)
        vars(sys.modules["torchvision._internally_replaced_utils"])["load_state_dict_from_url"] = None


def _spiking(case: Case, linear: float = 1.0, norms: bool = True) -> Case:
    """Return the case with weights at which all layers spike.

    Args:
        case: The case, whose network is changed.
        linear: Factor of the weights of linear layers.
        norms: Whether weights and biases of batch norms are drawn. Their statistics are those of the batch in any case.
    """
    own = Own(case)
    with torch.no_grad():
        for m in case.net.modules():
            if isinstance(m, nn.Linear):
                m.weight.mul_(linear)
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                if norms:
                    m.weight.uniform_(1, 2)
                    m.bias.normal_(0.2, 0.2)
                m.training, m.momentum = True, None  # statistics are means over the passes
                m.reset_running_stats()
        own(case.x)
    own.train()
    return case


def _mean_over_time(net: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = net(x).mean(0)
    return y


def _jelly(
    net: nn.Module, x: Tensor, about: str, mode: str | None, steps: int | None, sequences: bool = False, **options: Any
) -> Case:
    """A case of SpikingJelly. mode: sets the step mode, "s" or "m". steps: T if the network does not know it."""
    from spikingjelly.activation_based import functional

    if mode is not None:
        functional.set_step_mode(net, mode)

    def run(net: nn.Module, x: Tensor) -> Tensor:
        if steps is None:
            y: Tensor = net(x)
        elif mode == "m":
            y = net(x.transpose(0, 1).contiguous() if sequences else x.repeat(steps, *[1] * x.dim()))
        else:
            y = torch.stack([net(x) for _ in range(steps)])
        return y.mean(0) if y.dim() == 3 else y

    adapting = {} if steps is None else {"steps": steps, "sequences": sequences}
    return Case(about, net, x, run=run, reset=functional.reset_net, options=adapting, **options)


def csnn_spikingjelly(small: bool) -> Case:
    from spikingjelly.activation_based import layer, neuron, surrogate

    c, steps, n, size = (2, 2, 4, 8) if small else (16, 4, 64, 28)

    def spike() -> nn.Module:
        return neuron.IFNode(surrogate_function=surrogate.ATan())

    class CSNN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                *(layer.Conv2d(1, c, 3, padding=1, bias=False), layer.BatchNorm2d(c), spike(), layer.MaxPool2d(2, 2)),
                *(layer.Conv2d(c, c, 3, padding=1, bias=False), layer.BatchNorm2d(c), spike(), layer.MaxPool2d(2, 2)),
                *(layer.Flatten(), layer.Linear(c * (size // 4) ** 2, 16 * c, bias=False), spike()),
                *(layer.Linear(16 * c, 10, bias=False), spike()),
            )

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layers(x.unsqueeze(0).repeat(steps, 1, 1, 1, 1)).mean(0)
            return y

    net, about = CSNN(), f"C = {c}, T = {steps}, {n} images {size} x {size}"
    return _spiking(_jelly(net, torch.rand(n, 1, size, size), about, "m", None), 4)


def csnn_snntorch(small: bool) -> Case:
    import snntorch
    from snntorch import surrogate

    c, steps, n, size = (2, 2, 4, 8) if small else (16, 4, 64, 28)

    def spike() -> nn.Module:
        module: nn.Module = snntorch.Leaky(beta=1.0, spike_grad=surrogate.atan(), reset_mechanism="zero")
        return module

    class CSNN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(1, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
            self.conv2, self.norm2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
            self.fc1 = nn.Linear(c * (size // 4) ** 2, 16 * c, bias=False)
            self.fc2 = nn.Linear(16 * c, 10, bias=False)
            self.spike1, self.spike2, self.spike3, self.spike4 = (spike() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            v1, v2, v3, v4 = (m.init_leaky() for m in (self.spike1, self.spike2, self.spike3, self.spike4))
            outputs = []
            for _ in range(steps):
                s, v1 = self.spike1(self.norm1(self.conv1(x)), v1)
                s, v2 = self.spike2(self.norm2(self.conv2(F.max_pool2d(s.to(x), 2))), v2)
                s, v3 = self.spike3(self.fc1(F.max_pool2d(s.to(x), 2).flatten(1)), v3)
                s, v4 = self.spike4(self.fc2(s.to(x)), v4)
                outputs.append(s.to(x))  # the library's spikes are float32; nothing happens in float32
            return torch.stack(outputs)

    about = f"C = {c}, T = {steps}, {n} images {size} x {size}"
    return _spiking(Case(about, CSNN(), torch.rand(n, 1, size, size), run=_mean_over_time), 4)


def _images(small: bool) -> tuple[int, Tensor, str]:
    """Steps, inputs and sizes of the deep networks."""
    steps, n, size = (2, 2, 16) if small else (4, 16, 32)
    return steps, torch.rand(n, 3, size, size), f"T = {steps}, {n} images {size} x {size}"


def vgg11(small: bool) -> Case:
    _without_torchvision()
    from spikingjelly.activation_based import layer, neuron, surrogate
    from spikingjelly.activation_based.model import spiking_vgg

    steps, x, about = _images(small)
    x = F.interpolate(x, 32)  # the least size for five poolings
    net = spiking_vgg.spiking_vgg11_bn(
        spiking_neuron=neuron.LIFNode, num_classes=10, surrogate_function=surrogate.ATan(), detach_reset=True
    )
    net.avgpool, net.classifier = layer.AdaptiveAvgPool2d((1, 1)), layer.Linear(512, 10)
    return _spiking(_jelly(net, x, f"{about}, batch norm, one linear layer", "m", steps))


def _sew(small: bool, mode: str) -> Case:
    _without_torchvision()
    from spikingjelly.activation_based import neuron, surrogate
    from spikingjelly.activation_based.model import sew_resnet

    def spike() -> nn.Module:
        module: nn.Module = neuron.IFNode(surrogate_function=surrogate.ATan(), detach_reset=True)
        return module

    steps, x, about = _images(small)
    net = sew_resnet.sew_resnet18(cnf="ADD", spiking_neuron=spike, num_classes=10)
    return _spiking(_jelly(net, x, about, mode, steps), norms=False)


def sew_single(small: bool) -> Case:
    return _sew(small, "s")


def sew_multi(small: bool) -> Case:
    return _sew(small, "m")


def ms_resnet(small: bool) -> Case:
    _without_torchvision()
    from spikingjelly.activation_based.model import ms_resnet as models

    steps, x, about = _images(small)
    net = models.ms_resnet18(T=steps, num_classes=10)
    return _spiking(_jelly(net, x, about, None, None), norms=False)


def spikformer(small: bool) -> Case:
    _without_torchvision()
    from spikingjelly.activation_based.model import spikformer as models

    steps, x, about = _images(small)
    dim, depth, size = (16, 1, x.shape[-1]) if small else (96, 2, x.shape[-1])
    sizes = {"img_size_h": size, "img_size_w": size, "patch_size": 4, "embed_dims": dim, "num_heads": 4}
    net = models.Spikformer(T=steps, num_classes=10, depths=depth, **sizes)
    return _spiking(_jelly(net, x, f"{about}, {depth} blocks of {dim}, patches 4 x 4", None, None), 4)


def dvs_gesture(small: bool) -> Case:
    _without_torchvision()
    from spikingjelly.activation_based import neuron, surrogate
    from spikingjelly.activation_based.model import parametric_lif_net

    steps, n, c = (2, 1, 2) if small else (16, 2, 32)
    net = parametric_lif_net.DVSGestureNet(
        c, neuron.LIFNode, surrogate_function=surrogate.ATan(), detach_reset=True, tau=2.0
    )
    x = (torch.rand(n, steps, 2, 128, 128) < 0.1).float()
    about = f"C = {c} (128 in the paper), T = {steps}, {n} samples 128 x 128"
    return _spiking(_jelly(net, x, about, "m", steps, sequences=True, classes=11), 6)


def _sequences(small: bool) -> tuple[int, int, int, Tensor, str]:
    """Steps, features, neurons and inputs [N, T, features] of the recurrent networks, with their sizes in words."""
    steps, features, hidden, n = (5, 8, 6, 4) if small else (100, 100, 128, 64)
    x = (torch.rand(n, steps, features) < 0.1).float()
    return steps, features, hidden, x, f"{hidden} neurons, T = {steps}, {n} samples of {features} channels"


def recurrent_snntorch(small: bool) -> Case:
    import snntorch
    from snntorch import surrogate

    steps, features, hidden, x, about = _sequences(small)

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(features, hidden), nn.Linear(hidden, 10)
            self.spike1 = snntorch.RLeaky(beta=0.9, linear_features=hidden, spike_grad=surrogate.atan())
            self.spike2 = snntorch.Leaky(beta=0.9, spike_grad=surrogate.atan())

        def forward(self, x: Tensor) -> Tensor:
            (s, v), u = self.spike1.reset_mem(), self.spike2.reset_mem()
            outputs = []
            for t in range(steps):
                s, v = self.spike1(self.fc1(x[t]), s.to(x), v)
                out, u = self.spike2(self.fc2(s.to(x)), u)
                outputs.append(out.to(x))
            return torch.stack(outputs)

    def run(net: nn.Module, x: Tensor) -> Tensor:
        return _mean_over_time(net, x.transpose(0, 1))

    net, options = Recurrent(), {"steps": steps, "sequences": True, "time_first": True}
    with torch.no_grad():
        net.spike1.recurrent.weight.mul_(0.2)  # otherwise gradients grow by 10^6 over 100 steps
    return _spiking(Case(about, net, x, run=run, options=options), 3)


class Spike(torch.autograd.Function):
    """A spike with the derivative of atan(2), as people write it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result: Tensor = g / (1 + (math.pi * x).square())
        return result


class HandWritten(nn.Module):
    """A layer of recurrent LIF neurons with a soft reset and a leaky readout, in plain torch."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.recurrent = nn.Linear(features, hidden), nn.Linear(hidden, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, features] -> [N, 10]."""
        v = s = x.new_zeros(len(x), self.fc1.out_features)
        u, total = x.new_zeros(len(x), 10), x.new_zeros(len(x), 10)
        for t in range(x.shape[1]):
            v = 0.9 * v + self.fc1(x[:, t]) + self.recurrent(s) - s
            s = Spike.apply(v - 1)  # type: ignore[no-untyped-call]
            u = 0.9 * u + self.fc2(s)
            total = total + u
        return total / x.shape[1]


def recurrent_by_hand(small: bool) -> Case:
    _, features, hidden, x, about = _sequences(small)
    return _spiking(Case(about, HandWritten(features, hidden), x), 2)


def csnn_ikun(small: bool) -> Case:
    c, steps, n, size = (2, 2, 4, 8) if small else (16, 4, 64, 28)
    net = Network(Spec(input_shape=(1, size, size), channels=c, timesteps=steps))
    about = f"C = {c}, T = {steps}, {n} images {size} x {size}"

    def plain(net: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = net(x, plain=True)
        return y

    return _spiking(Case(f"{about}, plain torch", net, torch.rand(n, 1, size, size), run=plain, options=None), 4)


CASES: dict[str, tuple[str, Callable[[bool], Case]]] = {
    "csnn-spikingjelly": ("CSNN, SpikingJelly", csnn_spikingjelly),
    "csnn-snntorch": ("CSNN, snnTorch", csnn_snntorch),
    "vgg11": ("Spiking VGG11, SpikingJelly", vgg11),
    "sew-resnet18-single": ("SEW ResNet18, single-step, SpikingJelly", sew_single),
    "sew-resnet18-multi": ("SEW ResNet18, multi-step, SpikingJelly", sew_multi),
    "ms-resnet18": ("MS-ResNet18, SpikingJelly", ms_resnet),
    "spikformer": ("Spikformer, SpikingJelly", spikformer),
    "dvs-gesture": ("DVSGestureNet, SpikingJelly", dvs_gesture),
    "recurrent-snntorch": ("Recurrent LIF, snnTorch", recurrent_snntorch),
    "recurrent-by-hand": ("Recurrent LIF, plain torch", recurrent_by_hand),
    "csnn-ikun": ("CSNN, ikun.networks", csnn_ikun),
}


def make_case(name: str, small: bool) -> Case:
    """Return a network of CASES, drawn with seed 0."""
    torch.manual_seed(0)
    return CASES[name][1](small)
