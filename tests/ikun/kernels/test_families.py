"""f' and f'' of the numba kernels, against the formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ikun.kernels import dispatch
from ikun.kernels.scan import Scan
from ikun.neurons import Dynamics
from ikun.surrogates import FAMILIES, Surrogate

pytestmark = pytest.mark.filterwarnings("error")  # numba failed: spikes run in plain torch
EVERY = [(name, slope) for name in FAMILIES for slope in (0.25, 1.0, 8.0)]


def places(surrogate: Surrogate) -> Tensor:
    """Return more entries than a pass processes at a time: both sides, near 0, and far out."""
    length = surrogate.family.length(surrogate.parameter)
    middle = length * np.random.default_rng(0).normal(size=9000)
    small = length * np.logspace(-30, 0, 61)
    far = length * np.array([9.0, 30.0, 80.0, 600.0, 1e4])
    return torch.from_numpy(np.concatenate([middle, small, -small, [0.0], far, -far])).clamp(-1e4, 1e4)


def second(surrogate: Surrogate, z: Tensor) -> Tensor:
    """Return f'' by the kernel: e of one step with an adjoint of the spikes of 1 and without a reset's slope."""
    f1, c = dispatch.slopes(Dynamics(surrogate, detach_reset=True), z)
    scan = Scan(f1, c, 1.0, 1.0, False, None, 1, e=torch.empty_like(z), surrogate=surrogate)
    dispatch.adjoint(scan, torch.ones_like(z), z)
    assert scan.e is not None
    return scan.e


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "slope"), EVERY)
def test_kernels_compute_the_derivatives_of_every_surrogate(name: str, slope: float, dtype: torch.dtype) -> None:
    surrogate = Surrogate.parse(name).steeper(slope)
    z = places(surrogate).to(dtype)[None]
    f1, _ = dispatch.slopes(Dynamics(surrogate), z)
    exact = z.double()
    near = exact.abs() / surrogate.family.length(surrogate.parameter)
    # far out, an exponential ends near the smallest number instead of 0
    tail = 1e3 * torch.finfo(dtype).tiny * surrogate.peak * (1 + near)
    eps = torch.finfo(dtype).eps * (1500 if name in ("erf", "gaussian") else 400)
    smooth = (near - 1).abs() > 1e-5  # where a triangle or a rectangle ends
    for found, expected, size in (
        (f1, surrogate.first(exact), 1.0),
        (second(surrogate, z), surrogate.second(exact), max(1.0, slope)),
    ):
        bound = size * tail + eps * expected.abs()
        if name in ("triangle", "linear"):
            bound += eps * surrogate.peak  # 1 - |x| / a cancels
        assert bool(((found.double() - expected).abs() <= bound)[smooth].all())


@pytest.mark.parametrize("name", list(FAMILIES))
def test_what_is_not_finite_stays_so(name: str) -> None:
    z = torch.tensor([[0.5, float("nan"), 0.1]])
    f1, c = dispatch.slopes(Dynamics(Surrogate.parse(name)), z)
    assert f1.isnan().tolist() == [[False, True, False]]
    assert c.isnan().tolist() == [[False, True, False]]


def test_a_surrogate_without_kernels_is_refused() -> None:
    from ikun.kernels.families import constants

    class Unknown:
        name, parameter, peak = "unknown", 1.0, 1.0

    with pytest.raises(ValueError, match="do not have the surrogate unknown"):
        constants(Unknown())  # type: ignore[arg-type]
