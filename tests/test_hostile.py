"""Tests that damaged, hostile and foreign files are refused.

The command prints one line that starts with the file's name and ends with exit code 2. It executes no code from the
file and allocates little memory. tests/fuzz.py runs the same checks on many more files.
"""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzz
import pytest
import torch
from command_tools import limited

from hessian_tools.io import torch_archive as archive
from ikun.adapters import AdapterError, load_weights, read_weights
from ikun.checkpoint import CheckpointError, load_checkpoint
from ikun_hessian.cli.main import run

ROOT = Path(__file__).parents[1]
Capture = pytest.CaptureFixture[str]
WRONG = "wrong"


@pytest.fixture
def fast() -> Iterator[Path]:
    """A folder in memory."""
    with tempfile.TemporaryDirectory(dir=fuzz.MEMORY) as folder:
        yield Path(folder)


# ---------------------------------------------------------------- the fuzzer, for a few seconds
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_short_run_of_the_fuzzer(kind: str, fast: Path) -> None:
    assert fuzz.attempt(kind, fuzz.KINDS[kind].valid(), fast) == ""
    wrong, taken = [], 0
    for number in range({"checkpoint": 1000, "nir": 20}.get(kind, 300)):  # every NIR file is read in a separate process
        try:
            taken += not fuzz.attempt(kind, fuzz.mutated(kind, 0, number), fast)
        except AssertionError as error:
            wrong.append(f"--kind {kind} --seed 0 --only {number}: {error}")
    assert not wrong
    assert 0 < taken < 900  # both happen


def test_every_prefix_of_a_checkpoint_is_refused(fast: Path) -> None:
    whole, path = fuzz.trained()["checkpoint"], fast / "a.pt"
    for size in [*range(0, len(whole) - 200, 7), *range(len(whole) - 200, len(whole))]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path)
        fuzz.one_line(str(caught.value), path)


# ---------------------------------------------------------------- no code, no memory
def pickled(body: bytes) -> bytes:
    """An archive as torch writes it, with this pickle."""
    parts = [(n, body if n.endswith("/data.pkl") else c) for n, c in fuzz.entries(fuzz.trained()["checkpoint"])]
    return fuzz.archived(parts)


def bomb_of_zeros() -> bytes:
    parts = fuzz.entries(fuzz.trained()["checkpoint"])
    zeros = [(n, b"\0" * 2**28 if n.endswith("/data/0") else c) for n, c in parts]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for name, content in zeros:
            packed.writestr(name, content)
    return file.getvalue()


def claims(size: int) -> bytes:
    """Make the first entry claim this many bytes."""
    data = bytearray(fuzz.archived(fuzz.entries(fuzz.trained()["checkpoint"])))
    place = data.index(b"PK\1\2")
    data[place + 20 : place + 28] = struct.pack("<II", size, size)
    return bytes(data)


def overlapping() -> bytes:
    """Many entries, all of them the same 8 MB of the file."""
    parts = [("archive/data.pkl", b"\x80\x02}."), ("archive/data/0", b"\0" * 2**23)]
    data = fuzz.archived(parts)
    start = data.index(b"PK\1\2", 2**23)
    second = data.index(b"PK\1\2", start + 4)
    end = data.index(b"PK\5\6", second)
    copies = b"".join(data[second:end].replace(b"data/0", b"dat%03d" % i) for i in range(200))
    directory = data[start:end] + copies
    return data[:start] + directory + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 202, 202, len(directory), start, 0)


def old(values: Any) -> bytes:
    """A file of torch before 1.6."""
    file = io.BytesIO()
    torch.save(values, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


OLD = old({"a": torch.zeros(0)})  # ends with the number of elements
# name: the file, and what its line says
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "compressed": (bomb_of_zeros, "compressed"),
    "claims 4 GB": (lambda: claims(2**32 - 2), "claim"),
    "overlapping": (overlapping, ""),
    "bytearray": (lambda: pickled(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x02\x85R."), "need code"),
    "storage": (lambda: pickled(b"\x80\x02ctorch.storage\nUntypedStorage\n\x8a\x06\0\0\0\0\0\x02\x85R."), "need code"),
    "many lists": (lambda: pickled(b"\x80\x02" + b"]" * 10_000_001 + b"."), "more than"),
    "a long pickle": (lambda: pickled(b"\x80\x02" + b"N" * (2**26 + 1)), "in addition to the weights"),
    "a long name": (lambda: pickled(b"\x80\x02c" + b"a" * 10**6 + b"\nb\n."), "damaged"),
    "lists of lists": (
        lambda: pickled(b"\x80\x02]" + b"".join(b"q\0](h\0h\0h\0h\0e" for _ in range(60)) + b"."),
        "many times",
    ),
    "deep": (lambda: pickled(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."), "levels deep"),
    "many entries": (
        lambda: fuzz.archived([("archive/data.pkl", b"\x80\x02}."), *((f"archive/{i}", b"") for i in range(60_000))]),
        "",
    ),
    "nested zip": (lambda: fuzz.archived([("archive/data.pkl", fuzz.trained()["checkpoint"])]), "damaged"),
    "a far memo": (lambda: pickled(b"\x80\x02Nr\xff\xff\xff\x7f."), "NoneType"),
    "a slow key": (  # hashing it would take 2^40 steps
        lambda: pickled(b"\x80\x02}NN\x86" + b"".join(b"q\0h\0\x86" for _ in range(40)) + b"Ns."),
        "need code to load (builtins.tuple)",
    ),
    "keys of one hash": (
        lambda: pickled(
            b"\x80\x02}("
            + b"".join(b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(10**5))
            + b"u."
        ),
        "need code to load (builtins.int)",
    ),
    "a large tensor": (
        lambda: pickled(
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((U\7storagectorch\nFloatStorage\nU\0010U\3cpuK\1tQ"
            b"K\0J\xff\xff\xff\x7f\x85K\1\x85\x89NtR."
        ),
        "larger than its storage",
    ),
    "an old file that claims much": (
        lambda: OLD[:-8] + b"\xff" * 8,
        "too short or too long",
    ),
    "safetensors that claim much": (
        lambda: struct.pack("<Q", 2**62) + b"{}" + b" " * 100,
        "not a .pt file",
    ),
    "a long header": (lambda: struct.pack("<Q", 2**23) + b"{" * 2**23 + b" ", "with a header of more than"),
    "the old format": (lambda: b"\x80\x02" + b"]" * 100, "before 1.6"),
}
MEASURE = """
import resource, sys, time
sys.path.insert(0, sys.argv.pop())
import torch
from ikun.checkpoint import CheckpointError, load_checkpoint
for path in sys.argv[1:]:
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        load_checkpoint(path)
        line = "taken"
    except CheckpointError as error:
        line = str(error)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    print(f"{grown:.0f} {time.process_time() - began:.1f} {line}")
"""


def test_compressed_bombs_take_no_memory(tmp_path: Path) -> None:
    paths = []
    for name, (make, _) in BOMBS.items():
        paths.append(tmp_path / f"{name.replace(' ', '-')}.pt")
        paths[-1].write_bytes(make())
    script = [sys.executable, "-c", MEASURE, *map(str, paths), str(ROOT)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr, len(lines)) == (0, "", len(paths))
    for path, (_, part), line in zip(paths, BOMBS.values(), lines, strict=True):
        grown, seconds, message = line.split(" ", 2)
        assert message.startswith(f"{path}: "), message
        assert part in message.removeprefix(f"{path}: "), line
        assert int(grown) < 200, line  # MiB
        assert float(seconds) < 20, line
        if path.stat().st_size < 10**6:  # the larger ones take time
            with pytest.raises(AdapterError):
                read_weights(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths)  # nothing was run


def test_weights_that_share_their_storage_cannot_ask_for_a_large_network(fast: Path) -> None:
    values = torch.load(io.BytesIO(fuzz.trained()["checkpoint"]), weights_only=True)
    values["network"] |= {"hidden": [64] * 1000, "norm": "none"}
    shared = torch.zeros(64, 64)
    values["state"] = {f"fc{i + 1}.weight": shared for i in range(1001)}
    values["state"] |= {"fc1.weight": shared, "fc1001.weight": shared[:10]}
    torch.save(values, fast / "a.pt")
    with pytest.raises(CheckpointError, match="not stored in full"):
        load_checkpoint(fast / "a.pt")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float, fast: Path) -> None:
    net = torch.nn.Linear(2, 2)
    torch.save({"weight": torch.tensor([[1, bad], [0, 0]]), "bias": torch.zeros(2)}, fast / "a.pt")
    with pytest.raises(AdapterError, match="NaN or infinite weights: weight"):
        load_weights(net, read_weights(fast / "a.pt"))


# ---------------------------------------------------------------- the commands
def ends(capsys: Capture, path: Path, *arguments: str) -> str:
    """The one line of a command that ends within a minute with exit code 2; it names the file."""
    capsys.readouterr()
    with limited(60):
        assert run(list(arguments)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("opening ")]
    assert len(lines) == 1, lines
    assert str(path) in lines[0], lines
    return lines[0]


def special(folder: Path, name: str, kind: str) -> Path:
    path = folder / name
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "nowhere":
        path.symlink_to(folder / "nothing")
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(2**41)
    else:
        path.symlink_to(kind)
    return path


@pytest.mark.parametrize("kind", ["folder", "pipe", "empty", "loop", "nowhere", "huge", "/dev/zero", "/dev/random"])
def test_paths_that_are_not_files_are_refused(kind: str, fast: Path, capsys: Capture) -> None:
    checkpoint = special(fast, "a.pt", kind)
    for command in ("info", "spectrum", "flatness"):
        ends(capsys, checkpoint, command, str(checkpoint))
    result = special(fast, "b.spectrum.json", kind)
    if kind != "folder":
        ends(capsys, result, "compare", str(result))
        ends(capsys, result, "figures", str(result))
    named = special(fast, "c.toml", kind)
    ends(capsys, named, "study", str(named), "--out", str(fast / "out"))


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero"])
def test_a_log_that_is_not_a_file_is_skipped(kind: str, fast: Path, capsys: Capture) -> None:
    (fast / "a.train.json").write_bytes(fuzz.trained()["record"])
    special(fast, "a.train.jsonl", kind)
    with limited(60):
        assert run(["compare", str(fast)]) == 2
    assert "a.train.jsonl: not a regular file" in capsys.readouterr().err


CHANGES: dict[str, dict[str, Any]] = {
    "newer": {"schema": "ikun-hessian/checkpoint/2"},
    "other shape": {"network": {"input_shape": [1, 16, 5]}},
    "fewer classes": {"network": {"classes": 3}},
    "long": {"network": {"timesteps": 10**12}},
    "unknown init": {"training": {"init": "magic"}},
    "odd training": {"training": {"lr": "0.1"}},
    "huge seed": {"data": {"seed": 10**30}},
    "all held out": {"data": {"held_out": 10**12}},
    "image size": {"data": {"image_size": 10**12}},
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("command", ["info", "spectrum"])
def test_hostile_fields_of_a_checkpoint_end_in_one_line(name: str, command: str, fast: Path, capsys: Capture) -> None:
    values = torch.load(io.BytesIO(fuzz.trained()["checkpoint"]), weights_only=True)
    for part, change in CHANGES[name].items():
        values[part] = change if isinstance(change, str) else {**values[part], **change}
    path = fast / "a.pt"
    torch.save(values, path)
    if (name, command) == ("unknown init", "spectrum"):
        return  # which does not ask for it
    ends(capsys, path, command, str(path))


@pytest.mark.parametrize("raw", ["NaN", "1e999", "1" * 5000, "[" * 10**5, "1" * 400, '{"schema": 1}', '"\x00"'])
def test_damaged_results_end_in_one_line(raw: str, fast: Path, capsys: Capture) -> None:
    values = json.loads(fuzz.made_results()["spectrum"])
    path = fast / "a.spectrum.json"
    path.write_text(json.dumps({**values, "num_parameters": WRONG}).replace(f'"{WRONG}"', raw))
    ends(capsys, path, "compare", str(path))
    ends(capsys, path, "figures", str(path), "--out", str(fast))


def test_a_storage_that_claims_more_than_is_there(fast: Path) -> None:
    path = fast / "a.pt"
    torch.save({"w": torch.zeros(11)}, path)
    whole = path.read_bytes()
    assert list(archive.read_archive(path)["w"]) == [0.0] * 11
    pickled = next(content for name, content in fuzz.entries(whole) if name == "a/data.pkl")
    assert pickled.count(b"K\x0bt") == 1  # the storage's size, the last of its five words
    for count in (12, 255, 10):  # a storage that is shorter than its tensor is torch's own to refuse
        path.write_bytes(fuzz.patched(whole, "a/data.pkl", pickled.replace(b"K\x0bt", bytes([ord("K"), count]) + b"t")))
        with pytest.raises(archive.ArchiveError, match="claims more bytes" if count > 11 else "damaged"):
            archive.read_archive(path)
