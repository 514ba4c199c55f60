"""CUDA against the CPU. Run where a device is: pytest -m gpu."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import cli
from hessian_tools.objective import make_objective
from hessian_tools.operators import OPERATORS
from ikun.checkpoint import load_checkpoint
from ikun.networks import LOSSES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "digits-csnn-ikun.pt"


@pytest.mark.parametrize("name", list(OPERATORS))
def test_products_agree_with_the_cpu(name: str) -> None:
    checkpoint = load_checkpoint(CHECKPOINT)
    data = checkpoint.data.load()
    x, y = data.images[:64], data.labels[:64]
    here, there = (
        OPERATORS[name](
            make_objective(checkpoint.build(), LOSSES["mse"], (x, y), dtype=torch.float64, device=device), 2**30
        )
        for device in ("cpu", "cuda")
    )
    v = torch.randn(here.shape[0], 2, dtype=torch.float64)
    torch.testing.assert_close((there @ v).cpu(), here @ v, rtol=1e-9, atol=1e-12)


def test_spectrum_and_training_on_the_device(tmp_path: Path) -> None:
    out = tmp_path / "x.pt"
    quick = ["--top", "3", "--smallest", "2", "--steps", "8", "--samples", "128"]
    assert cli.run(["train", "--epochs", "2", "--channels", "4", "--device", "cuda", "--out", str(out)]) == 0
    for device in ("cpu", "cuda"):
        assert cli.run(["spectrum", str(out), *quick, "--device", device, "--tag", device]) == 0
    top = [
        json.loads((tmp_path / f"x.{d}.spectrum.json").read_text())["spectra"]["hessian"]["eigenvalues"][0]["value"]
        for d in ("cpu", "cuda")
    ]
    assert top[1] == pytest.approx(top[0], rel=1e-3)
