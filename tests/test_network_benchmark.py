"""Tests of benchmarks.networks: the script runs on small networks, and counts and compares what it says."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import networks

OPTIONS = argparse.Namespace(small=True, check=True, rounds=2)


@pytest.mark.parametrize(
    ("name", "library"), [("recurrent-by-hand", "torch"), ("csnn-ikun", "torch"), ("csnn-spikingjelly", "spikingjelly")]
)
def test_a_small_network_gets_every_number(name: str, library: str) -> None:
    pytest.importorskip(library)
    row = networks.measure_case(name, OPTIONS)
    assert row["error"] < 1e-10
    assert row["error32"] < 1e-3
    assert row["spikes"].startswith("same")
    ours, theirs = row["lambda_max"]
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert {"Hessian", "GGN", "from scratch", "double backward", "GEMMs"} <= row["ratios"].keys()
    assert all(len(found) == 2 and min(found) > 0 for found in row["ratios"].values())
    head, _, line, *_ = networks.table([row]).splitlines()
    assert head.count("|") == line.count("|") == len(head.split(" | ")) + 1


def test_only_matrix_products_and_convolutions_are_recorded_and_replayed() -> None:
    x, w, kernel = torch.randn(3, 4), torch.randn(4, 5), torch.randn(7, 2, 3, 3)
    image = torch.randn(1, 2, 6, 6).expand(8, 2, 6, 6)  # strides of 0 are kept
    with networks.Gemms() as gemms:
        (x.exp() @ w).sum()
        torch.nn.functional.conv2d(image, kernel)
    assert [call[0].overloadpacket.__name__ for call in gemms.calls] == ["mm", "convolution"]
    assert gemms.calls[1][1][0].stride() == image.stride()
    with FlopCounterMode(display=False) as flops:
        gemms.replay()
    assert flops.get_total_flops() == 2 * 3 * 4 * 5 + 2 * 8 * 7 * 4 * 4 * 2 * 9


def test_a_network_that_spikes_otherwise_is_told() -> None:
    pytest.importorskip("spikingjelly")
    case = networks.make_case("csnn-spikingjelly", small=True)
    objective = networks.opened(case, (case.x, torch.zeros(len(case.x), dtype=torch.long)))
    assert networks.compare_spikes(networks.Own(case), objective, case.x) == "same"
    with torch.no_grad():
        next(iter(objective.parameters.values())).mul_(2)
    assert "differ" in networks.compare_spikes(networks.Own(case), objective, case.x)


def test_what_fails_is_a_note_below_the_table() -> None:
    rows = [{"name": "vgg11", "notes": ["not measured: MemoryError"]}]
    assert networks.table(rows).splitlines()[-1] == "- Spiking VGG11, SpikingJelly: not measured: MemoryError"
