"""A tiny study of generalization, for tests."""

from __future__ import annotations

from pathlib import Path

from ikun_hessian.experiments.study import plan, preset

TINY = """
title = "Tiny"
by = "init"
seeds = 2
[train]
data = "digits"
subset = 60
model = "mlp"
norm = "none"
schedule = "none"
hidden = "6"
epochs = 2
batch-size = 16
[[vary]]
optimizer = ["adam"]
lr = [0.002, 0.02]
init = ["kaiming", "xavier"]
[[vary]]
optimizer = ["sgd"]
lr = [1.0, 0.2]
init = ["kaiming", "xavier"]
[generalization]
threshold = 0.09
samples = 40
draws = 4
probes = 10
observations = 2
[generalization.environments]
base = {}
short = {timesteps = 2}
"""


def planned(folder: Path, text: str = TINY) -> plan.StudyPlan:
    """Plan the study in a folder."""
    path = folder / "tiny.toml"
    path.write_text(text)
    found = preset.read_preset(path)
    return plan.make(found, folder / "out", data_dir=None, device="cpu", memory=1.0, leader=0)
