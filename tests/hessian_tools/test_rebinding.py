"""Functions that refer to a network refer to its copy afterwards."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessian_tools import dense, hessian, make_objective
from hessian_tools.analysis.flatness.worst_case import at
from hessian_tools.evaluation import copy_model
from hessian_tools.io.errors import ObjectiveError
from hessian_tools.perturbation import outputs_at
from hessian_tools.rebinding import deep_copy

X, Y = torch.randn(24, 5, generator=torch.Generator().manual_seed(3)), torch.arange(24) % 3


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.tanh(self.a(x)))
        return out


class Holder:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def run(self, x: Tensor) -> Any:
        return self.model.b(torch.tanh(self.model.a(x)))


def lambda_attribute(m: Any) -> None:
    m.head = lambda h: m.b(h)
    m.forward = lambda x: m.head(torch.tanh(m.a(x)))


def bound_method(m: Any) -> None:
    f = m.forward
    m.forward = lambda x: f(x)


def method_of_a_closure(m: Any) -> None:
    f = m.forward
    m.forward = types.MethodType(lambda self, x: f(x), m)


def default(m: Any) -> None:
    m.forward = lambda x, m=m: m.b(torch.tanh(m.a(x)))


def keyword_default(m: Any) -> None:
    def forward(x: Tensor, *, head: nn.Module = m.b) -> Any:
        return head(torch.tanh(m.a(x)))

    m.forward = forward


def partial(m: Any) -> None:
    m.forward = functools.partial(lambda net, x: net.b(torch.tanh(net.a(x))), m)


def partial_of_a_closure(m: Any) -> None:
    m.forward = functools.partial(lambda scale, x: scale * m.b(torch.tanh(m.a(x))), 1.0)


def wrapped(m: Any) -> None:
    f = m.forward

    @functools.wraps(f)
    def forward(x: Tensor) -> Any:
        return vars(forward)["__wrapped__"](x)

    m.forward = forward


def containers(m: Any) -> None:
    parts = {"a": [m.a], "b": (torch.tanh, m.b)}
    m.steps = [lambda x: parts["a"][0](x), (torch.tanh, lambda h: parts["b"][1](h))]
    m.forward = lambda x: m.steps[1][1](m.steps[1][0](m.steps[0](x)))


def weak_reference(m: Any) -> None:
    m.own = weakref.ref(m)
    m.forward = lambda x: m.own().b(torch.tanh(m.own().a(x)))


def holder(m: Any) -> None:
    held = Holder(m)
    m.forward = lambda x: held.run(x)


def method_of_a_holder(m: Any) -> None:
    held = Holder(m)
    m.hook = [lambda x: held.run(x)]
    m.forward = lambda x: m.hook[0](x)


def parameter(m: Any) -> None:
    w = m.b.weight
    m.forward = lambda x: F.linear(torch.tanh(m.a(x)), w, m.b.bias)


def recursive(m: Any) -> None:
    def head(h: Tensor, depth: int = 2) -> Any:
        return m.b(h) if depth == 0 else head(h, depth - 1)

    m.forward = lambda x: head(torch.tanh(m.a(x)))


def in_a_hook(m: Any) -> None:
    m.a.register_forward_hook(lambda module, args, out: out + 0 * m.b.weight.sum())


GLOBAL = Plain()


def global_helper(h: Tensor) -> Any:
    return GLOBAL.b(h)


def of_a_global(m: Any) -> None:
    GLOBAL.load_state_dict(m.state_dict())
    GLOBAL.forward = lambda x: global_helper(torch.tanh(GLOBAL.a(x)))  # type: ignore[method-assign]


WAYS: list[Callable[[Any], None]] = [
    *(lambda_attribute, bound_method, method_of_a_closure, default, keyword_default, partial, partial_of_a_closure),
    *(wrapped, containers, weak_reference, holder, method_of_a_holder, parameter, recursive, in_a_hook),
]


def curvature(model: nn.Module, **options: Any) -> Tensor:
    return dense(hessian(make_objective(model, F.cross_entropy, (X, Y), **options))).double()


@functools.cache
def right() -> Tensor:
    """The Hessian, by torch.func in float64."""
    model = Plain().double()
    named = dict(model.named_parameters())
    w = torch.cat([p.detach().reshape(-1) for p in named.values()])

    def loss(w: Tensor) -> Tensor:
        parts = w.split([p.numel() for p in named.values()])
        weights = {name: part.reshape(p.shape) for part, (name, p) in zip(parts, named.items(), strict=True)}
        return F.cross_entropy(torch.func.functional_call(model, weights, (X.double(),)), Y)

    return torch.func.hessian(loss)(w)  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", WAYS)
def test_the_hessian_reaches_modules_behind_functions(way: Callable[[Any], None]) -> None:
    model = Plain()
    way(model)
    torch.testing.assert_close(curvature(model, dtype=torch.float64), right(), atol=1e-12, rtol=0)
    torch.testing.assert_close(curvature(model), right(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("way", WAYS)
def test_the_original_keeps_its_functions(way: Callable[[Any], None]) -> None:
    model = Plain()
    way(model)
    before = model(X)
    copied = copy_model(copy_model(model))  # a copy of a copy: the checks make one
    assert torch.equal(copied(X), before)
    with torch.no_grad():
        for p in copied.parameters():
            p.zero_()
    assert torch.equal(model(X), before)
    assert not copied(X).any()


def test_globals_are_followed() -> None:
    of_a_global(Plain())
    torch.testing.assert_close(curvature(GLOBAL, dtype=torch.float64), right(), atol=1e-12, rtol=0)
    assert GLOBAL.forward.__globals__ is globals()  # type: ignore[attr-defined]


def test_adapters_in_hooks() -> None:
    class Written(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.lora = nn.Linear(5, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(torch.tanh(self.a(x) + self.lora(x)))
            return out

    written = Written()
    hooked: Any = Plain()
    hooked.lora = copy.deepcopy(written.lora)
    hooked.a.register_forward_hook(lambda module, args, out: out + hooked.lora(args[0]))
    found = curvature(hooked, dtype=torch.float64)
    torch.testing.assert_close(found, curvature(written, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("way", [lambda_attribute, bound_method, in_a_hook])
def test_perturbed_weights_reach_modules_behind_functions(way: Callable[[Any], None]) -> None:
    model, plain = Plain(), Plain()
    way(model)
    objective, expected = (make_objective(m, F.cross_entropy, (X, Y), dtype=torch.float64) for m in (model, plain))
    w = objective.weights() * 1.5
    with torch.no_grad():
        for p in plain.double().parameters():
            p *= 1.5
        outputs = plain(X.double())
    torch.testing.assert_close(next(iter(outputs_at(objective, lambda s: w, [0]))), outputs)
    assert at(objective, w).value_and_gradient()[0] == pytest.approx(at(expected, w).value_and_gradient()[0], rel=1e-12)
    assert at(objective, w).value_and_gradient()[0] == pytest.approx(float(F.cross_entropy(outputs, Y)), rel=1e-12)


def test_what_leads_nowhere_stays_shared() -> None:
    model: Any = Plain()
    log: list[int] = []

    def noted(*_: object) -> None:
        log.append(1)

    model.register_forward_hook(noted)
    copied = copy_model(model)
    assert list(copied._forward_hooks.values()) == [noted]
    copied(X)
    assert log == [1]


def test_functions_that_share_a_variable_still_do() -> None:
    calls = 0
    model: Any = Plain()

    def up() -> int:
        nonlocal calls, model
        calls += 1
        return len(list(model.children()))

    def count() -> int:
        return calls + 0 * len(list(model.children()))

    model.up, model.count = up, count
    copied: Any = deep_copy(model, {})
    assert copied.up() == 2
    assert copied.count() == count() == 1  # a number leads nowhere, so its variable is shared with the original
    assert copied.up.__closure__[1].cell_contents is copied


class Slotted:
    __slots__ = ("model",)

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Any:
        return self.model.b(torch.tanh(self.model.a(x)))


class UsesGlobal(Plain):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = OTHER.b(torch.tanh(self.a(x)))
        return out


OTHER = UsesGlobal()


def proxied(m: Any) -> None:
    proxy = weakref.proxy(m)
    m.forward = lambda x: proxy.b(torch.tanh(proxy.a(x)))


def slotted(m: Any) -> None:
    held = Slotted(m)
    m.forward = lambda x: held(x)


def cached(m: Any) -> None:
    m.forward = functools.lru_cache(lambda x: m.b(torch.tanh(m.a(x))))


def iterated(m: Any) -> None:
    modules = iter([m.b] * 1000)
    m.forward = lambda x: next(modules)(torch.tanh(m.a(x)))


def without_derivatives(m: Any) -> None:
    m.register_forward_hook(functools.lru_cache(lambda module, args, out: out + m.b.bias.detach()))


@pytest.mark.parametrize("dtype", [None, torch.float64])
@pytest.mark.parametrize("way", [proxied, slotted, cached, iterated, without_derivatives])
def test_what_cannot_be_copied_is_refused(way: Callable[[Any], None], dtype: torch.dtype | None) -> None:
    model = Plain()
    way(model)
    with pytest.raises(ObjectiveError, match=r"still computes with '[ab]\.\w+' of the given network"):
        make_objective(model, F.cross_entropy, (X, Y), dtype=dtype)


def test_a_class_that_uses_a_global_network_is_refused() -> None:
    with pytest.raises(ObjectiveError, match=r"still computes with 'b\.weight' of the given network"):
        make_objective(OTHER, F.cross_entropy, (X, Y))


def test_another_network_stays_a_constant() -> None:
    teacher = nn.Linear(4, 4)
    model: Any = Plain()
    model.forward = lambda x: model.b(torch.tanh(teacher(model.a(x))))
    objective = make_objective(model, F.cross_entropy, (X, Y))
    assert objective.size == 39
    assert torch.isfinite(dense(hessian(objective))).all()
