"""Tests of the exact GGN diagonal, of diagonals in an analysis, and of traces per time step, against dense matrices.

The dense matrices are J^T H J with the Jacobian by torch.autograd.functional and H in closed form.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from hessian_tools.analysis.operator_spectrum.jacobian_diagonal import jacobian_diagonal, rows_needed
from hessian_tools.analysis.operator_spectrum.step_traces import mean_over_steps, step_forms, step_traces
from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.analysis.spectrum import spectrum
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import hessian
from hessian_tools.results.spectrum import load_spectrum, save_spectrum
from ikun.losses import LOSSES
from ikun.networks import Network, OverTime, Spec

N, T, K = 9, 3, 4
SPEC = Spec(model="mlp", hidden=(5,), input_shape=(1, 2, 3), classes=K, timesteps=T, neuron="plif", norm="bn")


def objective(loss: str = "mse", over_time: bool = False, batch_size: int = 4) -> Objective:
    torch.manual_seed(1)
    net: Network = Network(SPEC).double()
    for _ in range(3):
        net(torch.rand(20, 1, 2, 3).double() * 2)  # running statistics
    torch.manual_seed(2)
    x, y = torch.rand(N, 1, 2, 3).double() * 3, torch.randint(0, K, (N,))
    model, function = (OverTime(net), mean_over_steps(LOSSES[loss])) if over_time else (net, LOSSES[loss])
    return make_objective(model, function, (x, y), batch_size=batch_size)


def whole(o: Objective) -> tuple[Tensor, Tensor]:
    x, y = (torch.cat(part) for part in zip(*o.batches, strict=True))
    return x, y


def jacobian(o: Objective) -> Tensor:
    """J [outputs..., P], step by step in plain torch."""
    x, _ = whole(o)

    def outputs(w: Tensor) -> Tensor:
        named = dict(zip(o.parameters, o.split(w), strict=True))
        out: Tensor = torch.func.functional_call(o.model, named, (x,), {"plain": True})
        return out

    found: Tensor = torch.autograd.functional.jacobian(outputs, o.weights())
    return found


def curvature(o: Objective, loss: str, outputs: Tensor) -> Tensor:
    """H [N, K, K] of each sample's loss at the outputs [N, K]."""
    if loss == "mse":
        return (2 / K * torch.eye(K, dtype=torch.float64)).expand(len(outputs), K, K)
    p = outputs.softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_the_jacobian_gives_the_diagonal_of_the_ggn(loss: str) -> None:
    o = objective(loss)
    j, h = jacobian(o), curvature(o, loss, o.outputs(whole(o)[0]))
    each = torch.einsum("nkp,nkl,nlp->np", j, h, j)
    values, stderr = jacobian_diagonal(o)
    torch.testing.assert_close(values, each.mean(0), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(stderr, each.std(0) / N**0.5, rtol=1e-6, atol=1e-14)
    assert rows_needed(o) == N * K
    again, _ = jacobian_diagonal(objective(loss, batch_size=9))
    torch.testing.assert_close(again, values, rtol=1e-12, atol=1e-16)


def test_one_sample_has_no_standard_error_and_no_curvature_is_zero() -> None:
    o = objective()
    one = o.regrouped([torch.tensor([0])])
    values, stderr = jacobian_diagonal(one)
    assert bool(values.any())
    assert bool(stderr.isnan().all())
    flat = make_objective(nn.Linear(2, 1).double(), lambda out, y: out.mean(), (torch.rand(3, 2), torch.zeros(3)))
    assert not jacobian_diagonal(flat)[0].any()


SETTINGS = SpectrumSettings(top=2, smallest=1, density=False, trace_probes=24, diagonal=True, diagonal_probes=30)


def test_an_analysis_has_the_diagonals_with_their_errors(tmp_path: Path) -> None:
    """Exact for the GGN, estimated for the Hessian, exact for both with as many probes as parameters."""
    o = objective()
    truth = dense(hessian(o)).diagonal()
    result = spectrum(o, SETTINGS)
    save_spectrum(result, tmp_path / "a")
    arrays = np.load(tmp_path / "a.npz")
    shapes = {name: tuple(p.shape) for name, p in o.parameters.items()}

    def flat(name: str, part: str = "") -> Tensor:
        found = [arrays[f"{name}.diagonal.{parameter}{part}"] for parameter in shapes]
        assert [a.shape for a in found] == list(shapes.values())
        return torch.from_numpy(np.concatenate([a.ravel() for a in found]))

    torch.testing.assert_close(flat("ggn"), jacobian_diagonal(o)[0])
    torch.testing.assert_close(flat("ggn", ".data_stderr"), jacobian_diagonal(o)[1])
    assert not flat("ggn", ".stderr").any()
    inside = (flat("hessian") - truth).abs() <= float(stats.t.ppf(0.975, 29)) * flat("hessian", ".stderr") + 1e-12
    assert 0.85 <= float(inside.double().mean())  # the entries of one estimate are correlated
    assert bool(flat("hessian", ".data_stderr").isnan().all())
    found = {name: s.diagonal for name, s in load_spectrum(tmp_path / "a.json").spectra.items()}
    assert [(d.method, d.products, d.entries) for d in found.values() if d] == [
        ("probes", 30, None),
        ("Jacobian", N * K, None),
    ]
    everything = spectrum(o, dataclasses.replace(SETTINGS, diagonal_probes=1000))
    for name, values in (("hessian", truth), ("ggn", jacobian_diagonal(o)[0])):
        diagonal = everything.spectra[name].diagonal
        assert diagonal is not None
        assert diagonal.entries is not None
        assert (diagonal.method, diagonal.products) == ("unit vectors", o.size)
        column = np.concatenate([a[0].ravel() for a in diagonal.entries.values()])
        np.testing.assert_allclose(column, values.numpy(), rtol=1e-9, atol=1e-13)
    assert "entries" not in json.dumps(json.loads((tmp_path / "a.json").read_text())["spectra"]["ggn"]["diagonal"])


# --- time steps


def dense_steps(o: Objective, loss: str) -> Tensor:
    """G_t [T, P, P]."""
    j, outputs = jacobian(o), o.outputs(whole(o)[0])  # [N, T, K, P], [N, T, K]
    h = torch.stack([curvature(o, loss, outputs[:, t]) for t in range(T)], 1)
    return torch.einsum("ntkp,ntkl,ntlq->tpq", j, h, j) / N


@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_forms_are_those_of_the_dense_ggn_of_every_step(loss: str) -> None:
    o = objective(loss, over_time=True)
    g = dense_steps(o, loss)
    found = step_forms(o, 6, torch.Generator().manual_seed(3))
    signs = 2.0 * torch.randint(0, 2, (6, o.size), generator=torch.Generator().manual_seed(3), dtype=torch.int8) - 1
    v = signs.double()
    torch.testing.assert_close(found["forms"], torch.einsum("np,tpq,nq->nt", v, g, v), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(found["samples"].mean(0), found["forms"].mean(0))
    x, y = whole(o)
    losses = [float(LOSSES[loss](o.outputs(x).detach()[:, t], y)) for t in range(T)]
    assert found["losses"].tolist() == pytest.approx(losses, rel=1e-12)


def test_traces_per_step_cover_the_dense_traces() -> None:
    o = objective("ce", over_time=True)
    truth = dense_steps(o, "ce").diagonal(dim1=1, dim2=2).sum(1)
    inside = []
    for seed in range(30):
        traces = step_traces(step_forms(o, 24, torch.Generator().manual_seed(seed)))
        assert [s.step for s in traces] == [1, 2, 3]
        inside += [s.trace.ci95[0] <= value <= s.trace.ci95[1] for s, value in zip(traces, truth, strict=True)]
    assert sum(inside) / len(inside) >= 0.9


def test_an_analysis_has_the_traces_per_step(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, diagonal=False, per_step=True)
    result = spectrum(objective(), settings, over_time=objective(over_time=True))
    assert [s.step for s in result.steps] == [1, 2, 3]
    save_spectrum(result, tmp_path / "a")
    assert load_spectrum(tmp_path / "a.json").steps == result.steps
    with pytest.raises(ValueError, match="set over_time"):
        spectrum(objective(), settings)


def test_other_outputs_and_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="need outputs over time"):
        step_forms(objective(), 3, torch.Generator())
    o = objective(over_time=True)
    last = dataclasses.replace(o, loss=lambda out, y: (out.sum(1) - 5).square().mean())
    with pytest.raises(ValueError, match="the mean of the losses of single steps"):
        step_forms(last, 3, torch.Generator())
