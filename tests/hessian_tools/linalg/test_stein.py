"""Tests of Stein's estimates of a Hessian: closed forms of one variable, and sums over draws in NumPy."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from draws import normal, seeded
from scipy import integrate, stats
from torch import Tensor

from hessian_tools.linalg.mean_interval import mean_interval
from hessian_tools.linalg.stein import SteinHessian, covariances, line_steps, radii, shrunk

pytestmark = pytest.mark.usefixtures("one_thread")


def second_differences(f: object, t: Tensor) -> Tensor:
    assert callable(f)
    result: Tensor = (f(t) + f(-t) - 2 * f(torch.zeros_like(t))) / 2
    return result


# the second derivative at 0 of E f(x + z): f'' = E f(z) (z^2 - 1)
FUNCTIONS = {
    "square": (lambda t: t**2, 2.0),
    "quartic": (lambda t: t**4, 12.0),
    "odd": (lambda t: t**3 - t, 0.0),
    "near step": (lambda t: (t > 0.1).double(), 0.1 * stats.norm.pdf(0.1)),
    "far step": (lambda t: (t > 1.5).double(), 1.5 * stats.norm.pdf(1.5)),
    "stairs": (lambda t: torch.floor(3 * t), None),
    "cosine": (lambda t: torch.cos(t), -math.exp(-0.5)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("strata", [1, 4])
def test_steps_along_a_line_give_the_second_derivative_of_the_smoothed_function(name: str, strata: int) -> None:
    f, exact = FUNCTIONS[name]
    if exact is None:

        def integrand(t: float) -> float:
            return float(f(torch.tensor(t))) * (t * t - 1) * stats.norm.pdf(t)

        edges = np.arange(-24, 25) / 3
        exact = sum(integrate.quad(integrand, a, b)[0] for a, b in pairwise(edges))
    t, weights = line_steps(40_000, strata, seeded(1))
    values = (weights * second_differences(f, t)).mean(1)
    assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / 200 + 1e-9
    assert t.shape == weights.shape == (40_000, strata)
    assert float(t.min()) > 0


def test_the_steps_follow_their_density() -> None:
    t, _ = line_steps(5000, 4, seeded(2))

    def density(r: float) -> float:
        return r * abs(r * r - 1) * math.exp(-r * r / 2)

    mass = integrate.quad(density, 0, 1)[0] + integrate.quad(density, 1, 40)[0]
    for r in (0.3, 0.8, 1.0, 1.7, 2.5):
        below = integrate.quad(density, 0, r, points=[min(1.0, r)])[0] / mass
        assert float((t < r).double().mean()) == pytest.approx(below, abs=0.01)
    # of four steps, one is in every quarter of the distribution
    middle = np.quantile(t.numpy().ravel(), [0.25, 0.5, 0.75])
    places = np.searchsorted(middle, t.numpy())
    assert np.mean(places == np.arange(4)) > 0.97


def test_importance_and_strata_reduce_the_variance_of_a_square() -> None:
    plain = normal(20_000, seed=3)
    spread = float((plain.square() * (plain.square() - 1) / 2).std())  # 4.3, as t^2 (t^2 - 1) / 2 has
    one, two, four = (
        float((w * t.square() / 2).mean(1).std()) for t, w in (line_steps(20_000, m, seeded(4)) for m in (1, 2, 4))
    )
    assert spread > 4
    assert one < spread / 6  # the square of this, about 50, is what the variance gains
    assert two < 0.55 * one
    assert four < 0.5 * two


@pytest.mark.parametrize("size", [1, 7, 10_000, 10**7])
def test_lengths_of_normal_vectors_give_covariances_with_their_squares(size: int) -> None:
    r, weights = radii(size, 40_000, seeded(5))
    for f, exact in (
        (lambda r: r.square() - size, 2 * size),  # the variance of a chi^2
        (lambda r: torch.ones_like(r), 0.0),
        (lambda r: (r.square() > size).double(), size * 2 * stats.chi2.pdf(size, size)),
    ):
        values = (weights * f(r)).mean(1)
        error = 4 * float(values.std()) / 200
        assert abs(float(values.mean()) - exact) < error + 1e-9 * size
    spread = float((weights * (r.square() - size)).mean(1).std())
    assert spread < (0.8 if size > 1 else 1.6) * 2 * size  # sqrt(2) or more without importance sampling


def drawn(k: int, groups: int, size: int) -> Tensor:
    return torch.stack([normal(size, seed=1000 * k + b) for b in range(groups)])


def sample(count: int = 7, groups: int = 2, size: int = 5) -> tuple[Tensor, Tensor, np.ndarray]:
    """Differences, weights, and the estimate as a plain sum over draws in NumPy."""
    c = normal(count, groups, seed=9).exp()
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)[:groups]
    weights = weights / weights.sum()
    exact = np.zeros((size, size))
    for b in range(groups):
        z = np.stack([drawn(k, groups, size)[b].numpy() for k in range(count)])
        products = np.einsum("ki,kj->kij", z, z)
        centred = products - products.mean(0)
        exact += float(weights[b]) * np.einsum("k,kij->ij", c[:, b].numpy(), centred) / (count - 1)
    return c, weights, exact


def test_the_operator_is_the_sample_covariance() -> None:
    c, weights, exact = sample()
    for memory in (0.0, 1e6):
        op = SteinHessian(c, weights, lambda k: drawn(k, 2, 5), 5, torch.float64, torch.device("cpu"), memory=memory)
        op._step = 3  # several blocks
        for _ in range(2):  # the second time from what was kept
            np.testing.assert_allclose((op @ torch.eye(5, dtype=torch.float64)).numpy(), exact, rtol=1e-12, atol=1e-12)
    v = normal(5, seed=2)
    found, _ = op.product(v)
    np.testing.assert_allclose(found.numpy(), exact @ v.numpy(), rtol=1e-12)
    diagonal = covariances(c, torch.stack([drawn(k, 2, 5)[:, 1] for k in range(7)]).square(), weights)
    assert float(diagonal.mean()) == pytest.approx(exact[1, 1])


def test_with_the_hessian_itself_as_a_control_nothing_is_left_to_chance() -> None:
    a = normal(6, 6, seed=5)
    a = a + a.T
    z = torch.stack([drawn(k, 1, 6) for k in range(4)])
    c = torch.einsum("kbi,ij,kbj->kb", z, a, z) / 2
    left = c - torch.einsum("kbi,ij,kbj->kb", z, a, z) / 2
    op = SteinHessian(
        left, torch.ones(1, dtype=torch.float64), lambda k: z[k], 6, torch.float64, torch.device("cpu"), lambda v: a @ v
    )
    np.testing.assert_allclose((op @ torch.eye(6, dtype=torch.float64)).numpy(), a.numpy(), atol=1e-12)
    assert float(op.residual_variances) == 0


def test_a_control_leaves_the_mean_and_takes_the_variance() -> None:
    a = torch.diag(torch.tensor([4.0, 1.0, 0.5, 0.0], dtype=torch.float64))
    s = torch.diag(torch.tensor([3.5, 0.0, 0.0, 1.0], dtype=torch.float64))
    found: dict[bool, list[np.ndarray]] = {False: [], True: []}
    for seed in range(400):
        z = normal(20, 1, 4, seed=seed)
        c = torch.einsum("kbi,ij,kbj->kb", z, a, z) / 2
        for controlled in found:
            left = c - torch.einsum("kbi,ij,kbj->kb", z, s, z) / 2 if controlled else c
            control = (lambda v: s @ v) if controlled else None
            one = torch.ones(1, dtype=torch.float64)
            op = SteinHessian(left, one, lambda k, z=z: z[k], 4, torch.float64, torch.device("cpu"), control)
            found[controlled].append((op @ torch.eye(4, dtype=torch.float64)).numpy())
    for controlled, matrices in found.items():
        error = np.std(matrices, 0) / 20
        assert np.all(np.abs(np.mean(matrices, 0) - a.numpy()) < 4 * error + 1e-12), controlled
    # ||A - S||_F^2 is 2.5, and ||A||_F^2 is 17.25; the smallest entries have a noise of their own
    assert np.var(found[True], 0)[1, 2] < 0.5 * np.var(found[False], 0)[1, 2]
    assert np.var(found[True], 0)[0, 0] < 0.1 * np.var(found[False], 0)[0, 0]


def test_errors_of_a_product_and_intervals_of_covariances_cover() -> None:
    """Normal, and heavy tails: the exponential of a quadratic form."""
    a = np.diag([3.0, 1.0, -0.5])
    for heavy, least in ((False, 0.9), (True, 0.86)):
        hits = inside = 0
        if heavy:  # f = exp(0.3 z_0 + 0.2 z_1): E f = exp(0.065), and its Hessian is E f times g g'
            g = np.array([0.9, 0.6, 0.0])
            a = math.exp(g @ g / 2) * np.outer(g, g)
        for seed in range(300):
            z = normal(60, 1, 3, seed=seed + 7)
            along = z @ torch.from_numpy(g) if heavy else torch.empty(0)
            c = along.cosh() if heavy else torch.einsum("kbi,ij,kbj->kb", z, torch.from_numpy(a), z) / 2
            one = torch.ones(1, dtype=torch.float64)
            op = SteinHessian(c, one, lambda k, z=z: z[k], 3, torch.float64, torch.device("cpu"))
            v = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
            mean, error = op.product(v)
            hits += int(abs(float(mean[0]) - a[0, 0]) < 2 * float(error[0]))
            low, high = mean_interval(covariances(c, z[..., 0].square(), one))
            inside += int(low <= a[0, 0] <= high)
        assert hits / 300 > (0.68 if heavy else 0.78)  # two standard errors, without a correction for skewness
        assert inside / 300 > least


def test_a_constant_in_the_differences_adds_no_noise() -> None:
    c, y = normal(50, 2, seed=1), normal(50, 2, seed=2).square()
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    torch.testing.assert_close(covariances(c + 100, y, weights), covariances(c, y, weights))
    torch.testing.assert_close(covariances(c, y + 100, weights), covariances(c, y, weights))


def test_a_single_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 draws, not 1"):
        SteinHessian(torch.ones(1, 1), torch.ones(1), lambda k: torch.ones(1, 3), 3, torch.float64, torch.device("cpu"))


def test_eigenvalues_of_a_noisy_matrix_are_shrunk_to_the_forms_of_their_vectors() -> None:
    size, noise = 400, 0.05
    spikes = torch.tensor([4.0, -3.0, 0.6], dtype=torch.float64)  # the last is below the threshold of 1
    h = torch.zeros(size, size, dtype=torch.float64)
    h[:3, :3] = torch.diag(spikes)
    wigner = normal(size, size, seed=3)
    values, vectors = torch.linalg.eigh(h + noise * (wigner + wigner.T) / math.sqrt(2))
    forms = (vectors * (h @ vectors)).sum(0)
    guess = shrunk(values, noise * math.sqrt(size))
    assert float(guess[-1]) == pytest.approx(float(forms[-1]), rel=0.05)
    assert float(guess[0]) == pytest.approx(float(forms[0]), rel=0.05)
    assert int((guess != 0).sum()) <= 4  # the edge of the noise moves a little
    assert shrunk(torch.tensor([2.0, -0.5]), 0.0).tolist() == [2.0, -0.5]
    assert shrunk(torch.zeros(1), 0.0).tolist() == [0.0]
