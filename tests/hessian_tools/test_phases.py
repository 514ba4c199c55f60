"""Phases interrupted anywhere, in any way, end as if they had not been. As a script, this file gets itself killed."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessian_tools import phases as module
from hessian_tools.density import density
from hessian_tools.lanczos import eigenpairs
from hessian_tools.objective import make_objective
from hessian_tools.operators import Composed, Dense, Operator, hessian, scaled, symmetry_error
from hessian_tools.phases import Phases, ResumeError
from hessian_tools.trace import probe_forms

SIZE = 24
BLOCK = 3  # vectors of the largest block: an interruption may lose all of them but one, counted in vain
KILLED_AT = (0, 1, 2, 9, 40)  # products behind which the script is killed
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


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def analyse(phases: Phases, op: Operator, seed: int = 0) -> dict[str, Any]:
    """Blocks and single vectors, one phase behind another, one on an operator made of `op`."""
    error = phases.run("symmetry", op, lambda op: {"error": symmetry_error(op, generator(seed))})
    pairs = phases.run("pairs", op, lambda op: vars(eigenpairs(op, 3, 1, generator=generator(seed + 1), tol=1e-6)))
    spread = phases.run("density", op, lambda op: vars(density(op, probes=2, steps=8, generator=generator(seed + 2))))

    def trace(op: Operator) -> dict[str, Any]:
        random = generator(seed + 3)
        return {"forms": torch.stack([torch.stack(probe_forms(op, 3, random)) for _ in range(3)])}

    forms = phases.run("trace", op, trace)
    unlike = scaled(op, torch.linspace(1, 2, SIZE))
    top = phases.run("scaled", unlike, lambda op: vars(eigenpairs(op, 1, generator=generator(seed + 4))))
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
    """What an analysis leaves that is interrupted behind `limit` products."""
    with pytest.raises(KeyboardInterrupt):
        analyse(Phases(path, key), Limited(matrix(), limit))
    return path


def journal(path: Path) -> Path:
    return path.with_name(f"{path.name}.journal")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_interrupted_at_any_product(tmp_path: Path, dtype: torch.dtype) -> None:
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
        again = Phases(path)
        assert same(analyse(again, Limited(matrix(dtype=dtype), -1)), expected)  # nothing left to compute
        assert again.products == products


def test_interrupted_again_and_again(tmp_path: Path) -> None:
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
    """Ends with SIGKILL; called in a process of its own."""
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
    if how in ("replace", "unlink"):  # just before the results of the phase are there, just behind it
        owner: Any = os if how == "replace" else Path
        original = getattr(owner, how)
        setattr(owner, how, lambda *a, **k: kill() if op.computed >= max(limit, 1) else original(*a, **k))
    analyse(Phases(path), op)


HOWS = ("product", "record", "replace", "unlink")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, __file__, str(folder)], check=True, env={**os.environ, "PYTHONPATH": str(root)})
    return folder


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("limit", KILLED_AT)
def test_killed(killed: Path, how: str, limit: int) -> None:
    expected, products = uninterrupted()
    path = killed / f"{how}-{limit}"
    assert path.exists()
    op, phases = Limited(matrix()), Phases(path)
    assert same(analyse(phases, op), expected)
    assert phases.products == products
    assert op.computed <= products - limit + BLOCK - 1 + BLOCK * (how == "record")


# ------------------------------------------------------------------------------------------------- damaged, stale, full
def test_a_damaged_journal_counts_up_to_the_damage(tmp_path: Path) -> None:
    expected, products = uninterrupted()
    left = left_by(tmp_path / "left", 12)
    whole = journal(left).read_bytes()
    record = 20 + 8 * SIZE
    assert len(whole) == 10 * record  # the symmetry's two are done
    flipped = [bytes([*whole[:i], whole[i] ^ 1 << i % 8, *whole[i + 1 :]]) for i in range(0, len(whole), 61)]
    heads = [bytes([*whole[:i], whole[i] ^ 16, *whole[i + 1 :]]) for i in range(3 * record, 3 * record + 20)]
    cut = [whole[:n] for n in range(0, len(whole), 151)]
    longer = [whole + b"\0" * n for n in (1, 19, 20, 21, 500)] + [whole + whole]
    for damaged in [*flipped, *heads, *cut, *longer, b"\0" * len(whole), whole[record:]]:
        path = Path(shutil.copy(left, tmp_path / "state"))
        journal(path).write_bytes(damaged)
        good = next((i for i in range(10) if damaged[: (i + 1) * record] != whole[: (i + 1) * record]), 10)
        op, phases = Limited(matrix()), Phases(path)
        if damaged == whole + whole:  # good records that no run writes: not what this one asks for
            with pytest.raises(ResumeError, match="does not repeat"):
                analyse(phases, op)
            continue
        if damaged == whole[record:]:
            with pytest.raises(ResumeError, match="does not repeat"):
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
        return phases.run("pairs", op, lambda op: vars(eigenpairs(op, 3, generator=generator(0))))

    path = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        pairs(Phases(path), Limited(matrix(), 9))
    path.unlink()
    assert same(pairs(Phases(path), Limited(matrix(1))), pairs(Phases(), Limited(matrix(1))))
    left_by(tmp_path / "other", 9)
    Phases.remove(tmp_path / "other")
    Phases.remove(tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_other_vectors_are_refused(tmp_path: Path) -> None:
    path = left_by(tmp_path / "state", 20)
    left = journal(path).read_bytes()
    with pytest.raises(ResumeError, match=r"state.journal: this machine does not repeat .* bit for bit"):
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
        with pytest.raises(ResumeError, match=rf"^{path}: {names} since the analysis was interrupted: .*--force$"):
            Phases(path, {**key, **changes})
    with pytest.raises(ResumeError, match="the data changed"):
        Phases(path, {name: value for name, value in key.items() if name != "data"})
    assert (path.read_bytes(), journal(path).read_bytes()) == before


def reversed_(key: dict[str, Any]) -> dict[str, Any]:
    return dict(reversed(key.items()))


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    for content in (b"", b"broken", left_by(tmp_path / "other", 9).read_bytes()[:-30]):
        path.write_bytes(content)
        with pytest.raises(ResumeError, match="not the state of an interrupted analysis"):
            Phases(path)
    foreign: Any
    for foreign in ({"key": "[1]", "done": {}}, {"done": {}}, {"key": {}, "done": 3}, [1]):
        torch.save(foreign, path)
        with pytest.raises(ResumeError, match="not the state of an interrupted analysis"):
            Phases(path)


class FullDisk:
    """A file of which only the first `room` bytes find a place."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        if len(data) > self.room:
            self.file.write(bytes(data)[: self.room])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= len(data)
        return int(self.file.write(data))


@pytest.mark.parametrize("full", ["journal", "state", "first state"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    path = tmp_path / "state"
    expected, products = uninterrupted()
    plain = Path.open
    opened: list[Path] = []

    def opening(self: Path, *arguments: Any, **options: Any) -> Any:
        opened.append(self)
        file: Any = plain(self, *arguments, **options)
        if self.suffix == ".journal":
            return FullDisk(file, 1000 if full == "journal" else 10**9)
        states = sum(p.suffix == ".part" for p in opened)
        return FullDisk(file, 10**9 if full == "journal" or (full == "state" and states <= 2) else 300)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opening)
        op = Limited(matrix())
        with pytest.raises(OSError, match="No space left") as caught:
            analyse(Phases(path), op)
    wanted = journal(path) if full == "journal" else path
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(wanted)
    names = {"journal": {"state", "state.journal"}, "state": {"state", "state.journal"}, "first state": set()}
    assert {p.name for p in tmp_path.iterdir()} == names[full]
    phases, second = Phases(path), Limited(matrix())
    assert same(analyse(phases, second), expected)
    assert phases.products == products
    assert second.computed <= products - op.computed + (full == "journal")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    op = Limited(matrix())
    with pytest.raises(OSError) as caught:
        analyse(Phases(tmp_path / "file" / "state"), op)
    assert str(tmp_path / "file") in caught.value.filename
    assert op.computed == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    path = left_by(tmp_path / "state", 9)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError) as caught:
            analyse(Phases(path), Limited(matrix()))
    finally:
        tmp_path.chmod(0o700)
    assert caught.value.filename == str(path)
    assert same(analyse(Phases(path), Limited(matrix())), uninterrupted()[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for how in HOWS:
        for limit in KILLED_AT:
            child = os.fork()
            if child == 0:
                killed_analysis(Path(sys.argv[1]) / f"{how}-{limit}", how, limit)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
