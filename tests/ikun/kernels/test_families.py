"""f' of the numba kernels where potentials are not finite, and surrogates that have no kernel."""

from __future__ import annotations

import pytest
import torch

from ikun.kernels import dispatch
from ikun.kernels.families import family_constants
from ikun.neurons import Dynamics
from ikun.surrogates import FAMILIES, Surrogate


@pytest.mark.filterwarnings("error")  # numba failed: spikes run in plain torch
@pytest.mark.parametrize("name", list(FAMILIES))
def test_what_is_not_a_number_stays_so(name: str) -> None:
    z = torch.tensor([[0.5, float("nan"), 0.1]])
    for found in dispatch.slopes(Dynamics(Surrogate.parse(name)), z):
        assert found.isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("reset", ["hard", "soft"])
def test_dv_dh_of_a_detached_reset_is_bytes(reset: str) -> None:
    z = torch.tensor([[0.5, -0.5, 0.0]])
    _, c = dispatch.slopes(Dynamics(Surrogate.parse("sigmoid"), reset=reset, detach_reset=True), z)
    assert c.dtype == torch.uint8
    assert c.tolist() == ([[0, 1, 0]] if reset == "hard" else [[1, 1, 1]])


def test_a_surrogate_without_kernels_is_refused() -> None:
    class Unknown:
        name, parameter, peak = "unknown", 1.0, 1.0

    with pytest.raises(ValueError, match="do not have the surrogate unknown"):
        family_constants(Unknown())  # type: ignore[arg-type]
