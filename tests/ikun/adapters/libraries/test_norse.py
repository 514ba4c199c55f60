"""Tests of networks of Norse against ours where the dynamics are the same."""

from __future__ import annotations

import functools
from typing import Any

import adapted_networks
import pytest
import torch
from adapted_networks import X, Y, products
from torch import nn

from hessian_tools.objective import make_objective
from hessian_tools.operators.base import symmetry_error
from hessian_tools.operators.curvature import hessian
from ikun.adapters import AdapterError, adapt
from ikun.adapters.validation import found_functions
from ikun.losses import LOSSES
from ikun.networks import Network, Spec
from ikun.surrogates import Surrogate, spike

norse = pytest.importorskip("norse.torch")

STEPS = 6


def heavy(net: nn.Module, gain: float = 30.0) -> nn.Module:
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                p.abs_().mul_(gain)
    return net


def cells(cell: Any = None, seed: int = 0, **parameters: Any) -> nn.Module:
    torch.manual_seed(seed)
    cell = cell or norse.LIFCell
    kind = norse.LIFBoxParameters if cell is norse.LIFBoxCell else norse.LIFParameters
    p = kind(**parameters)
    return norse.SequentialState(nn.Linear(5, 8, bias=False), cell(p), nn.Linear(8, 3, bias=False), cell(p))


objective_of = functools.partial(adapted_networks.objective_of, library="norse")


@pytest.mark.parametrize("replaced", [False, True])
def test_the_neuron_without_synapses_is_our_lif(replaced: bool) -> None:
    """dt / tau = 1/2 is our tau = 2; `tanh` with alpha 2 has the f' of ours. With another surrogate it is replaced."""
    rate = torch.tensor(500.0)
    theirs = heavy(cells(norse.LIFBoxCell, tau_mem_inv=rate, method="super" if replaced else "tanh", alpha=2.0), 3)
    ours = Network(
        Spec(
            model="mlp",
            input_shape=(1, 1, 5),
            hidden=(8,),
            classes=3,
            norm="none",
            neuron="lif",
            surrogate="tanh:2",
            timesteps=STEPS,
        )
    )
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        p.data.copy_(q.data)
    expected = make_objective(ours, LOSSES["mse"], (X.view(6, 1, 1, 5), Y), dtype=torch.float64)
    surrogate = (lambda x: spike(x, Surrogate.parse("tanh:2"))) if replaced else None
    found = objective_of(theirs, steps=STEPS, surrogate=surrogate)
    rates = expected.outputs(X.view(6, 1, 1, 5).double())
    torch.testing.assert_close(found.outputs(X.double()), rates)
    assert 0.05 < rates.mean() < 0.9
    matrix = products(expected)
    assert (products(found) - matrix).norm() < 1e-11 * matrix.norm()


def test_cells_and_layers_over_time_agree() -> None:
    over_time = heavy(cells())
    lifted = norse.SequentialState(
        norse.Lift(over_time[0]), norse.LIF(over_time[1].p), norse.Lift(over_time[2]), norse.LIF(over_time[3].p)
    )
    one, other = objective_of(over_time, steps=STEPS), objective_of(lifted, steps=STEPS)
    assert one.outputs(X.double()).mean() > 0
    torch.testing.assert_close(products(one), products(other), rtol=1e-9, atol=1e-14)


def test_the_users_step_functions_are_left_alone() -> None:
    net = heavy(cells())
    before = net[1].activation
    adapted = adapt(net, X, steps=STEPS, surrogate=lambda x: spike(x, Surrogate.parse("atan:2")))
    assert net[1].activation is before
    assert adapted.model.network[1].activation is not before  # type: ignore[union-attr, index]
    assert [found.label for found in adapted.surrogates] == ["super, alpha 100"] * 2


@pytest.mark.parametrize("name", ["LIFRecurrentCell", "LSNNRecurrentCell", "LIFAdExCell", "LIFRefracCell"])
def test_other_neurons_give_a_symmetric_hessian(name: str) -> None:
    torch.manual_seed(0)
    first = [getattr(norse, name)(5, 8)] if "Recurrent" in name else [nn.Linear(5, 8), getattr(norse, name)()]
    net = heavy(norse.SequentialState(*first, nn.Linear(8, 3), norse.LICell()))
    adapted = adapt(net, X, steps=STEPS)
    assert not found_functions(adapted.model(X))  # every threshold, also of functions called by functions, is ours
    op = hessian(objective_of(net, steps=STEPS))
    assert symmetry_error(op, torch.Generator().manual_seed(0)) < 1e-12
    assert (op @ torch.ones(op.shape[0])).abs().max() > 0
    hooks = [line for line in adapted.warnings if "gradient hooks (of 0.recurrent_weights) are not copied" in line]
    assert len(hooks) == ("Recurrent" in name)


def test_no_surrogate_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"heaviside, alpha 100 \('1.activation'\): it has no derivative at all"):
        adapt(heavy(cells(method="heaviside")), X, steps=STEPS)


def test_the_membrane_is_the_output_of_a_leaky_integrator() -> None:
    with pytest.raises(AdapterError, match="the network returns"):
        adapt(heavy(cells()), X, steps=STEPS, output="membrane")
