"""Tests that two processes compute what one does. Run as a script, this file is one of two ranks."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from draws import seeded
from torch import Tensor, nn

from hessian_tools.analysis.uncertainty.round_off import relative_round_off
from hessian_tools.linalg.lanczos import eigenpairs
from hessian_tools.linalg.spectral_density import density
from hessian_tools.linalg.trace import probe_forms, trace
from hessian_tools.objective import Objective, make_objective
from hessian_tools.operators.base import Composed, Operator
from hessian_tools.operators.curvature import OPERATORS, hessian
from hessian_tools.perturbation import outputs_at
from hessian_tools.resume import Phases, ResumeError
from hessian_tools.runtime.distributed import Group, RankError, environment_number, initialize_group
from ikun_hessian.jobs.device import half_of_the_memory, pick

RAGGED = (4, 3, 5, 1, 2)
DIES_AT = 17  # products


def objective(sizes: tuple[int, ...] = RAGGED, dtype: torch.dtype = torch.float64) -> Objective:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    x, y = torch.randn(sum(sizes), 4, dtype=dtype), torch.randint(0, 3, (sum(sizes),))
    return make_objective(model, nn.functional.cross_entropy, list(zip(x.split(sizes), y.split(sizes), strict=True)))


def measured(whole: Objective) -> dict[str, Tensor]:
    """Everything that a sum over the ranks goes into."""
    value, gradient = whole.value_and_gradient()
    block = torch.randn(whole.size, 3, dtype=torch.float64, generator=seeded(0))
    found = {"value": torch.tensor(value), "gradient": gradient}
    for name, factory in OPERATORS.items():
        op = factory(whole, 2**30)
        found[f"{name} @ v"] = op @ block[:, 0]
        found[f"{name} @ block"] = op @ block
        found[f"{name} again"] = op @ block  # the primals are kept by now
        found[f"{name} in batches of two"] = factory(whole.rebatched(2), 0) @ block
        (found[f"{name} forms"],), found[f"{name} counts"] = op.batch_forms(block)
    op = hessian(whole)
    pairs = eigenpairs(op, 10, generator=seeded(1), tol=1e-9)
    found |= {"values": pairs.values, "projector": pairs.vectors @ pairs.vectors.T}
    estimate = trace(op, probes=8, generator=seeded(2), deflate=pairs)
    found["trace"] = torch.tensor([estimate.estimate, estimate.stderr])
    spread = density(op, probes=2, steps=12, generator=seeded(3))
    found["density"] = torch.stack([torch.stack(spread.nodes), torch.stack(spread.weights)])
    found["outputs"] = torch.stack(list(outputs_at(whole, lambda t: (1 + t) * whole.weights(), [0.0, 0.1, 0.2])))
    narrow = dataclasses.replace(objective(dtype=torch.float32), group=whole.group)
    found["round-off"] = torch.tensor(relative_round_off(narrow, hessian, block[:, :3]), dtype=torch.float64)
    return found


def analyse(phases: Phases, op: Operator, seed: int = 0) -> dict[str, Any]:
    pairs = phases.run("pairs", op, lambda op: vars(eigenpairs(op, 3, 1, generator=seeded(seed), tol=1e-8)))

    def forms(op: Operator) -> dict[str, Any]:
        random = seeded(seed + 1)
        return {"forms": torch.stack([torch.stack(probe_forms(op, 3, random)) for _ in range(4)])}

    return {"vectors": pairs["vectors"], "values": pairs["values"], "forms": phases.run("trace", op, forms)["forms"]}


def shared(group: Group | None) -> Objective:
    return dataclasses.replace(objective(), group=group)


class Counting(Composed):
    """An operator that counts its products; the process ends in the middle of a product if it is set to die."""

    def __init__(self, op: Operator, dies: bool = False) -> None:
        super().__init__(op.shape[0], op.dtype, op.device, op.__matmul__)
        self.dies, self.computed = dies, 0

    def _apply(self, block: Tensor) -> Tensor:
        self.computed += block.shape[1]
        if self.dies and self.computed > DIES_AT:
            os._exit(1)
        return super()._apply(block)


def refused(path: Path, key: dict[str, Any], op: Operator, group: Group) -> str:
    try:
        analyse(Phases(path, key, group), op, seed=5)
    except ResumeError as error:
        return str(error)
    return ""


def rank_of_a_run(folder: Path) -> None:
    """Write rank-R.pt. Rank 1 has another folder, in which it must write nothing."""
    group = initialize_group("cpu")
    assert group is not None
    found: dict[str, Any] = {"group": group, "measured": measured(shared(group)), "file": group.broadcast(group.rank)}
    one_batch = dataclasses.replace(objective((9,)), group=group)
    found["one batch"] = {
        "product": hessian(one_batch) @ one_batch.weights(),
        "forms": one_batch.value_and_gradient()[1],
        "outputs": next(iter(outputs_at(one_batch, lambda _: one_batch.weights(), [0]))),
    }
    mine = folder if group.rank == 0 else folder / "second"
    for name in ("whole", "died-0", "died-1"):
        op, phases = Counting(hessian(shared(group))), Phases(mine / name, {"a": 1}, group)
        found[name] = {**analyse(phases, op), "products": torch.tensor(phases.products)}
        found[f"{name} computed"] = op.computed
        found[f"{name} read"] = analyse(Phases(mine / name, {"a": 1}, group), op)
    other = mine / "other"
    found["refused"] = [refused(other, key, hessian(shared(group)), group) for key in ({"a": 1}, {"a": 2})]
    if group.rank == 0:
        shutil.copy(mine / "whole", mine / "damaged")
        (mine / "damaged.1").write_bytes((mine / "whole.1").read_bytes()[:-1])
    found["refused"].append(refused(mine / "damaged", {"a": 1}, hessian(shared(group)), group))
    torch.save(found, folder / f"rank-{group.rank}.pt")
    group.close()


def rank_of_a_dying_run(folder: Path, dying: int) -> None:
    """Rank `dying` ends in the middle of a product; the other leaves its error."""
    group = initialize_group("cpu")
    assert group is not None
    began = time.monotonic()
    try:
        analyse(
            Phases(folder / f"died-{dying}", {"a": 1}, group), Counting(hessian(shared(group)), group.rank == dying)
        )
    except RankError as error:
        left = {"error": str(error), "seconds": time.monotonic() - began}
        (folder / f"survivor-of-{dying}.json").write_text(json.dumps(left))


def rank_of_a_dying_run_on_gpus(folder: Path) -> None:
    """Rank 1 ends before the third sum. Sums between GPUs wait for it for ever, as NCCL's do for minutes."""
    from pretend_device.device import pretend_device

    gloo, asked = dist.all_reduce, []

    def all_reduce(t: Tensor, group: Any = None) -> None:
        if group is None:
            gloo(t)
            return
        asked.append(group)
        assert t.is_cuda
        if len(asked) == 3:
            time.sleep(3600)
        host = t.cpu()
        gloo(host)
        t.copy_(host)

    dist.all_reduce, dist.new_group = all_reduce, lambda **options: options
    with pretend_device():
        group = initialize_group("cuda")
        assert group is not None
        sums = [group.sum(torch.full((2,), group.rank + 1.0, device="cuda")).tolist() for _ in range(2)]
        assert group.broadcast(group.rank) == 0
        if group.rank == 1:
            os._exit(1)
        try:
            group.sum(torch.ones(2, device="cuda"))
        except RankError as error:
            timeout = asked[0]["timeout"].total_seconds()
            left = {"error": str(error), "sums": sums, "backend": asked[0]["backend"], "timeout": timeout}
            (folder / "survivor-on-gpus.json").write_text(json.dumps(left))


def start(folder: Path, *arguments: str) -> list[subprocess.Popen[bytes]]:
    """Two ranks of this file, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(map(str, Path(__file__).parents[2:4]))
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
        )
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of which a rank dies, then one that measures everything and resumes them."""
    folder = tmp_path_factory.mktemp("ranks")
    dying = [start(folder, str(rank)) for rank in range(2)]
    assert [[p.wait(300) for p in pair] for pair in dying] == [[1, 0], [0, 1]]
    for ending in ("", ".journal"):
        shutil.copy(folder / f"died-1{ending}", folder / f"other{ending}")
    assert [p.wait(300) for p in start(folder)] == [0, 0]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


def test_two_ranks_measure_what_one_process_does(ranks: list[dict[str, Any]]) -> None:
    assert [r["group"] for r in ranks] == [Group(0, 2), Group(1, 2)]
    assert [r["file"] for r in ranks] == [0, 0]
    for name, expected in measured(objective()).items():
        first, second = (r["measured"][name] for r in ranks)
        assert torch.equal(first, second), name
        assert first.shape == expected.shape
        assert (first - expected).norm() <= 1e-10 * expected.norm(), name


def test_a_rank_without_batches_gives_zeros(ranks: list[dict[str, Any]]) -> None:
    alone = objective((9,))
    for found in (r["one batch"] for r in ranks):
        torch.testing.assert_close(found["product"], hessian(alone) @ alone.weights(), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(found["forms"], alone.value_and_gradient()[1], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(
            found["outputs"], alone.outputs(alone.batches[0][0]).detach(), rtol=1e-12, atol=1e-15
        )


@pytest.mark.parametrize("dying", [0, 1])
def test_the_survivor_says_so_at_once_and_the_run_can_be_resumed(
    folder: Path, ranks: list[dict[str, Any]], dying: int
) -> None:
    left = json.loads((folder / f"survivor-of-{dying}.json").read_text())
    assert left["seconds"] < 60  # half an hour where nothing was noticed; on a busy machine not much below 5
    assert left["error"].startswith(f"rank {1 - dying} of 2: another process of the run has died or does not answer (")
    assert left["error"].endswith("). Start all processes again to resume.")
    assert "\n" not in left["error"]
    for found in ranks:
        whole, resumed = found["whole"], found[f"died-{dying}"]
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
        assert found[f"died-{dying} computed"] == found["whole computed"] - DIES_AT
        assert all(torch.equal(whole[name], value) for name, value in found[f"died-{dying} read"].items())


def test_a_dead_rank_is_noticed_before_a_sum_between_gpus(tmp_path: Path) -> None:
    first, second = start(tmp_path, "gpus")
    try:
        assert second.wait(60) == 1
        assert first.wait(60) == 0
    finally:
        first.kill()
    left = json.loads((tmp_path / "survivor-on-gpus.json").read_text())
    assert left["error"].startswith("rank 0 of 2: another process of the run has died or does not answer (")
    assert left["sums"] == [[3, 3], [3, 3]]
    assert left["backend"] == "nccl"
    assert left["timeout"] <= 300  # if the rank dies within the sum


def test_the_first_rank_alone_reads_and_writes(folder: Path, ranks: list[dict[str, Any]]) -> None:
    assert not (folder / "second").exists()
    assert not list(folder.glob("died-*.journal"))
    assert {p.name for p in folder.glob("whole*")} == {"whole", "whole.1", "whole.2"}
    for found in ranks:  # with the same words on every rank, but for the path in front
        journal, changed, damaged = found["refused"]
        assert journal.partition(": ")[2].startswith("this machine does not reproduce the interrupted run")
        assert changed.partition(": ")[2].startswith("the a changed since the interrupted run")
        assert damaged.partition(": ")[2].startswith("damaged, or not the state of an analysis")


class Silent(Group):
    """A rank that hears nothing from the others: its own part."""

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_the_shares_add_up_to_the_whole(size: int) -> None:
    whole = objective()
    parts = [dataclasses.replace(whole, group=Silent(rank, size)) for rank in range(size)]
    assert sorted(i for part in parts for i in part.share) == list(range(len(RAGGED)))
    assert sum(w for part in parts for _, w in part.weighted_batches()) == pytest.approx(1, rel=1e-15)
    assert {(part.samples, part.size, len(part.rebatched(2).batches)) for part in parts} == {(15, whole.size, 8)}
    values, gradients = zip(*(part.value_and_gradient() for part in parts), strict=True)
    assert sum(values) == pytest.approx(whole.value_and_gradient()[0], rel=1e-14)
    torch.testing.assert_close(torch.stack(gradients).sum(0), whole.value_and_gradient()[1], rtol=1e-12, atol=1e-15)
    block = torch.randn(whole.size, 2, dtype=torch.float64, generator=seeded(0))
    ops = [hessian(part) for part in parts]
    for _ in range(2):
        images = torch.stack([op @ block for op in ops])
        torch.testing.assert_close(images.sum(0), hessian(whole) @ block, rtol=1e-12, atol=1e-14)
        forms = torch.stack([op.batch_forms(block)[0][0] for op in ops])
        torch.testing.assert_close(forms.sum(0), hessian(whole).batch_forms(block)[0][0], rtol=1e-12, atol=1e-15)
    for op, part in zip(ops, parts, strict=True):
        assert op.batch_forms(block)[1].tolist() == list(RAGGED)
        others = [i for i in range(len(RAGGED)) if i not in part.share]
        assert op.batch_forms(block)[0][0][others].count_nonzero() == 0


def test_a_single_process_has_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert initialize_group("cpu") is None
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert initialize_group(torch.device("cpu")) is None


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RankError, match="rank 9 of 16: no GPU is left for this process"):
        initialize_group("cuda")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 2:
        rank_of_a_run(Path(sys.argv[1]))
    elif sys.argv[2] == "gpus":
        rank_of_a_dying_run_on_gpus(Path(sys.argv[1]))
    else:
        rank_of_a_dying_run(Path(sys.argv[1]), int(sys.argv[2]))


@pytest.mark.parametrize("text", ["0", "-1", "x", "", "1.5", "1" * 30])
def test_numbers_of_the_environment_are_checked(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    with pytest.raises(ValueError, match=f"LOCAL_WORLD_SIZE={text} in the environment: it must be a whole number"):
        environment_number("LOCAL_WORLD_SIZE", least=1, default=1)
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(ValueError, match="WORLD_SIZE="):
        initialize_group("cpu")


def test_each_process_has_the_memory_of_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 64 * 2**30))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    whole = half_of_the_memory("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert half_of_the_memory("cuda") == 32
    assert half_of_the_memory("cpu") == pytest.approx(whole / 2, abs=0.1)


def test_only_a_rank_chooses_its_gpu_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    for name, value in (("is_available", True), ("device_count", 2), ("current_device", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert pick("cuda") == "cuda"
    assert chosen == [1]
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert pick("cuda") == "cuda"
    assert chosen[-1] == 0


def test_numbers_of_the_environment_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert environment_number("LOCAL_WORLD_SIZE", least=1, default=1) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert environment_number("LOCAL_WORLD_SIZE", least=1, default=1) == 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match="ranks are from 0 to 1"):
        initialize_group("cpu")
