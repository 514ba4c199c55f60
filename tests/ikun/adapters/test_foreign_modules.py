"""Networks whose modules are of an unusual kind, against dense float64 double backward of the same network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessian_tools import nested
from hessian_tools.checks import ObjectiveError
from hessian_tools.evaluation import copy_model
from hessian_tools.nonfinite import first_not_finite
from hessian_tools.objective import make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import hessian
from ikun.adapters import AdapterError, adapt
from ikun.surrogates import Surrogate, spike

X = torch.rand(11, 4, generator=torch.Generator().manual_seed(0))
Z = torch.rand(11, 3, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 6, (11, 5), generator=torch.Generator().manual_seed(2))
Y = torch.arange(11) % 3
ATAN = Surrogate.parse("atan:2")


class Recurrent(nn.Module):
    """A loop over time with dropout, which a script keeps in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.o = nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(0), 5, dtype=x.dtype)
        for _ in range(3):
            h = torch.tanh(self.a(x) + 0.3 * h) * torch.sigmoid(h)
        out: Tensor = self.o(self.drop(h))
        return out


def tanh() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def around(inner: nn.Module) -> nn.Module:
    return nn.Sequential(inner, nn.GELU(), nn.Linear(3, 3))


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    net[2].weight = net[0].weight
    return net


@dataclass
class Answer:
    logits: Tensor
    hidden: Any = None


class Attention(nn.Module):
    """A network in the style of Hugging Face: keywords, a mask, fused attention, dataclass outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.norm, self.o = nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Answer:
        h = self.e(input_ids)
        mixed, _ = self.attention(h, h, h, key_padding_mask=attention_mask == 0, need_weights=False)
        return Answer(self.o(self.norm(h + mixed).mean(1)))


class Two(nn.Module):
    """Spiking neurons with their own loop over time, and two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(4, 5), nn.Linear(3, 5), nn.Linear(5, 3)
        self.surrogate_function = lambda v: spike(v, ATAN)

    def forward(self, events: Tensor, image: Tensor) -> Tensor:
        v, total = torch.zeros_like(self.a(events)), torch.zeros(())
        for _ in range(3):
            v = 0.5 * v + 3 * (self.a(events) + self.b(image))
            s = self.surrogate_function(v - 1)
            v, total = v * (1 - s), total + self.o(s)
        return total / 3


class Coupled(Two):
    def forward(self, events: Tensor, image: Tensor) -> Tensor:
        return super().forward(events, image - image.mean(0))


def script(net: nn.Module) -> nn.Module:
    made: nn.Module = torch.jit.script(net)
    return made


def trace(net: nn.Module) -> nn.Module:
    made: nn.Module = torch.jit.trace(net, X)
    return made


MASK = (TOKENS > 1).long() | (torch.arange(5) == 0).long()
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module], Any, Callable[..., Tensor]]] = {
    "script": (tanh, script, X, lambda net, x: net(x)),
    "trace": (tanh, trace, X, lambda net, x: net(x)),
    "script of a loop": (Recurrent, script, X, lambda net, x: net(x)),
    "script inside": (Recurrent, lambda net: around(script(net)), X, lambda net, x: net(x)),
    "tied script": (tied, script, X, lambda net, x: net(x)),
    "attention": (
        Attention,
        lambda net: net,
        {"input_ids": TOKENS, "attention_mask": MASK},
        lambda net, x: net(**x).logits,
    ),
    "two inputs": (Two, lambda net: net, {"image": Z, "events": X}, lambda net, x: net(**x)),
    "two inputs in a tuple": (Two, lambda net: net, (X, Z), lambda net, x: net(*x)),
    "compiled": (tanh, lambda net: torch.compile(net), X, lambda net, x: net(x)),  # type: ignore[arg-type, return-value]
    "data parallel": (tanh, lambda net: nn.DataParallel(net), X, lambda net, x: net(x)),
}


def expected(net: nn.Module, run: Callable[..., Tensor], x: Any) -> Tensor:
    net = net.double().eval()
    p = list(net.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value = nn.functional.cross_entropy(run(net, nested.converted(x, p[0])), Y)
    g = torch.cat([t.flatten() for t in torch.autograd.grad(value, p, create_graph=True)])
    rows = [torch.autograd.grad(e, p, retain_graph=True, materialize_grads=True, allow_unused=True) for e in g]
    return torch.stack([torch.cat([t.flatten() for t in row]) for row in rows])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_the_hessian_is_that_of_double_backward(case: str) -> None:
    build, wrap, x, run = CASES[case]
    torch.manual_seed(3)
    plain = build()
    torch.manual_seed(4)
    net = wrap(build())
    with torch.no_grad():
        inner = around(build()) if case == "script inside" else plain
        for p, q in zip(net.parameters(), inner.parameters(), strict=True):
            p.copy_(q)
    adapted = adapt(net, x)
    objective = make_objective(
        adapted.model, nn.functional.cross_entropy, (x, Y), dtype=torch.float64, batch_size=4, reset=adapted.reset
    )
    torch.testing.assert_close(dense(hessian(objective)), expected(inner, run, x), rtol=1e-9, atol=1e-12)
    assert first_not_finite(objective) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_copied_script_has_gradients_in_its_dtype() -> None:
    copied = copy_model(script(tied())).double()
    p = list(copied.parameters())
    assert [g.dtype for g in torch.autograd.grad(copied(X.double()).sum(), p)] == [torch.float64] * len(p)
    assert len(p) == len(list(tied().parameters()))


def test_coupling_through_any_input_is_refused() -> None:
    with pytest.raises(AdapterError, match="depends on the others"):
        adapt(Coupled(), (X, Z))
    with pytest.raises(ObjectiveError, match="depends on the others"):
        make_objective(Coupled(), nn.functional.cross_entropy, ((X, Z), Y))


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        ((X, Z[:4]), {}, r"samples as its first axis, not \[11, 4\], \[4, 3\]"),
        ({}, {}, "samples as its first axis, not no tensor"),
        ((X[:0], Z[:0]), {}, "at least one sample"),
        ((X, Z), {"steps": 3}, "steps= needs inputs that are one tensor"),
        ({"events": X, "picture": Z}, {}, r"fails on inputs of shape \[3, 4\], \[3, 3\]"),
    ],
)
def test_other_inputs_are_refused_in_one_line(x: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        adapt(Two(), x, **options)
