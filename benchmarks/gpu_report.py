"""One report of everything that needs a GPU: python benchmarks/gpu.py --all.

Each part runs in a process of its own. A part that fails, hangs or lacks a package is reported with its last lines, and
the others run all the same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOTAL = 570.0  # seconds for all parts
LINES = 25  # of the output of a part that fails
TESTS = [
    "tests/test_gpu.py",
    "tests/test_gpu_networks.py",
    "tests/test_gpu_commands.py",
    "tests/ikun/kernels/test_triton_kernels.py",
    "tests/hessian_tools/linalg/test_lanczos.py",
    "tests/hessian_tools/analysis/operator_spectrum/test_pyhessian.py",
    "tests/ikun/data/test_datasets.py",
]
TOLERANCE = 2e-3  # relative, between the same numbers in float32 on the CPU and on the GPU
MACHINE = """
import importlib.metadata as m, platform, torch
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return "not installed"
print("Python", platform.python_version(), "on", platform.platform())
print("PyTorch", torch.__version__, "with CUDA", torch.version.cuda)
for name in ("triton", "pyhessian", "numba", "pytest", "spikingjelly", "snntorch"): print(name, version(name))
for i in range(torch.cuda.device_count()):
    p = torch.cuda.get_device_properties(i)
    print(f"cuda:{i} {p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB")
if not torch.cuda.is_available(): raise SystemExit("this PyTorch finds no CUDA device")
"""


@dataclass(frozen=True)
class Part:
    """A part of the report.

    Attributes:
        title: Its heading.
        passed: Whether it is as it should be.
        summary: Its result in one line.
        text: Its section, in Markdown.
        seconds: How long it took.
    """

    title: str
    passed: bool
    summary: str
    text: str
    seconds: float


@dataclass(frozen=True)
class Output:
    """What a process printed, and its exit code; None if it was ended because it took too long."""

    code: int | None
    text: str
    seconds: float


Runner = Callable[..., Output]


def runner(python: list[str], deadline: float) -> Runner:
    """Return a function that runs Python with arguments, until `limit` seconds or the deadline."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": "", "PYTHONWARNINGS": "default"}

    def run(*arguments: str, limit: float) -> Output:
        began = time.monotonic()
        seconds = max(1.0, min(limit, deadline - began))
        command = [*python, *arguments]
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
            try:
                code: int | None = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=seconds
                ).returncode
            except subprocess.TimeoutExpired:
                code = None
            file.seek(0)
            return Output(code, file.read(), time.monotonic() - began)

    return run


def fenced(text: str, lines: int = LINES) -> str:
    """Return the last lines of a text as a block of Markdown."""
    return "\n".join(["```text", *text.strip().splitlines()[-lines:], "```"])


def failure(output: Output) -> str:
    """Return in one line why a part failed."""
    missing = re.findall(r"No module named '?([\w.]+)", output.text)
    if missing:
        return f"left out: {missing[-1]} is not installed"
    if output.code is None:
        return f"ended after {output.seconds:.0f} s"
    last = output.text.strip().splitlines()
    return f"failed (exit code {output.code})" + (f": {last[-1][:150]}" if last else "")


def plain(title: str, output: Output, summary: Callable[[str], str] = lambda text: "done", keep: int = LINES) -> Part:
    """Return the part of a process that prints text or Markdown."""
    if output.code != 0:
        return Part(title, False, failure(output), fenced(output.text), output.seconds)
    return Part(title, True, summary(output.text), fenced(output.text, keep), output.seconds)


def machine(run: Runner) -> Part:
    return plain("Machine", run("-c", MACHINE, limit=60), lambda text: text.strip().splitlines()[-1])


def tests(run: Runner, files: list[str]) -> Part:
    def summary(text: str) -> str:
        return text.strip().splitlines()[-1].strip("= ")

    found = run("-m", "pytest", "-n", "0", "-q", "-rs", "-m", "gpu and not extended", *files, limit=240)
    if found.code not in (0, None) and re.search(r"\d+ failed", found.text):
        return Part("Tests", False, summary(found.text), fenced(found.text, 3 * LINES), found.seconds)
    return plain("Tests", found, summary, 10)


def markdown(title: str, output: Output) -> Part:
    """Return the part of a process that prints Markdown."""
    part = plain(title, output)
    return Part(title, True, part.summary, output.text.strip(), part.seconds) if part.passed else part


def kernels(run: Runner) -> Part:
    arch = run("-c", "import torch; a, b = torch.cuda.get_device_capability(); print(10 * a + b)", limit=60)
    chosen = ["--arch", arch.text.split()[-1]] if arch.code == 0 else []
    return markdown("Registers of the kernels", run("benchmarks/kernels.py", "--quick", *chosen, limit=90))


def benchmark(run: Runner, options: list[str]) -> Part:
    return markdown("Products", run("benchmarks/gpu.py", *options, limit=150))


def comparison(run: Runner, checkpoints: list[Path], options: list[str]) -> Part:
    """Run `spectrum` on the CPU and on the GPU, and compare values and times."""
    heads = ["checkpoint", "device", "seconds", "Hessian lambda_max", "Hessian trace", "GGN lambda_max", "GGN trace"]
    rows = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    worst, seconds, failed = 0.0, 0.0, ""
    with tempfile.TemporaryDirectory() as folder:
        for checkpoint in checkpoints:
            values = []
            for device in ("cpu", "cuda"):
                command = ["-m", "ikun_hessian", "spectrum", str(checkpoint), "--device", device]
                found = run(*command, "--out", folder, "--tag", device, *options, limit=150)
                seconds += found.seconds
                if found.code != 0:
                    failed = f"{checkpoint.name} on {device}: {failure(found)}"
                    rows.append(f"| {checkpoint.stem} | {device} | {found.seconds:.1f} | {failure(found)} | | | |")
                    continue
                values.append(_values(Path(folder) / f"{checkpoint.stem}.{device}.spectrum.json"))
                cells = [f"{value:.6g}" for value in values[-1]]
                rows.append(f"| {checkpoint.stem} | {device} | {found.seconds:.1f} | {' | '.join(cells)} |")
            if len(values) == 2:
                pairs = zip(*values, strict=True)
                worst = max([worst, *(abs(a - b) / max(abs(a), 1e-12) for a, b in pairs)])
    summary = failed or f"largest relative difference {worst:.1e}"
    note = "Seconds are of the whole command, with the start of Python and the compilation of kernels."
    return Part("CPU and GPU", not failed and worst < TOLERANCE, summary, "\n".join([*rows, "", note]), seconds)


def _values(file: Path) -> list[float]:
    """Return lambda_max and trace of the Hessian and of the GGN."""
    spectra = json.loads(file.read_text(encoding="utf-8"))["spectra"]
    found = []
    for name in ("hessian", "ggn"):
        found += [spectra[name]["eigenvalues"][0]["value"], spectra[name]["trace"]["estimate"]]
    return found


def write_report(options: argparse.Namespace) -> int:
    """Run all parts and write the report. Returns the exit code: 0 if all parts passed."""
    began = time.monotonic()
    run = runner(shlex.split(options.python) if options.python else [sys.executable], began + TOTAL)
    sizes = [f"--{name}={getattr(options, name)}" for name in ("rounds", "channels", "steps", "batch", "size")]
    sizes += [f"--tflops={options.tflops}", f"--bandwidth={options.bandwidth}"]
    checkpoints = sorted((ROOT / "checkpoints").glob("*.pt"))[: options.checkpoints]
    jobs: list[Callable[[], Part]] = [
        lambda: machine(run),
        lambda: benchmark(run, sizes),
        lambda: comparison(run, checkpoints, shlex.split(options.spectrum)),
        lambda: kernels(run),
        lambda: tests(run, shlex.split(options.tests) if options.tests else TESTS),
    ]
    parts: list[Part] = []
    for job in jobs:
        parts.append(job())
        print(f"{parts[-1].title}: {parts[-1].summary} ({parts[-1].seconds:.0f} s)", flush=True)
        Path(options.out).write_text(_report(parts), encoding="utf-8")  # kept if the rest is interrupted
    print(options.out)
    return 0 if all(part.passed for part in parts) else 1


def _report(parts: list[Part]) -> str:
    lines = ["# GPU report", "", f"{datetime.date.today()}, {platform.node()}", "", "| part | | result | seconds |"]
    lines.append("| --- | --- | --- | --- |")
    for part in parts:
        summary = part.summary.replace("|", "/")
        lines.append(f"| {part.title} | {'passed' if part.passed else 'FAILED'} | {summary} | {part.seconds:.0f} |")
    for part in parts:
        lines += ["", f"## {part.title}", "", part.text]
    return "\n".join(lines) + "\n"
