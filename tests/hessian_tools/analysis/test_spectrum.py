"""Tests of the whole spectral analysis on networks that are small enough for a dense reference."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from objectives import spiking_network, trained_smooth
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from hessian_tools.analysis.context import AnalysisError
from hessian_tools.analysis.operator_spectrum.eigenvectors import layer_shares
from hessian_tools.analysis.settings import SpectrumSettings
from hessian_tools.analysis.spectrum import spectrum
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.base import dense
from hessian_tools.operators.curvature import ggn, hessian
from hessian_tools.perturbation import filter_norms, noise
from hessian_tools.results.operator_spectrum import Spectrum
from hessian_tools.results.spectrum import SpectrumResult
from ikun.losses import LOSSES
from ikun.networks import Network
from ikun_hessian.reports.spectrum import spectrum_lines


def network(**changes: Any) -> Network:
    return spiking_network(5, **{"model": "csnn", "channels": 2, "input_shape": (1, 4, 4), **changes}).eval()


def objective(net: nn.Module | None = None, samples: int = 64, dtype: torch.dtype = torch.float64) -> Objective:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(samples, 1, 4, 4, generator=generator)
    y = torch.randint(0, 3, (samples,), generator=generator)
    return make_objective(net or network(), LOSSES["mse"], (x, y), batch_size=24, dtype=dtype)


SMALL = SpectrumSettings(top=4, smallest=3, steps=15, probes=2, trace_probes=8)


def numbers(result: SpectrumResult) -> list[float]:
    found = []
    for s in result.spectra.values():
        found += [v for p in (*s.eigenvalues, *s.smallest_eigenvalues) for v in (p.value, p.residual, p.data_stderr)]
        found += [s.scale_free_lambda_max, s.frobenius_norm]
        if s.trace is not None:
            found += [s.trace.estimate, s.trace.stderr, s.trace.data_stderr]
        if s.density is not None:
            found += [x for nodes in s.density.nodes for x in nodes]
    return found


def test_the_spectrum_agrees_with_the_dense_matrices() -> None:
    target = objective()
    result = spectrum(target, SMALL)
    for name, factory in (("hessian", hessian), ("ggn", ggn)):
        matrix = dense(factory(target))
        exact, vectors = torch.linalg.eigh(matrix)
        found: Spectrum = result.spectra[name]
        values = torch.tensor([p.value for p in found.eigenvalues])
        torch.testing.assert_close(values, exact.flip(0)[:4].float(), rtol=1e-6, atol=1e-9)
        assert all(p.converged and p.residual <= 1e-4 * exact.abs().max() for p in found.eigenvalues)
        assert found.trace is not None
        assert abs(found.trace.estimate - matrix.trace()) <= 6 * found.trace.stderr
        d = filter_norms(target)
        assert found.scale_free_lambda_max == pytest.approx(
            float(torch.linalg.eigvalsh(d[:, None] * matrix * d)[-1]), rel=1e-4
        )
        shares = layer_shares(target, vectors[:, -1:])[0]
        assert sum(found.eigenvalues[0].layers.values()) == pytest.approx(1)
        for layer, share in found.eigenvalues[0].layers.items():
            assert share == pytest.approx(shares[layer], abs=1e-3)
    low = [p.value for p in result.spectra["hessian"].smallest_eigenvalues]
    torch.testing.assert_close(
        torch.tensor(low), torch.linalg.eigvalsh(dense(hessian(target)))[:3].float(), rtol=1e-6, atol=1e-9
    )
    assert result.spectra["ggn"].smallest_eigenvalues == ()
    value, gradient = target.value_and_gradient()
    assert result.loss == value
    assert result.gradient_norm == pytest.approx(float(gradient.norm()))
    assert result.num_parameters == target.size == sum(result.parameters.values())


def test_the_same_seed_gives_the_same_numbers() -> None:
    one, two = (spectrum(objective(dtype=torch.float32), SMALL) for _ in range(2))
    assert numbers(one) == numbers(two)
    other = spectrum(objective(dtype=torch.float32), dataclasses.replace(SMALL, seed=1))
    assert numbers(other) != numbers(one)
    assert other.spectra["hessian"].eigenvalues[0].value == pytest.approx(
        one.spectra["hessian"].eigenvalues[0].value, rel=1e-4
    )


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scaling_the_loss_scales_every_number(scale: float) -> None:
    base = objective()
    other = dataclasses.replace(base, loss=lambda o, t: scale * LOSSES["mse"](o, t))
    a, b = numbers(spectrum(base, SMALL)), numbers(spectrum(other, SMALL))
    top = max(abs(v) for v in a)
    assert len(a) == len(b)
    assert max(abs(x - y / scale) for x, y in zip(a, b, strict=True)) <= 1e-8 * top


def test_sensitivity_is_the_variants_lambda_max() -> None:
    steep = objective(network(surrogate="atan:4"))
    result = spectrum(objective(), SMALL, variants={"slope x 2": steep})
    exact = float(torch.linalg.eigvalsh(dense(hessian(steep)))[-1])
    assert result.sensitivity["slope x 2"] == pytest.approx(exact, rel=1e-3)


def test_relaxed_operator_needs_its_objective() -> None:
    settings = dataclasses.replace(SMALL, operators=("relaxed",))
    with pytest.raises(ValueError, match="relaxed"):
        spectrum(objective(), settings)
    relaxed = objective(network(relaxed=True))
    found = spectrum(objective(), settings, relaxed=relaxed).spectra["relaxed"]
    assert found.eigenvalues[0].value == pytest.approx(
        float(torch.linalg.eigvalsh(dense(hessian(relaxed)))[-1]), rel=1e-6
    )


def test_scaled_eigenvalues_are_those_of_the_dense_matrix() -> None:
    target = objective()
    d = filter_norms(target)
    result = spectrum(target, dataclasses.replace(SMALL, scaled=6, tol=1e-6))
    for name, factory in (("hessian", hessian), ("ggn", ggn)):
        exact = torch.linalg.eigvalsh(d[:, None] * dense(factory(target)) * d).flip(0)[:6]
        torch.testing.assert_close(torch.tensor(result.spectra[name].scale_free), exact.float(), rtol=1e-5, atol=1e-9)
    told = "\n".join(spectrum_lines(result))
    assert f"largest 6: {result.spectra['hessian'].scale_free[0]:.4g}" in told
    assert spectrum(target, SMALL).spectra["hessian"].scale_free == ()


def test_scale_free_lambda_max_ignores_the_scale_before_a_batchnorm() -> None:
    """Weights before a BatchNorm x 0.1 (running statistics following) leave the function as it is, not lambda_max."""
    net = network(norm="bn")
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps = 0.0
            m.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
    first = spectrum(objective(net), SMALL)
    with torch.no_grad():
        net.get_parameter("conv1.weight").mul_(0.1)
        net.get_buffer("norm1.running_mean").mul_(0.1)
        net.get_buffer("norm1.running_var").mul_(0.01)
    second = spectrum(objective(net), SMALL)
    assert second.loss == pytest.approx(first.loss)
    one, two = first.spectra["hessian"], second.spectra["hessian"]
    assert two.scale_free_lambda_max == pytest.approx(one.scale_free_lambda_max, rel=2e-3)
    assert abs(two.eigenvalues[0].value / one.eigenvalues[0].value - 1) > 0.05


@pytest.mark.slow
def test_the_data_error_is_the_spread_over_disjoint_samples() -> None:
    """The printed data stderr of lambda_max and the trace against their spread over 20 independent sets of samples."""
    net = network(norm="none")
    generator = torch.Generator().manual_seed(3)
    settings = SpectrumSettings(operators=("ggn",), top=2, smallest=0, density=False, trace_probes=8)
    tops, traces, top_errors, trace_errors = [], [], [], []
    for _ in range(20):
        x = torch.rand(96, 1, 4, 4, generator=generator)
        y = torch.randint(0, 3, (96,), generator=generator)
        target = make_objective(net, LOSSES["mse"], (x, y), dtype=torch.float64)
        found = spectrum(target, settings).spectra["ggn"]
        assert found.trace is not None
        tops.append(found.eigenvalues[0].value)
        top_errors.append(found.eigenvalues[0].data_stderr)
        traces.append(float(dense(ggn(target)).trace()))
        trace_errors.append(found.trace.data_stderr)
    for values, errors in ((tops, top_errors), (traces, trace_errors)):
        spread = torch.tensor(values).std().item()
        told = torch.tensor(errors)[torch.tensor(errors).isfinite()]  # with 96 samples some are withheld
        assert len(told) >= 10
        assert 0.5 <= told.mean().item() / spread <= 2


def test_one_sample_has_no_error_and_says_so() -> None:
    result = spectrum(objective(samples=1), SMALL)
    assert result.spectra["hessian"].eigenvalues[0].data_stderr != result.spectra["hessian"].eigenvalues[0].data_stderr
    assert any("A single sample" in w for w in result.warnings)


def test_a_zero_hessian_is_reported() -> None:
    dead = network(norm="none", surrogate="rect:0.01")
    with torch.no_grad():
        for p in dead.parameters():
            p.zero_()
    result = spectrum(objective(dead), SMALL)
    assert result.spectra["hessian"].eigenvalues[0].value == 0
    assert any("is zero" in w for w in result.warnings)


def test_nan_loss_is_refused() -> None:
    target = dataclasses.replace(objective(), loss=lambda o, t: o.mean() * float("nan"))
    with pytest.raises(AnalysisError, match="not finite"):
        spectrum(target, SMALL)


def test_blocks_are_the_diagonal_blocks_of_the_layers() -> None:
    target = objective()
    result = spectrum(target, dataclasses.replace(SMALL, per_layer=True, operators=("hessian",)))
    matrix = dense(hessian(target))
    start = 0
    sizes = {"conv1": 18, "norm1": 4, "conv2": 36, "norm2": 4, "fc1": 64, "fc2": 96}
    assert list(result.blocks) == list(sizes)
    for layer, size in sizes.items():
        block = torch.linalg.eigvalsh(matrix[start : start + size, start : start + size])
        found = result.blocks[layer]
        for pairs, exact in ((found.eigenvalues, block.flip(0)), (found.smallest_eigenvalues, block)):
            for p, value in zip(pairs, exact.tolist(), strict=False):
                assert p.value == pytest.approx(value, rel=1e-4, abs=1e-6 * float(block.abs().max()) + 1e-12)
        start += size
    assert start == target.size


def test_fewer_parameters_than_eigenvalues_asked_for_are_all_measured() -> None:
    net = network()
    x, y = torch.rand(8, 1, 4, 4), torch.randint(0, 3, (8,))
    target = make_objective(net, LOSSES["mse"], (x, y), params="norm1.bias")
    result = spectrum(target, SpectrumSettings(steps=5))
    assert result.num_parameters == 2
    assert len(result.spectra["hessian"].eigenvalues) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operators": ("nonsense",)}, "unknown operator nonsense"),
        ({"operators": ()}, "no operator"),
        ({"top": 0}, "at least 1"),
        ({"tol": 0.0}, "tol"),
        ({"method": "qr"}, "method"),
        ({"backend": "pyhessian"}, "backend pyhessian"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpectrumSettings(**changes)  # type: ignore[arg-type]


# --- PyHessian as the independent reference


def test_pyhessian_and_the_power_method_agree_within_the_analysis() -> None:
    base = SpectrumSettings(operators=("hessian",), top=2, smallest=0, density=False)
    ours = spectrum(trained_smooth(), base).spectra["hessian"].eigenvalues[0]
    for changes in ({"method": "power"}, {"method": "power", "backend": "pyhessian"}):
        other = spectrum(trained_smooth(), dataclasses.replace(base, **changes)).spectra["hessian"]
        assert other.eigenvalues[0].value == pytest.approx(ours.value, rel=0.02)
        assert other.smallest_eigenvalues == ()


def test_the_rise_of_the_loss_is_that_of_the_disturbed_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(0, 3, (40,))
    target = make_objective(net, F.cross_entropy, (x, y))
    settings = SpectrumSettings(("ggn",), top=1, smallest=0, density=False, draws=4, seed=3)
    rise = spectrum(target, settings).loss_rise
    before, rises = F.cross_entropy(net(x), y), []
    for i in range(4):
        other, z = copy.deepcopy(net), noise(target, 3, i)
        with torch.no_grad():
            w = parameters_to_vector(net.parameters())
            vector_to_parameters(w + 0.1 * w.abs() * z, other.parameters())
            rises.append(float(F.cross_entropy(other(x), y) - before))
    assert rise is not None
    assert rise.estimate == pytest.approx(sum(rises) / 4, rel=1e-12)
    pairs = ((rises[0] + rises[1]) / 2, (rises[2] + rises[3]) / 2)
    assert rise.stderr == pytest.approx(abs(pairs[0] - pairs[1]) / 2, rel=1e-9)
    assert spectrum(target, dataclasses.replace(settings, draws=0)).loss_rise is None
