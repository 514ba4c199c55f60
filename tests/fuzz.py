"""Fuzzer for every file that the commands read. It makes damaged, hostile and foreign files from valid ones.

    python tests/fuzz.py --count 20000 --seed 1 [--kind checkpoint]

It prints every case that was not handled: a traceback, a message that is not one line starting with the file's name,
executed code, memory beyond the limit, or an invalid file that was accepted. `--seed 1 --only 1234` repeats one case.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import io
import json
import math
import os
import pickletools
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
import typing
import warnings
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # before tests/hessian_tools, which is no package

import click
import numpy as np
import run_tools
import torch

from hessian_tools.io import json as results
from hessian_tools.results import calibration, flatness, landscape, robustness
from hessian_tools.results.comparability import comparable, labelled
from hessian_tools.results.spectrum import load_spectrum, to_json
from ikun.adapters import read_weights
from ikun.adapters.libraries.nir import read_nir
from ikun.checkpoint import load_checkpoint
from ikun.data.spec import DataSpec
from ikun.networks import Network, Spec
from ikun.training import loop as training
from ikun.training.resume import read_resume
from ikun.training.spec import TrainingSpec
from ikun_hessian.experiments import runs
from ikun_hessian.experiments.study import grid, plan, preset
from ikun_hessian.reports.spectrum import compare_lines

ROOT = Path(__file__).parents[1]
LONGEST_LINE = 1500
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # for files of no use later
Rng = random.Random
Mutate = Callable[[bytes, Rng], bytes]


# ---------------------------------------------------------------- valid files
SPEC = Spec(model="mlp", hidden=(3,), timesteps=2)


@cache
def trained() -> dict[str, bytes]:
    """A training that was interrupted in its third epoch: state to resume from, log, description, snapshot."""

    def stop(done: int, _: int, __: str) -> None:
        if done > 4:
            raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "a.pt"
        spec = TrainingSpec(epochs=4, batch_size=32, snapshots=4)
        with suppress(KeyboardInterrupt):
            training.train(SPEC, DataSpec("digits", 64), spec, out, progress=stop)
        files = {
            "resume": "a.pt.resume",
            "log": "a.train.jsonl",
            "record": "a.train.json",
            "checkpoint": "a.epoch0001.pt",
        }
        return {kind: (Path(folder) / name).read_bytes() for kind, name in files.items()}


@cache
def weights() -> bytes:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "epoch": 3, "args": {"lr": 0.1, "name": "a"}}, file)
    return file.getvalue()


def published_values() -> dict[str, Any]:
    """What a training framework saves: weights with a prefix, and objects of many classes beside them."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    return {
        "state_dict": {f"model.{name}": t for name, t in net.state_dict().items()},
        "hyper_parameters": argparse.Namespace(lr=0.1, out=Path("runs"), device=torch.device("cpu")),
        "callbacks": defaultdict(dict, {"best": {"score": np.float64(0.9), "table": np.ones((2, 3))}}),
        "seen": {1, 2},
        "names": frozenset({"a"}),
        "date": datetime.datetime(2024, 1, 2),
        "counts": Counter({"a": 3}),
        "optimizer_states": [torch.optim.SGD(net.parameters(), 0.1, momentum=0.9).state_dict()],
    }


@cache
def published(old: bool) -> bytes:
    torch.manual_seed(0)
    file = io.BytesIO()
    torch.save(published_values(), file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


def safetensors_file(tensors: dict[str, torch.Tensor]) -> bytes:
    """The tensors in the format of the package safetensors."""
    kinds = {torch.float32: "F32", torch.int64: "I64", torch.float16: "F16", torch.bool: "BOOL"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, t in tensors.items():
        raw = t.contiguous().numpy().tobytes()
        offsets = [len(body), len(body) + len(raw)]
        header[name] = {"dtype": kinds[t.dtype], "shape": list(t.shape), "data_offsets": offsets}
        body += raw
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


@cache
def safe_weights() -> bytes:
    torch.manual_seed(0)
    return safetensors_file(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict())


@cache
def made_results() -> dict[str, bytes]:
    """A result of every command."""
    run = run_tools.make_run()
    found: dict[str, Any] = {
        "spectrum": run.spectra[""],
        "flatness": run.flatness[""],
        "robustness": {**filled(robustness.RobustnessResult), "schema": robustness.ROBUSTNESS_SCHEMA},
        "landscape": {**filled(landscape.LandscapeResult), "schema": landscape.LANDSCAPE_SCHEMA},
        "calibration": {**filled(calibration.CalibrationResult), "schema": calibration.CALIBRATION_SCHEMA},
    }
    plain = {kind: r if isinstance(r, dict) else dataclasses.asdict(r) for kind, r in found.items()}
    return {kind: json.dumps(results.clean(values)).encode() for kind, values in plain.items()}


def filled(hint: Any) -> Any:
    """Something that fits an annotation, as JSON has it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return {name: filled(kind) for name, kind in typing.get_type_hints(hint).items()}
    if origin is dict:
        return {"a": filled(arguments[1]), "b": filled(arguments[1])}
    if origin is tuple:
        return [filled(arguments[0]) for _ in range(2)]
    return {str: "a", int: 3, float: 0.5, bool: True, Any: 1}[hint]


@cache
def graph() -> bytes:
    """A .nir file."""
    import nir
    import numpy as np

    ones = np.ones(3)
    nodes = {
        "input": nir.Input({"input": np.array([2])}),
        "fc": nir.Linear(np.ones((3, 2))),
        "lif": nir.LIF(tau=ones, r=ones, v_leak=0 * ones, v_threshold=ones, v_reset=0 * ones),
        "output": nir.Output({"output": np.array([3])}),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.nir"
        nir.write(path, nir.NIRGraph(nodes, [("input", "fc"), ("fc", "lif"), ("lif", "output")]))
        return path.read_bytes()


PRESET = b"""title = "A study"
question = "Which?"
by = "init"
accuracy = 0.9
seeds = 2
figures = ["epochs", "ranks"]

[train]
data = "digits"
epochs = 4
save-at-loss = [0.02, 0.05]
channels = 2

[vary]
init = ["ikun", "kaiming"]
optimizer = ["adam", "sgd"]

[when.optimizer.sgd]
lr = 0.1
[[spectrum]]
at = ["final", "loss"]
[[spectrum]]
tag = "published"
samples = 1
[flatness]
samples = 64
[robustness]
draws = 4

[quick]
seeds = 1
[quick.train]
epochs = 1
[[quick.spectrum]]
top = 2
"""


# ---------------------------------------------------------------- code in pickles
exploded: list[str] = []


def explode(*_: Any) -> str:
    exploded.append("code from a file was run")
    return "boom"


class Bomb:
    """Pickles as a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def bombs(rng: Rng) -> Any:
    touch = "__import__('fuzz').explode()"
    return rng.choice(
        [
            Bomb(explode, ()),
            Bomb(os.system, ("touch exploded",)),
            Bomb(eval, (touch,)),
            Bomb(exec, (touch,)),
            Bomb(getattr, (Bomb(__import__, ("fuzz",)), "explode")),
            Bomb(bytearray, (10**11,)),
            Bomb(torch.Tensor, (10**11,)),
            Bomb(torch.zeros, (10**6, 10**6)),
            Bomb(torch.device, ("cuda:99",)),
            Bomb(open, ("/dev/zero",)),
            [Bomb(map, (explode, [1]))],
            {"a": {"b": Bomb(Path, ("/",))}},
            Network(SPEC),
        ]
    )


# ---------------------------------------------------------------- values
def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in nested dicts and lists, containers too."""
    found = [path]
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found += leaves(item, (*path, key))
    return found


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with `new` at `path`."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(copy[path[0]], path[1:], new)
    return copy


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def laughs() -> Any:
    """A few lists that hold 10^9 numbers."""
    value: Any = [1] * 10
    for _ in range(8):
        value = [value] * 10
    return value


def odd_value(rng: Rng) -> Any:
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    odd = torch.tensor([math.nan, math.inf, -1.0])
    odds: list[Any] = [
        None,
        True,
        False,
        0,
        -1,
        1,
        2,
        3,
        10**12,
        2**31,
        2**63,
        -(2**63),
        2**200,
        0.5,
        -0.0,
        1e308,
        1e-320,
        math.nan,
    ]
    odds += [math.inf, -math.inf, "", "x" * 10**5, "\x1b[31mred", "a\nb", "../../etc/passwd", "atan:1e400", "\ud800"]
    odds += ["mlp", "ikun-hessian/checkpoint/2", [], {}, (), [1, "a"], {"a": 1}, {1: 2}, {None: 3}, {(1,): 2}, b"x"]
    odds += [nested(40), nested(900), laughs(), cyclic, 1j, Ellipsis, odd, torch.zeros(2), torch.zeros(1).expand(10**6)]
    odds += [torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2).to_sparse(), torch.zeros(2, device="meta")]
    odds += [torch.float16, torch.Size([2]), torch.nn.Parameter(torch.ones(2)), [10**6] * 5000, [8, 8, 8], [10**9] * 3]
    return rng.choice(odds)


# ---------------------------------------------------------------- bytes
def damaged(data: bytes, rng: Rng) -> bytes:
    """One to three of: a byte changed, a part removed, doubled, moved, overwritten, or the rest cut off."""
    for _ in range(rng.randint(1, 3)):
        a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        b = min(b, a + 2 ** rng.randint(0, 12))
        how = rng.randrange(7)
        if how <= 1 and a < len(data):
            data = data[:a] + bytes([data[a] ^ (1 << rng.randrange(8))]) + data[a + 1 :]
        elif how == 2:
            data = data[:a] + data[b:]
        elif how == 3:
            data = data[:b] + data[a:]
        elif how == 4:
            data = data[:a] + rng.choice([b"\0", b"\xff", b"(", b"PK\1\2"]) * (b - a) + data[b:]
        elif how == 5:
            data = data[:a] + rng.randbytes(rng.randint(1, 8)) + data[b:]
        else:
            data = data[:a]
        if not data:
            break
    return data


# ---------------------------------------------------------------- archives
def entries(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(entry.filename, archive.read(entry)) for entry in archive.infolist()]


def archived(parts: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """With right checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same name twice
        for name, content in parts:
            archive.writestr(name if name.partition("\0")[0] else f"x{name}", content)
    return file.getvalue()


def patched(data: bytes, name: str, content: bytes) -> bytes:
    """The archive that torch wrote, with other bytes of the same number in an entry and the checksum made right."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entry, start = archive.getinfo(name), archive.start_dir
    assert len(content) == entry.file_size
    old, new = struct.pack("<I", entry.CRC), struct.pack("<I", zipfile.crc32(content))  # type: ignore[attr-defined]
    with io.BytesIO(data) as file:
        file.seek(entry.header_offset + 26)
        first = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    head = data[:first] + content + data[first + entry.file_size : start]
    return head + data[start:].replace(old, new)


def pickle_changed(data: bytes, rng: Rng) -> bytes:
    """One to three opcodes or arguments of a pickle changed, doubled or left out."""
    for _ in range(rng.randint(1, 3)):
        try:
            places = [place for _, _, place in pickletools.genops(data)]
        except Exception:
            return damaged(data, rng)
        i = rng.randrange(len(places) - 1)
        a, b = places[i], places[i + 1]
        how = rng.randrange(6)
        if how == 0:
            data = data[:a] + data[b:]
        elif how == 1:
            data = data[:b] + data[a:]
        elif how == 2:
            number = rng.choice([0, 1, 2, 255, 256, 65535, 2**31 - 1, -1, -(2**31)])
            data = data[:a] + b"J" + struct.pack("<i", number) + data[b:]
        elif how == 3:
            size = rng.choice([2**40, -(2**40), 2**62, 2**200, -1])
            raw = size.to_bytes(32, "little", signed=True)
            data = data[:a] + b"\x8a" + bytes([32]) + raw + data[b:]
        elif how == 4:
            names = "builtins bytearray|os system|torch Tensor|torch.storage UntypedStorage|builtins eval|torch Size"
            names += "|collections Counter|_codecs encode|torch._utils _rebuild_sparse_tensor|torch DoubleStorage"
            names += "|torch.serialization _get_layout|torch._tensor _rebuild_from_type_v2|torch FloatStorage"
            names += "|argparse Namespace|__builtin__ set|torch.nn Linear"
            word = rng.choice(names.split("|")).replace(" ", "\n").encode()
            data = data[:a] + b"c" + word + b"\n" + rng.choice([b"", b")R", b"J\0\0\0\x7f\x85R", b"}b"]) + data[b:]
        else:
            data = data[:a] + rng.choice(b"RbasueNt()]}.Q\x85\x86\x87\x88\x89\x81P0i2").to_bytes(1, "big") + data[b:]
    return data


def archive_changed(data: bytes, rng: Rng) -> bytes:
    """Damage of the file itself, or of what lies within, with checksums that are right again."""
    how = rng.random()
    if how < 0.15:
        return damaged(data, rng)
    parts = entries(data)
    i = rng.randrange(len(parts))
    name, content = parts[i]
    if how < 0.45:
        i = next(k for k, (name, _) in enumerate(parts) if name.endswith("/data.pkl"))
        parts[i] = (parts[i][0], pickle_changed(parts[i][1], rng))
        return archived(parts)
    if how < 0.55 and content:
        k = rng.randrange(len(content))
        special = rng.choice([b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", rng.randbytes(4), b"\0\0\x80\xbf"])
        content = (content[:k] + special + content[k + 4 :])[: len(content)]
        return patched(data, name, content.ljust(len(parts[i][1]), b"\0"))
    if how < 0.6:
        parts[i] = (name, damaged(content, rng) if content else b"x")
    elif how < 0.63:
        parts[i] = (damaged(name.encode(), rng).decode("utf-8", "replace"), content)
    elif how < 0.65:
        del parts[i]
    elif how < 0.68:
        parts.append((rng.choice([name, name.upper(), "other/data.pkl"]), rng.choice(parts)[1]))
    elif how < 0.7:
        return archived(parts, rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))
    else:
        return values_changed(data, rng)
    return archived(parts)


def legacy_changed(data: bytes, rng: Rng) -> bytes:
    """Damage of a file of torch before 1.6, or of one of its pickles."""
    if rng.random() < 0.4:
        return damaged(data, rng)
    ends = [0]
    for _ in range(5):
        ends.append([place for _, _, place in pickletools.genops(data[ends[-1] :])][-1] + 1 + ends[-1])
    i = rng.choice([1, 2, 3, 3, 3, 4])
    return data[: ends[i]] + pickle_changed(data[ends[i] : ends[i + 1]], rng) + data[ends[i + 1] :]


def safetensors_changed(data: bytes, rng: Rng) -> bytes:
    """Damage of a .safetensors file, or of its header, with a length that is right again."""
    if rng.random() < 0.3:
        return damaged(data, rng)
    length = int.from_bytes(data[:8], "little")
    text = json_changed(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def values_changed(data: bytes, rng: Rng) -> bytes:
    """What the file says changed, and written by torch.save: an odd value or code in any place, a key left out."""
    values = published_values() if data == published(old=False) else torch.load(io.BytesIO(data), weights_only=True)
    places = [place for place in leaves(values) if place]
    if rng.random() < 0.6:  # what the file says of itself, and not of an epoch
        places = [place for place in places if place[0] != "history"] or places
    for _ in range(rng.choice([1, 1, 2])):
        place = rng.choice(places)
        with suppress(KeyError, IndexError, TypeError):  # the second may stand in what the first replaced
            values = put(values, place, bombs(rng) if rng.random() < 0.2 else odd_value(rng))
    file = io.BytesIO()
    try:
        torch.save(values, file)
    except Exception:  # some of it cannot be pickled
        return damaged(data, rng)
    return file.getvalue()


# ---------------------------------------------------------------- JSON
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000, "[" * 100_000 + "]" * 100_000, "null", "true"]
RAW += ['"x"', '""', "[]", "{}", "[[[]]]", "0", "1e308", "-1e-320", '"\\ud800"', '"\\u001b[31m"', "1" * 400, "1" * 25]
RAW += ['{"a": 1, "a": 2}', "[1, null]", "1.5", '"a\\nb"', "2147483648", '{"": {}}', '"' + "y" * 10**5 + '"', "nul", ""]


def json_changed(data: bytes, rng: Rng) -> bytes:
    if rng.random() < 0.15:
        return damaged(data, rng)
    if rng.random() < 0.03:
        return data.decode().encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"]))
    values = json.loads(data)
    raw: dict[str, str] = {}
    for i in range(rng.choice([1, 1, 1, 2, 3])):
        place = rng.choice(leaves(values))
        if place and rng.random() < 0.1:
            parent = values
            for key in place[:-1]:
                parent = parent[key]
            del parent[place[-1]]
            continue
        raw[f'"@@{i}@@"'] = rng.choice(RAW)
        values = put(values, place, f"@@{i}@@")
    text = json.dumps(values)
    for mark, token in raw.items():
        text = text.replace(mark, token)
    return text.encode("utf-8", "surrogatepass")


def log_changed(data: bytes, rng: Rng) -> bytes:
    lines = data.splitlines()
    i = rng.randrange(len(lines))
    return b"\n".join([*lines[:i], json_changed(lines[i], rng), *lines[i + 1 :]]) + rng.choice([b"", b"\n"])


# ---------------------------------------------------------------- TOML
TOML = ["nan", "-inf", "1e400", "9" * 5000, "9" * 30, "[" * 5000 + "]" * 5000, "[[1]]", '""', '"x"', "true", "-1", "0"]
TOML += [
    "1.5",
    "1979-05-27",
    "{a = 1}",
    "[]",
    '"\\u001b[31m"',
    '[""]',
    "[nan]",
    "[1, 'a', true]",
    f'"{"y" * 10**5}"',
    "",
]
TOML += ["['ikun', 'ikun']", "1_000_000_000_000", "0x7fffffffffffffff", "{}", "[{}]", "'''a\nb'''", '"../.."']


def toml_changed(data: bytes, rng: Rng) -> bytes:
    if rng.random() < 0.15:
        return damaged(data, rng)
    lines = data.decode().splitlines()
    for _ in range(rng.choice([1, 1, 2])):
        i = rng.randrange(len(lines))
        how = rng.randrange(6)
        if how == 0:
            del lines[i]
        elif how == 1:
            lines.insert(i, rng.choice(lines))
        elif how == 2 and lines[i].startswith("["):
            lines[i] = rng.choice(["[train]", "[vary]", "[[vary]]", "[quick.vary]", "[when.a.b]", "[a]", "[[train]]"])
        elif "=" in lines[i]:
            key = lines[i].partition("=")[0]
            key = rng.choice(["a", '"\\u001b"', "seed", "seeds", "at", "tag"]) if rng.random() < 0.2 else key
            lines[i] = f"{key} = {rng.choice(TOML)}"
    return "\n".join(lines).encode()


# ---------------------------------------------------------------- checks: what a file that is taken must be
def plain(value: Any) -> None:
    """JSON would take it, and a screen."""
    text = json.dumps(value)
    assert len(text) < 10**7
    text.encode()


def check_checkpoint(path: Path) -> None:
    found = load_checkpoint(path)
    expected = Network(found.network).state_dict()
    assert all(torch.isfinite(t).all() and t.shape == expected[k].shape for k, t in found.state.items())
    assert sum(t.nbytes for t in found.state.values()) <= path.stat().st_size
    plain([found.training, found.history, dataclasses.asdict(found.network), dataclasses.asdict(found.data)])
    found.build()


def check_resume(path: Path) -> None:
    known = torch.load(io.BytesIO(trained()["resume"]), weights_only=True)["settings"]
    read_resume(path, known)


def check_weights(path: Path) -> None:
    found = read_weights(path, say=lambda line: one_line(line, path))
    assert found
    assert sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in found.values()}.values()) <= 10**5
    assert all(type(k) is str and type(t) is torch.Tensor for k, t in found.items())


def check_spectrum(path: Path) -> None:
    result = load_spectrum(path)
    plain(to_json(result))
    try:  # what is found out later names no file
        pairs = labelled([result, run_tools.make_run().spectra[""]])
        comparable(pairs)
        for text in compare_lines(pairs):
            text.encode()
    except ValueError as error:
        one_line(" ".join(str(error).split()))  # as main shows it
    gathered(path)


def gathered(path: Path) -> None:
    for run in runs.gather([path], report=lambda line: one_line(line)):
        plain(results.clean([run.training, run.network, run.data, run.start, run.log]))


def check_flatness(path: Path) -> None:
    plain(
        results.clean(dataclasses.asdict(results.load_result(path, flatness.FlatnessResult, flatness.FLATNESS_SCHEMA)))
    )
    gathered(path)


def check_result(kind: type, schema: str, path: Path) -> None:
    plain(results.clean(dataclasses.asdict(results.load_result(path, kind, schema))))


def check_log(path: Path) -> None:
    (path.parent / "a.train.json").write_bytes(trained()["record"])
    gathered(path.parent / "a.train.json")


def check_preset(path: Path) -> None:
    grid.run_grid(preset.read_preset(path, quick=True))
    found = preset.read_preset(path)
    plan.make(found, path.parent / "out", data_dir=None, device="cpu", memory=1.0, leader=1)


def check_graph(path: Path) -> None:
    found = read_nir(path, dt=1.0, spike=lambda x: (x > 0).to(x.dtype), reset="hard")
    assert all(bool(torch.isfinite(t).all()) for t in found.state_dict().values())


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name in a folder, a valid one, how it is changed, and how it is read and looked at."""

    name: str
    valid: Callable[[], bytes]
    mutate: Mutate
    check: Callable[[Path], None]


def _result(kind: str, result: type, schema: str) -> Kind:
    return Kind(
        f"a.{kind}.json", lambda: made_results()[kind], json_changed, lambda path: check_result(result, schema, path)
    )


KINDS: dict[str, Kind] = {
    "checkpoint": Kind("a.pt", lambda: trained()["checkpoint"], archive_changed, check_checkpoint),
    "resume": Kind("a.pt.resume", lambda: trained()["resume"], archive_changed, check_resume),
    "weights": Kind("a.pth", weights, archive_changed, check_weights),
    "published": Kind("a.ckpt", lambda: published(old=False), archive_changed, check_weights),
    "legacy": Kind("a.pt", lambda: published(old=True), legacy_changed, check_weights),
    "safetensors": Kind("a.safetensors", safe_weights, safetensors_changed, check_weights),
    "spectrum": Kind("a.spectrum.json", lambda: made_results()["spectrum"], json_changed, check_spectrum),
    "flatness": Kind("a.flatness.json", lambda: made_results()["flatness"], json_changed, check_flatness),
    "robustness": _result("robustness", robustness.RobustnessResult, robustness.ROBUSTNESS_SCHEMA),
    "landscape": _result("landscape", landscape.LandscapeResult, landscape.LANDSCAPE_SCHEMA),
    "calibration": _result("calibration", calibration.CalibrationResult, calibration.CALIBRATION_SCHEMA),
    "record": Kind("a.train.json", lambda: trained()["record"], json_changed, gathered),
    "log": Kind("a.train.jsonl", lambda: trained()["log"], log_changed, check_log),
    "preset": Kind("a.toml", lambda: PRESET, toml_changed, check_preset),
}

if importlib.util.find_spec("nir") is not None:
    KINDS["nir"] = Kind("a.nir", graph, damaged, check_graph)


def one_line(message: str, path: Path | None = None) -> None:
    assert len(message.splitlines()) == 1, f"more than one line: {message!r}"
    assert message.isprintable(), f"not printable: {message!r}"
    assert len(message) <= LONGEST_LINE, f"{len(message)} characters: {message[:200]}"
    assert path is None or message.startswith((f"{path}:", f"{path} ")), f"does not name the file: {message}"


def attempt(kind: str, data: bytes, folder: Path) -> str:
    """The line with which the file was refused, "" for one that was taken and is good.

    Raises AssertionError for what should not be.
    """
    path = folder / KINDS[kind].name
    path.write_bytes(data)
    said = io.StringIO()
    began = time.process_time()
    try:
        with redirect_stderr(said), redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("error")
            KINDS[kind].check(path)
        refused = ""
    except AssertionError:
        raise
    except (ValueError, click.UsageError) as error:
        refused = error.format_message() if isinstance(error, click.UsageError) else str(error)
        one_line(" ".join(refused.split()) if kind == "preset" else refused, path)  # as main shows it
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise AssertionError(f"{type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})") from error
    took = time.process_time() - began
    assert not exploded, exploded.pop()
    assert not Path("exploded").exists(), "os.system was run"
    assert not said.getvalue(), f"wrote {said.getvalue()[:200]!r}"
    assert took < 5, f"took {took:.1f} s"
    return refused


def mutated(kind: str, seed: int, number: int) -> bytes:
    return KINDS[kind].mutate(KINDS[kind].valid(), Rng(f"{kind} {seed} {number}"))


def bounded(extra: int) -> None:
    """The process may grow by `extra` bytes of address space."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="files of every kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--only", type=int, help="this number alone, with its traceback")
    options = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    for kind in options.kind or KINDS:
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            assert attempt(kind, KINDS[kind].valid(), Path(folder)) == "", "the valid file is not taken"
            bounded(2**31)
            said: Counter[str] = Counter()
            began = time.perf_counter()
            for number in range(options.count) if options.only is None else [options.only]:
                data = mutated(kind, options.seed, number)
                try:
                    said["refused" if attempt(kind, data, Path(folder)) else "taken"] += 1
                except AssertionError as error:
                    said["failed"] += 1
                    print(f"{kind} --seed {options.seed} --only {number}: {error}")
                    if options.only is not None:
                        traceback.print_exc()
            failed += said["failed"]
            print(f"{kind}: {dict(said)} in {time.perf_counter() - began:.1f} s", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{failed} failed, peak memory {peak:.2f} GiB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
