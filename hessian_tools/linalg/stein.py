"""Unbiased estimates of the Hessian of a Gaussian-smoothed function from values of the function only.

For a function f on R^P, which may be discontinuous, and z standard normal, the smoothed function f_s(x) = E f(x + s z)
has derivatives of every order. Stein's identity gives its Hessian H from values of f (Stein 1981; Erdogdu 2015):

    H = E f(x + s z) (z z^T - I) / s^2

Three things reduce the variance, and none of them changes the mean:

- Second differences. The pair z, -z and a base value that does not depend on z give
  H = E c (z z^T - I) with c = (f(x + s z) + f(x - s z) - 2 f(x)) / (2 s^2), without the gradient's share of the noise.
- A centred c: the sample covariance of c and z z^T is an unbiased estimate of H, without the part of the noise that
  comes from the mean of c.
- A control: for a fixed symmetric S, H = S + Cov(c - z^T S z / 2, z z^T). The noise is then that of H - S.

For given directions V the same holds with z = z' + V y, where z' is orthogonal to V. The second difference is taken in
y only, so that the noise is that of V^T H V instead of that of H. For one direction, y is a number t, and it is drawn
from a density proportional to |t (t^2 - 1)| exp(-t^2 / 2) instead of the normal density, with the weight that keeps
the mean (importance sampling). For a quadratic f, this reduces the variance by a factor of 50; for a step function, it
stays finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import stats
from scipy.special import lambertw
from torch import Tensor

from hessian_tools.operators.base import Operator

MASS = 4 * math.exp(-0.5) - 1  # integral of r |r^2 - 1| exp(-r^2 / 2) over r > 0
BLOCK = 2**24  # numbers in a block of draws that is made anew for every product


def line_steps(observations: int, strata: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw steps t along one direction, and the weights of the second differences there.

    With d(t) = (f(t) + f(-t) - 2 f(0)) / (2 s^2) for a function f of one variable in units of s, the second derivative
    of the smoothed f is E weight * d(t).

    Args:
        observations: Number n of independent observations.
        strata: Number m of steps per observation. The quantiles of the steps of one observation are spread evenly: one
            in each of m equal parts.
        generator: Random generator.

    Returns:
        Steps t > 0 and their weights, both [n, m] and float64. The mean of the m weighted second differences is one
        observation.
    """
    share = torch.rand(observations, strata, generator=generator, dtype=torch.float64)
    u = ((torch.arange(strata) + share) / strata).numpy()
    inner = (2 * math.exp(-0.5) - 1) / MASS  # probability of t < 1
    # With y = t^2 / 2, the distribution function is (q(y) - 1) / MASS up to t = 1, where q(y) = (2 y + 1) exp(-y)
    # increases, and 1 - q(y) / MASS from there on, where it decreases.
    low = u < inner
    q = np.where(low, 1 + MASS * u, MASS * (1 - u))
    argument = np.clip(-q * math.exp(-0.5) / 2, -1 / math.e, -1e-300)
    found = np.where(low, lambertw(argument, 0).real, lambertw(argument, -1).real)
    t = torch.from_numpy(np.sqrt(np.clip(-2 * found - 1, 1e-12, None)))
    return t, math.sqrt(2 / math.pi) * MASS * (t - 1).sign() / t


def radii(size: int, observations: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw lengths r of a normal vector in R^P, and the weights of the values of a function there.

    For a function f of r, E (r^2 - P) f(r) = E (weight_1 f(r_1) + weight_2 f(r_2)) / 2. The lengths are the quantiles
    of a normal number x and of -x. x is drawn from a density proportional to |x| exp(-x^2 / 2) instead of the normal
    density.

    Args:
        size: P.
        observations: Number n of observations.
        generator: Random generator.

    Returns:
        Lengths and weights, both [n, 2] and float64.
    """
    x = (-2 * torch.log1p(-torch.rand(observations, generator=generator, dtype=torch.float64))).sqrt().clamp_min(1e-6)
    tail = stats.norm.sf(x.numpy())
    squares = torch.from_numpy(np.stack([stats.chi2.isf(tail, size), stats.chi2.ppf(tail, size)], 1))
    return squares.sqrt(), (squares - size) * math.sqrt(2 / math.pi) / x[:, None]


def covariances(c: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Return values [K] whose mean is the weighted sum of the sample covariances of c and y.

    Args:
        c: Second differences [K, B] of K draws of B groups of samples.
        y: Functions of the same draws [K, B], for example (v^T z)^2.
        weights: Weights [B] of the groups.
    """
    products = (c - c.mean(0)) * (y - y.mean(0)) * (len(c) / (len(c) - 1))
    return products @ weights


def shrunk(values: Tensor, threshold: float) -> Tensor:
    """Guess v^T H v for eigenvectors v of a sample estimate of H, from its eigenvalues.

    The eigenvalue that belongs to an eigenvalue l of H above the threshold t is near l + t^2 / l, and its eigenvector
    has the squared cosine 1 - t^2 / l^2 (a spiked Wigner matrix; Benaych-Georges & Nadakuditi 2011). Eigenvalues up to
    2 t are noise.

    Args:
        values: Eigenvalues [n] of the sample estimate.
        threshold: t.

    Returns:
        l (1 - t^2 / l^2) [n], 0 for noise.
    """
    beyond = (values.square() - 4 * threshold**2).clamp_min(0).sqrt()
    size = (values.abs() + beyond) / 2
    guess = values.sign() * (size - threshold**2 / size.clamp_min(torch.finfo(values.dtype).tiny))
    return torch.where(beyond > 0, guess, 0)


class SteinHessian(Operator):
    """The sample estimate S + sum over groups b of weight_b Cov(c_b, z_b z_b^T), an unbiased estimate of H.

    The draws z are made anew for every product, or kept as far as the memory suffices.

    Args:
        c: Second differences [K, B] of K draws for each of B groups of samples, less z^T S z / 2.
        weights: Weights [B] of the groups, which sum to 1.
        draw: Function of k that returns the draws z [B, P] of number k.
        size: P.
        dtype: Dtype of the products.
        device: Device of the products.
        control: S as a function of a block [P, n]; None for S = 0.
        memory: Bytes for draws that are kept.

    Attributes:
        residual_variances: Variance [B] of `c` in every group.

    Raises:
        ValueError: If there are fewer than 2 draws.
    """

    def __init__(
        self,
        c: Tensor,
        weights: Tensor,
        draw: Callable[[int], Tensor],
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        control: Callable[[Tensor], Tensor] | None = None,
        memory: float = 0.0,
    ) -> None:
        super().__init__(size, dtype, device)
        if len(c) < 2:
            raise ValueError(f"a sample covariance needs at least 2 draws, not {len(c)}")
        self.residual_variances = c.var(0)  # [B], of what the control leaves of c
        self._factors = ((c - c.mean(0)) * weights / (len(c) - 1)).to(device, torch.float64)
        self._draw, self._control = draw, control
        groups = c.shape[1]
        self._step = max(1, BLOCK // (groups * size))
        self._kept: dict[int, Tensor] = {}
        self._room = int(memory / (groups * size * dtype.itemsize))  # draws

    def blocks(self) -> list[range]:
        """Return the numbers of the draws in blocks."""
        count = len(self._factors)
        return [range(i, min(i + self._step, count)) for i in range(0, count, self._step)]

    def draws(self, numbers: range) -> Tensor:
        """Return the draws [len(numbers), B, P] of a block."""
        if numbers.start in self._kept:
            return self._kept[numbers.start]
        made = torch.stack([self._draw(k) for k in numbers]).to(self.device, self.dtype)
        if numbers.stop <= self._room:
            self._kept[numbers.start] = made
        return made

    def _apply(self, block: Tensor) -> Tensor:
        total = torch.zeros(block.shape, dtype=torch.float64, device=self.device)
        for numbers in self.blocks():
            z = self.draws(numbers).flatten(0, 1)
            scaled = (z @ block) * self._factors[numbers.start : numbers.stop].reshape(-1, 1).to(self.dtype)
            total += (z.T @ scaled).double()
        if self._control is not None:
            total += self._control(block.double())
        return total.to(self.dtype)

    def product(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the product with one vector [P] and the standard error of every entry over the draws.

        The product is unbiased for every fixed vector. The entries are skewed: for an interval, use
        `covariances` and `hessian_tools.linalg.mean_interval`, which corrects for that.

        Args:
            v: A vector [P] that does not depend on the draws.

        Returns:
            The product [P] and its standard errors [P], float64.
        """
        count = len(self._factors)
        total, squares = torch.zeros(2, self.shape[0], dtype=torch.float64, device=self.device)
        means = torch.zeros(self._factors.shape[1], self.shape[0], dtype=torch.float64, device=self.device)
        v = v.to(self.device, torch.float64)
        for numbers in self.blocks():
            z = self.draws(numbers).double()
            means += (z * (z @ v)[..., None]).sum(0) / count
        for numbers in self.blocks():
            z = self.draws(numbers).double()
            values = self._factors[numbers.start : numbers.stop, :, None] * (z * (z @ v)[..., None] - means)
            values = values.sum(1) * count  # the mean over the draws is the product
            total += values.sum(0) / count
            squares += values.square().sum(0)
        stderr = ((squares / count - total.square()).clamp_min(0) / (count - 1)).sqrt()
        if self._control is not None:
            total = total + self._control(v[:, None])[:, 0]
        self.products += 1
        return total, stderr
