"""Tests that an interrupted analysis resumes to the same result. Run as a script, this file gets itself killed."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from draws import seeded
from torch import Tensor, nn

from hessian_tools import resume as module
from hessian_tools.linalg.lanczos import eigenpairs
from hessian_tools.linalg.spectral_density import density
from hessian_tools.linalg.trace import probe_forms
from hessian_tools.objective import make_objective
from hessian_tools.operators.base import Composed, Dense, Operator, scaled, symmetry_error
from hessian_tools.operators.curvature import hessian
from hessian_tools.resume import Phases, ResumeError

SIZE = 24
BLOCK = 3  # vectors of the largest block: an interruption may lose all of them but one, counted in vain
PHASES = 5
LARGE = 200 * 2**20  # bytes of a large result
KILLED_AT = (0, 1, 2, 9, 40)  # the script is killed after this many products
Stop = Callable[[], None]


def matrix(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    a = torch.randn(SIZE, SIZE, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return a + a.T


def interrupt() -> None:
    raise KeyboardInterrupt


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Limited(Dense):
    """Stops before it would have computed more than `limit` products."""

    def __init__(self, a: Tensor, limit: float = float("inf"), stop: Stop = interrupt) -> None:
        super().__init__(a)
        self.limit, self.stop, self.computed = limit, stop, 0

    def _apply(self, block: Tensor) -> Tensor:
        self.computed += block.shape[1]
        if self.computed > self.limit:
            self.stop()
        return super()._apply(block)


def never(op: Operator) -> dict[str, Any]:
    raise AssertionError("computed again")


def analyse(phases: Phases, op: Operator, seed: int = 0) -> dict[str, Any]:
    """Several phases on blocks and single vectors; one uses an operator made from `op`."""
    error = phases.run("symmetry", op, lambda op: {"error": symmetry_error(op, seeded(seed))})
    pairs = phases.run("pairs", op, lambda op: vars(eigenpairs(op, 3, 1, generator=seeded(seed + 1), tol=1e-6)))
    spread = phases.run("density", op, lambda op: vars(density(op, probes=2, steps=8, generator=seeded(seed + 2))))

    def trace(op: Operator) -> dict[str, Any]:
        random = seeded(seed + 3)
        return {"forms": torch.stack([torch.stack(probe_forms(op, 3, random)) for _ in range(3)])}

    forms = phases.run("trace", op, trace)
    unlike = scaled(op, torch.linspace(1, 2, SIZE))
    top = phases.run("scaled", unlike, lambda op: vars(eigenpairs(op, 1, generator=seeded(seed + 4))))
    return {"symmetry": error, "pairs": pairs, "density": spread, "trace": forms, "scaled": top}


def same(a: Any, b: Any) -> bool:
    """Bit for bit, through dicts and tuples."""
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (a != a and b != b)


def uninterrupted(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Any], int]:
    phases = Phases()
    return analyse(phases, Limited(matrix(dtype=dtype))), phases.products


def left_by(path: Path, limit: int, key: dict[str, Any] | None = None) -> Path:
    """Run an analysis that is interrupted after `limit` products."""
    with pytest.raises(KeyboardInterrupt):
        analyse(Phases(path, key), Limited(matrix(), limit))
    return path


def beside(path: Path, ending: object) -> Path:
    return path.with_name(f"{path.name}.{ending}")


def journal(path: Path) -> Path:
    return beside(path, "journal")


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_interrupted_at_any_product_resumes_to_the_same_result(tmp_path: Path, dtype: torch.dtype) -> None:
    expected, products = uninterrupted(dtype)
    assert products > 60
    for limit in range(products):
        path = tmp_path / f"{limit}"
        first, second = Limited(matrix(dtype=dtype), limit), Limited(matrix(dtype=dtype))
        with pytest.raises(KeyboardInterrupt):
            analyse(Phases(path), first)
        phases = Phases(path)
        assert same(analyse(phases, second), expected)
        assert phases.products == products
        assert second.computed <= products - limit + BLOCK - 1
        assert not journal(path).exists()
        assert len(list(tmp_path.glob(f"{limit}.*"))) == PHASES
        again = Phases(path)
        assert same(analyse(again, Limited(matrix(dtype=dtype), -1)), expected)  # nothing left to compute
        assert again.products == products


def test_the_seconds_of_interrupted_processes_are_summed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the products move, by a second for each vector: what was taken from the disk took its time."""
    clock = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: clock)

    class Timed(Limited):
        def _apply(self, block: Tensor) -> Tensor:
            nonlocal clock
            image = super()._apply(block)
            clock += block.shape[1]
            return image

    _, products = uninterrupted()
    for limit in range(0, products, 7):
        path = tmp_path / f"{limit}"
        for stop in (limit // 2, limit - limit // 2):
            with contextlib.suppress(KeyboardInterrupt):
                analyse(Phases(path), Timed(matrix(), stop))
        phases, last = Phases(path), Timed(matrix())
        analyse(phases, last)
        assert phases.seconds == products - last.computed
        again = Phases(path)
        analyse(again, Timed(matrix(), -1))
        assert again.seconds == products


def test_a_run_interrupted_repeatedly_ends_with_the_same_result(tmp_path: Path) -> None:
    expected, products = uninterrupted()
    interruptions = 0
    while True:
        phases, op = Phases(tmp_path / "state"), Limited(matrix(), BLOCK)
        try:
            found = analyse(phases, op)
            break
        except KeyboardInterrupt:
            interruptions += 1
            assert interruptions < products
    assert interruptions > products / 6
    assert same(found, expected)
    assert phases.products == products


def test_every_result_is_written_once_to_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    expected, _ = uninterrupted()
    written: dict[str, tuple[int, int]] = {}
    while len(written) < PHASES + 1:
        with contextlib.suppress(KeyboardInterrupt):
            analyse(Phases(path), Limited(matrix(), 7))
        for file in set(tmp_path.iterdir()) - {journal(path)}:
            found = file.stat().st_ino, file.stat().st_mtime_ns
            assert written.setdefault(file.name, found) == found
    assert names(tmp_path) == {"state", *(f"state.{n}" for n in range(1, PHASES + 1))}
    vectors = expected["pairs"]["vectors"].T.contiguous().numpy().tobytes()
    assert [n for n in range(1, PHASES + 1) if vectors in beside(path, n).read_bytes()] == [2]
    read: list[Path] = []
    plain = Path.open

    def opening(self: Path, *arguments: Any, **options: Any) -> Any:
        read.append(self)
        return plain(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", opening)
    phases, op = Phases(path), Limited(matrix(), -1)
    assert read == [path]
    phases.run("symmetry", op, never)
    assert read == [path, beside(path, 1)]
    pairs = phases.run("pairs", op, never)
    assert read == [path, beside(path, 1), beside(path, 2)]
    assert same(pairs, expected["pairs"])


def test_a_result_is_held_in_memory_once(tmp_path: Path) -> None:
    """As a script, this file writes one, forgets it, reads it and prints by how much its peak grew each time."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3]))}
    command = [sys.executable, __file__, str(tmp_path / "state"), "large"]
    grown = subprocess.run(command, capture_output=True, check=True, env=environment).stdout.split()
    assert all(int(growth) < LARGE / 4 for growth in grown)
    assert len(grown) == 2
    assert beside(tmp_path / "state", 1).stat().st_size > LARGE


def test_without_a_file_the_operator_is_the_callers() -> None:
    op = Limited(matrix())
    assert Phases().run("a", op, lambda given: {"own": given is op})["own"]


def test_batch_forms_and_other_attributes_are_the_operators_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = torch.randn(9, 3, dtype=torch.float64), torch.randint(0, 2, (9,))
    op = hessian(make_objective(net, nn.functional.cross_entropy, data, batch_size=4))
    block = torch.randn(op.shape[0], 3, dtype=torch.float64)
    phases = Phases(tmp_path / "state")
    found = phases.run("forms", op, lambda op: {"forms": op.batch_forms(block)[0][0], "image": op @ block})
    assert same(found, {"forms": op.batch_forms(block)[0][0], "image": op @ block})
    assert phases.products == 6
    assert phases.run("size", op, lambda op: {"size": op.objective.size})["size"] == op.shape[0]


def test_the_layout_of_a_product_is_the_same_from_the_journal(tmp_path: Path) -> None:
    """A sum over columns that lie elsewhere in memory may differ in its last bit."""
    block = torch.randn(SIZE, 3, dtype=torch.float64)
    stopped = False

    def product(v: Tensor) -> Tensor:
        if stopped:
            raise KeyboardInterrupt
        return (matrix() @ v).T.contiguous().T

    def compute(op: Operator) -> dict[str, Any]:
        nonlocal stopped
        images = [op @ block]
        stopped = not stopped
        return {"images": [*images, op @ block]}

    op = Composed(SIZE, torch.float64, torch.device("cpu"), product)
    with pytest.raises(KeyboardInterrupt):
        Phases(tmp_path / "state").run("a", op, compute)
    found = Phases(tmp_path / "state").run("a", op, compute)["images"]
    assert found[0].stride() == found[1].stride()
    assert torch.equal(found[0], found[1])


# ------------------------------------------------------------------------------------------------------------ kill -9
def killed_analysis(path: Path, how: str, limit: int) -> None:
    """Run an analysis that ends with SIGKILL; called in a separate process."""
    op = Limited(matrix(), limit if how == "product" else float("inf"), kill)
    if how == "record":
        append = module._Journaled._append

        class Half:
            """Writes the head, then half of the product."""

            def __init__(self, file: Any) -> None:
                self.file, self.name, self.head = file, file.name, True

            def write(self, data: Any) -> None:
                self.file.write(data if self.head else data[: len(data) // 2])
                if not self.head:
                    self.file.flush()
                    kill()
                self.head = False

        def half(self: Any, block: Tensor, image: Tensor, file: Any) -> None:
            file = Half(file) if op.computed >= limit else file
            append(self, block, image, file)

        module._Journaled._append = half  # type: ignore[method-assign]
    if how in ("replace", "unlink"):  # just before or just after the results of the phase are written
        owner: Any = os if how == "replace" else Path
        original = getattr(owner, how)
        setattr(owner, how, lambda *a, **k: kill() if op.computed >= max(limit, 1) else original(*a, **k))
    if how == "second":
        unlink = Path.unlink

        def unlinking(file: Path, missing_ok: bool = False) -> None:
            if file == journal(path) and beside(path, 2).exists():
                kill()
            unlink(file, missing_ok)

        setattr(Path, "unlink", unlinking)  # noqa: B010
    analyse(Phases(path), op)


HOWS = ("product", "record", "replace", "unlink")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[1:3]))}
    subprocess.run([sys.executable, __file__, str(folder)], check=True, env=environment)
    return folder


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("limit", KILLED_AT)
def test_a_killed_run_resumes_to_the_same_result(killed: Path, how: str, limit: int) -> None:
    expected, products = uninterrupted()
    path = killed / f"{how}-{limit}"
    assert path.exists()
    op, phases = Limited(matrix()), Phases(path)
    assert same(analyse(phases, op), expected)
    assert phases.products == products
    assert op.computed <= products - limit + BLOCK - 1 + BLOCK * (how == "record")
    if how == "replace":  # what was not renamed
        assert any(name.startswith(f".{path.name}.") for name in names(killed))
    Phases.remove(path)
    assert not {name for name in names(killed) if name.startswith((path.name, f".{path.name}."))}


def test_a_journal_left_by_a_kill_is_ignored_once_its_result_exists(killed: Path) -> None:
    """Its file is there: nothing of it is computed again, nothing of its journal taken for the third phase."""
    expected, products = uninterrupted()
    path = killed / "second"
    assert {name for name in names(killed) if name.startswith(path.name)} == {
        "second",
        "second.1",
        "second.2",
        "second.journal",
    }
    assert journal(path).stat().st_size > 0
    op, phases = Limited(matrix()), Phases(path)
    assert same(analyse(phases, op), expected)
    assert phases.products == products
    done = Phases(path)
    for name in ("symmetry", "pairs"):
        done.run(name, op, never)
    assert op.computed == products - done.products


# ------------------------------------------------------------------------------------------------- damaged, stale, full
def test_a_damaged_journal_counts_up_to_the_damage(tmp_path: Path) -> None:
    expected, products = uninterrupted()
    left = left_by(tmp_path / "left", 12)
    whole = journal(left).read_bytes()
    record = 28 + 8 * SIZE
    assert len(whole) == 10 * record  # the symmetry's two are done
    flipped = [bytes([*whole[:i], whole[i] ^ 1 << i % 8, *whole[i + 1 :]]) for i in range(0, len(whole), 61)]
    heads = [bytes([*whole[:i], whole[i] ^ 16, *whole[i + 1 :]]) for i in range(3 * record, 3 * record + 28)]
    cut = [whole[:n] for n in range(0, len(whole), 151)]
    longer = [whole + b"\0" * n for n in (1, 27, 28, 29, 500)] + [whole + whole]
    for damaged in [*flipped, *heads, *cut, *longer, b"\0" * len(whole), whole[record:]]:
        path = tmp_path / "state"
        Phases.remove(path)
        for ending in ("", ".1"):
            shutil.copy(f"{left}{ending}", f"{path}{ending}")
        journal(path).write_bytes(damaged)
        good = next((i for i in range(10) if damaged[: (i + 1) * record] != whole[: (i + 1) * record]), 10)
        op, phases = Limited(matrix()), Phases(path)
        if damaged == whole + whole:  # good records that no run writes: not what this one asks for
            with pytest.raises(ResumeError, match="does not reproduce"):
                analyse(phases, op)
            continue
        if damaged == whole[record:]:
            with pytest.raises(ResumeError, match="does not reproduce"):
                analyse(phases, op)
            continue
        with pytest.raises(KeyboardInterrupt):
            analyse(phases, Limited(matrix(), 5))
        phases = Phases(path)
        assert same(analyse(phases, op), expected)
        assert phases.products == products
        assert op.computed == products - 2 - good - 5


def test_the_journal_of_a_finished_phase_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, products = uninterrupted()
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda p, **k: None if p.suffix == ".journal" else unlink(p, **k))
    for limit in range(0, products, 5):
        path = left_by(tmp_path / f"{limit}", limit)
        phases = Phases(path)
        assert same(analyse(phases, Limited(matrix())), expected)
        assert phases.products == products


def test_the_journal_of_an_analysis_that_was_given_up_is_stale(tmp_path: Path) -> None:
    """The other matrix gets the same start vector, so its bits do not tell."""

    def pairs(phases: Phases, op: Operator) -> dict[str, Any]:
        return phases.run("pairs", op, lambda op: vars(eigenpairs(op, 3, generator=seeded(0))))

    path = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        pairs(Phases(path), Limited(matrix(), 9))
    path.unlink()
    assert same(pairs(Phases(path), Limited(matrix(1))), pairs(Phases(), Limited(matrix(1))))


def test_the_results_of_an_analysis_that_was_given_up_are_stale(tmp_path: Path) -> None:
    expected, products = uninterrupted()
    for limit in range(0, products, 5):
        path = tmp_path / f"{limit}"
        analyse(Phases(path), Limited(matrix(1)))
        with pytest.raises(KeyboardInterrupt):  # a later part, of a longer one
            Phases(beside(path, "longer")).run(
                "a", Limited(matrix(1), 9), lambda op: vars(density(op, probes=1, steps=12, generator=seeded(0)))
            )
        shutil.move(beside(path, "longer.journal"), journal(path))
        shutil.copy(beside(path, 1), beside(path, 17))
        path.unlink()
        left_by(path, limit)
        assert not beside(path, 17).exists()
        phases = Phases(path)
        assert same(analyse(phases, Limited(matrix())), expected)
        assert phases.products == products


@pytest.mark.parametrize("removed", range(PHASES + 2))
def test_interrupted_state_is_removed_and_other_files_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    """An interrupted removal leaves nothing to resume and can be completed; it keeps the files of other runs."""
    folder = tmp_path / "sta.e"
    path = folder / "sta.e"
    expected, products = uninterrupted()
    left_by(path, products - 1)
    part = f"{path.name}.2.{'0af' * 10}00.part"
    (folder / f".{part}").touch()
    others = {
        "state",
        "sta.e1",
        "sta.e.1.json",
        "sta.e.x",
        "sta.e.",
        "sta.e.01",
        "sta.e.-1",
        "sta.e.1\n",
        "sta.e.\u0663",
        "state.1",
        "sta.e.journal.1",
        "sta.e.1.journal",
        "sta.e.json",
        "asta.e.1",
        part,
        ".sta.e.part",
        f".x{part}",
        ".sta.e.2",
    }
    for name in others:
        (folder / name).touch()
    assert len(names(folder)) == len(others) + PHASES + 2
    unlink, count = Path.unlink, 0

    def unlinking(file: Path, missing_ok: bool = False) -> None:
        nonlocal count
        count += 1
        if count > removed:
            raise KeyboardInterrupt
        unlink(file, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlinking)
        with contextlib.suppress(KeyboardInterrupt):
            Phases.remove(path)
    assert path.exists() == (removed == 0)
    shutil.copytree(folder, tmp_path / "copy")
    again = tmp_path / "copy" / path.name
    phases = Phases(again)
    assert same(analyse(phases, Limited(matrix())), expected)
    for _ in range(2):
        Phases.remove(path)
        assert names(folder) == others
    Phases.remove(tmp_path / "no folder" / "state")


def test_other_vectors_are_refused(tmp_path: Path) -> None:
    path = left_by(tmp_path / "state", 20)
    left = journal(path).read_bytes()
    with pytest.raises(ResumeError, match=r"state.journal: this machine does not reproduce .* bit for bit"):
        analyse(Phases(path), Limited(matrix()), seed=1)
    assert journal(path).read_bytes() == left
    assert same(analyse(Phases(path), Limited(matrix())), uninterrupted()[0])


def test_what_changed_is_named(tmp_path: Path) -> None:
    key: dict[str, Any] = {
        "settings": {"top": (1, 2), "x": float("nan")},
        "checkpoint": "a1",
        "data": [1.5, None],
        "versions": {},
    }
    path = left_by(tmp_path / "state", 5, key)
    before = path.read_bytes(), journal(path).read_bytes()
    Phases(path, {**reversed_(key), "settings": {"x": float("nan"), "top": [1, 2]}})  # the same, as JSON has it
    for changes, names in [
        ({"checkpoint": "b2"}, "the checkpoint changed"),
        (
            {"settings": {"top": [1, 3], "x": float("nan")}, "versions": {"torch": "2"}},
            "the settings and the versions changed",
        ),
        ({"network": 1}, "the network changed"),
    ]:
        with pytest.raises(ResumeError, match=rf"^{path}: {names} since the interrupted run. .* discard the state"):
            Phases(path, {**key, **changes})
    with pytest.raises(ResumeError, match="the data changed"):
        Phases(path, {name: value for name, value in key.items() if name != "data"})
    assert (path.read_bytes(), journal(path).read_bytes()) == before


def reversed_(key: dict[str, Any]) -> dict[str, Any]:
    return dict(reversed(key.items()))


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    message = r"^{}: damaged, or not the state of an analysis. Discard the state and start again.$"
    for content in (b"", b"broken", left_by(tmp_path / "other", 9).read_bytes()[:-30]):
        path.write_bytes(content)
        with pytest.raises(ResumeError, match=message.format(path)):
            Phases(path)
    foreign: Any
    for foreign in ({"name": "", "products": 0, "value": {}}, {"key": {}, "done": {}}, [1]):
        torch.save(foreign, path)
        with pytest.raises(ResumeError, match=message.format(path)):
            Phases(path)


def test_a_damaged_result_is_refused(tmp_path: Path) -> None:
    path = left_by(tmp_path / "state", uninterrupted()[1] - 1)
    file = beside(path, 2)
    whole = file.read_bytes()
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path) - {file.name}}
    flipped = [bytes([*whole[:i], whole[i] ^ 1 << i % 8, *whole[i + 1 :]]) for i in range(0, len(whole), 23)]
    cut = [whole[:n] for n in range(0, len(whole), 151)]
    for damaged in [*flipped, *cut, whole + b"\0", whole + whole, b"\0" * len(whole)]:
        file.write_bytes(damaged)
        phases, op = Phases(path), Limited(matrix(), -1)
        phases.run("symmetry", op, never)
        with pytest.raises(ResumeError, match=f"^{file}: damaged, or not the state of an analysis. Discard"):
            phases.run("pairs", op, never)
    file.write_bytes(beside(path, 1).read_bytes())
    with pytest.raises(ResumeError, match=rf"^{file}: holds the phase 'symmetry', not 'pairs'. Discard the state"):
        analyse(Phases(path), Limited(matrix(), -1))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    file.unlink()  # computed again, the others are taken but for the one under way
    phases, op = Phases(path), Limited(matrix())
    expected, products = uninterrupted()
    assert same(analyse(phases, op), expected)
    assert phases.products == products
    assert op.computed < products - 20


class FullDisk:
    """A file of which only the first `room` bytes find a place."""

    def __init__(self, file: Any, room: int, error: BaseException) -> None:
        self.file, self.room, self.error = file, room, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        if len(data) > self.room:
            self.file.write(bytes(data)[: self.room])
            raise self.error
        self.room -= len(data)
        return int(self.file.write(data))


@pytest.mark.parametrize("room", [0, 300, 900])
@pytest.mark.parametrize("full", ["state", "state.1", "state.2", "state.journal"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()])
def test_a_full_disk_is_reported_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str, room: int, error: OSError | KeyboardInterrupt
) -> None:
    """Or Ctrl-C: in the same places."""
    path = tmp_path / "state"
    expected, products = uninterrupted()
    plain = Path.open

    def opening(self: Path, *arguments: Any, **options: Any) -> Any:
        file: Any = plain(self, *arguments, **options)
        written = self.name == full or re.fullmatch(rf"\.{full}\.[0-9a-f]+\.part", self.name)
        return FullDisk(file, room, error) if written else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opening)
        op = Limited(matrix())
        with pytest.raises(type(error)) as caught:
            analyse(Phases(path), op)
    assert caught.value is error
    if isinstance(error, OSError):
        assert error.filename == str(tmp_path / full)
    left = {
        "state": set(),
        "state.1": {"state", "state.journal"},
        "state.2": {"state", "state.1", "state.journal"},
        "state.journal": {"state", "state.journal"} | ({"state.1"} if room > 500 else set()),
    }
    assert names(tmp_path) == left[full]
    phases, second = Phases(path), Limited(matrix())
    assert same(analyse(phases, second), expected)
    assert phases.products == products
    assert second.computed <= products - op.computed + BLOCK * (full == "state.journal")


def test_a_limit_on_the_size_of_files_is_reported(tmp_path: Path) -> None:
    """As the system tells it, anywhere in a file: no error of torch's own."""
    value = {"a": torch.zeros(100_000), "b": torch.zeros(30_000), "c": "c" * 10_000}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    Phases(tmp_path / "whole").run("b", Limited(matrix()), lambda op: value)
    size = beside(tmp_path / "whole", 1).stat().st_size
    for limit in (0, 100, 5_000, 200_000, 405_000, 420_000, 500_000, size - 400, size - 5, size - 4, size - 1):
        path = tmp_path / f"{limit}"
        Phases(path).run("a", Limited(matrix()), lambda op: {"x": 1.0})
        phases = Phases(path)
        phases.run("a", Limited(matrix()), never)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError) as caught:
                phases.run("b", Limited(matrix()), lambda op: value)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.errno == errno.EFBIG
        assert caught.value.filename == str(beside(path, 2))
        assert not beside(path, 2).exists()
    assert not list(tmp_path.glob(".*"))


def test_a_path_that_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    op = Limited(matrix())
    with pytest.raises(OSError) as caught:
        analyse(Phases(tmp_path / "file" / "state"), op)
    assert str(tmp_path / "file") in caught.value.filename
    assert op.computed == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    path = left_by(tmp_path / "state", 9)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError) as caught:
            analyse(Phases(path), Limited(matrix()))
    finally:
        tmp_path.chmod(0o700)
    assert caught.value.filename == str(beside(path, 2))
    assert same(analyse(Phases(path), Limited(matrix())), uninterrupted()[0])


def large_result(path: Path) -> None:
    value = {"x": torch.zeros(LARGE // 4).add_(1)}
    for compute in (lambda op: value, never):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        Phases(path).run("large", Limited(matrix()), compute)
        sys.stdout.write(f"{1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)}\n")
        value.clear()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 3:
        large_result(Path(sys.argv[1]))
        sys.exit()
    for how, limit in [*itertools.product(HOWS, KILLED_AT), ("second", 0)]:
        child = os.fork()
        if child == 0:
            killed_analysis(Path(sys.argv[1]) / (f"{how}-{limit}" if how in HOWS else how), how, limit)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
