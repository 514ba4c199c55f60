"""Tests of inputs that are dicts or tuples of tensors, against dense float64 double backward of the same network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from draws import seeded
from torch import Tensor, nn

from hessian_tools import nested
from hessian_tools.checks import ObjectiveError
from hessian_tools.objective import make_objective
from hessian_tools.operators.curvature import hessian
from hessian_tools.perturbation import outputs_at

A = torch.randn(9, 4, dtype=torch.float64, generator=seeded(1))
B = torch.randn(9, 3, dtype=torch.float64, generator=seeded(2))
Y = torch.randint(0, 3, (9,), generator=seeded(3))
TOKENS = torch.randint(0, 5, (9, 6), generator=seeded(4))


class Two(nn.Module):
    """Takes its inputs as two arguments."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 5), nn.Linear(3, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(a)) * torch.tanh(self.b(b)))


class Pair(Two):
    """Takes its inputs as one tuple."""

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(*pair)


class Record(Two):
    """Takes its inputs as one dict."""

    def forward(self, record: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(record["a"], record["b"])


class Bert(nn.Module):
    """Takes keyword arguments, one of which is not given, as networks of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        assert attention_mask is not None
        mask = attention_mask[..., None]
        return self.out(torch.tanh((self.embed(input_ids) * mask).sum(1) / mask.sum(1)))


CASES: dict[str, tuple[nn.Module, Any, Any]] = {
    "two arguments": (Two(), (A, B), lambda net: net(A, B)),
    "list": (Two(), [A, B], lambda net: net(A, B)),
    "keywords": (Two(), {"b": B, "a": A}, lambda net: net(A, B)),
    "one tuple": (Pair(), (A, B), lambda net: net((A, B))),
    "one dict": (Record(), {"a": A, "b": B}, lambda net: net({"a": A, "b": B})),
    "Hugging Face": (
        Bert(),
        {"input_ids": TOKENS, "attention_mask": (TOKENS > 0).long() + (TOKENS == TOKENS[:, :1]).long()},
        lambda net: net(TOKENS, (TOKENS > 0).long() + (TOKENS == TOKENS[:, :1]).long()),
    ),
}


def dense(net: nn.Module, run: Any) -> Tensor:
    p = list(net.parameters())
    loss = nn.functional.cross_entropy(run(net), Y)
    g = torch.cat([t.flatten() for t in torch.autograd.grad(loss, p, create_graph=True)])
    rows = [torch.autograd.grad(e, p, retain_graph=True, allow_unused=True, materialize_grads=True) for e in g]
    return torch.stack([torch.cat([t.flatten() for t in row]) for row in rows])


@pytest.mark.parametrize("batches", ["one", "sizes of 4", "sequence"])
@pytest.mark.parametrize("case", CASES)
def test_the_hessian_is_that_of_double_backward(case: str, batches: str) -> None:
    net, x, run = CASES[case]
    net = net.double()
    data: Any = (x, Y)
    if batches == "sequence":
        data = [(nested.selected(x, slice(0, 2)), Y[:2]), (nested.selected(x, slice(2, 9)), Y[2:])]
    objective = make_objective(
        net, nn.functional.cross_entropy, data, batch_size=4 if batches.startswith("sizes") else None
    )
    expected = dense(net, run)
    found = hessian(objective) @ torch.eye(objective.size, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    (outputs,) = outputs_at(objective, lambda w: w, [objective.weights()])
    torch.testing.assert_close(outputs, run(net).detach())
    mixed = objective.regrouped([torch.tensor([8, 0]), torch.arange(1, 8)])
    torch.testing.assert_close(hessian(mixed) @ expected, expected @ expected, rtol=1e-8, atol=1e-12)


class Coupled(Two):
    """Centres its second input over the batch."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return super().forward(a, b - b.mean(0))


class Fixed(Two):
    """Uses its second input in the order of the batch, whatever the first one is."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return super().forward(a, b.flip(0))


@pytest.mark.parametrize("net", [Coupled(), Fixed()])
def test_coupling_through_any_input_is_refused(net: nn.Module) -> None:
    with pytest.raises(ObjectiveError, match="depends on"):
        make_objective(net.double(), nn.functional.cross_entropy, ((A, B), Y))


def test_inputs_with_other_numbers_of_samples_are_refused() -> None:
    for x in ((A, B[:5]), {"a": A[:8], "b": B[:8]}, {}):
        with pytest.raises(ValueError, match=r"first axis|8 inputs but 9 targets"):
            make_objective(Two().double(), nn.functional.cross_entropy, (x, Y))


def test_values_that_are_no_tensors_stay() -> None:
    x = {"a": A, "flag": True, "none": None, "b": [B, B]}
    parts = [nested.selected(x, slice(0, 4)), nested.selected(x, torch.arange(4, 9))]
    again = nested.joined(parts)
    assert again["flag"] is True
    assert again["none"] is None
    assert torch.equal(again["b"][1], B)
    assert nested.sample_count(x) == 9
