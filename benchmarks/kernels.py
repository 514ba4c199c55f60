"""Registers and spills of every Triton kernel on NVIDIA GPUs: python benchmarks/kernels.py [--arch 90 ...].

The kernels are compiled ahead of time, as a launch would compile them, and their machine code is read. No GPU is
needed: Triton's package for Linux has NVIDIA's assembler. Prints a table in Markdown. Exit code 1 if a kernel keeps
more than two registers in memory, or if the kernel of the spikes has a fused multiply-add, which would round
differently from torch.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ARCHITECTURES = {80: "A100", 86: "RTX 30", 89: "RTX 40, L4", 90: "H100, H200"}  # compute capability: some of its GPUs
KERNELS = ("value", "tangent", "adjoint", "adjoint_tangent")
SPILLS = 4  # instructions: two registers that are stored and loaded once. ptxas does this so that more programs fit
FUSED = re.compile(r"\b[FD]FMA\b")  # in machine code; IMAD is of integers
SPILL = re.compile(r"\b(?:LDL|STL)\b")  # loads from and stores to the memory of a thread


@dataclass(frozen=True)
class Case:
    """The arguments that a kernel is compiled for.

    Attributes:
        dtype: Triton's name of the floating-point type.
        plane: Height and width of the pooled plane, or None without pooling.
        learned: Whether the decay is learned.
        state: Whether the scan starts from a state and stores its last one.
        static: Whether the input is the same at all steps.
        wide: Whether positions need 64 bits.
        detached: Whether derivatives ignore the reset, so that dv/dh is 0 or 1.
    """

    dtype: str
    plane: tuple[int, int] | None = None
    learned: bool = False
    state: bool = False
    static: bool = False
    wide: bool = False
    detached: bool = False

    def __str__(self) -> str:
        pooled = "" if self.plane is None else ", pooled" if self.plane[0] % 2 == 0 else ", pooled, odd"
        flags = [name for name in ("learned", "state", "static", "wide", "detached") if getattr(self, name)]
        return ", ".join([("float32" if self.dtype == "fp32" else "float64") + pooled, *flags])


CASES = (
    Case("fp32"),
    Case("fp32", (28, 28), static=True),
    Case("fp32", (28, 28), detached=True),
    Case("fp32", (7, 7), learned=True, state=True),
    Case("fp64", (28, 28)),
    Case("fp64", (7, 7), learned=True, state=True, wide=True),
)


@dataclass(frozen=True)
class Compiled:
    """What the machine code of a kernel uses.

    Attributes:
        registers: Registers per thread.
        spills: Number of instructions that keep registers in memory, or fetch them.
        fused: Number of fused multiply-adds of floating-point numbers.
    """

    registers: int
    spills: int
    fused: int


def compiled(kernel: str, case: Case, arch: int) -> Compiled:
    """Compile a kernel for an architecture and read what its machine code uses.

    Args:
        kernel: One of KERNELS.
        case: Its arguments.
        arch: Compute capability, such as 90.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from ikun.kernels import triton_kernels

    function = getattr(triton_kernels, f"_{kernel}")
    constants, signature, attributes = _arguments(function.arg_names, case, triton_kernels.NEURONS)
    source = ASTSource(function, signature, constants, attributes)
    options = triton_kernels.EXACT if kernel == "value" else triton_kernels.FUSED
    cubin = compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["cubin"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        used, code = _dumped("-res-usage", file), _dumped("-sass", file)
    (registers,) = re.findall(r"\bREG:(\d+)", used)
    return Compiled(int(registers), len(SPILL.findall(code)), len(FUSED.findall(code)))


def _arguments(
    names: list[str], case: Case, neurons: int
) -> tuple[dict[str, Any], dict[str, str], dict[tuple[int], list[list[object]]]]:
    """Return the constants of a kernel, the types of its arguments, and which of them are divisible by 16."""
    height, width = case.plane or (1, 1)
    window = 1 if case.plane is None else 4
    constants: dict[str, Any] = {
        "HARD": True, "LAST": False, "STATIC": case.static, "REPEATED": case.static, "HEIGHT": height, "WIDTH": width,
        "BLOCK": neurons // window, "WINDOW": window, "LONG": case.wide,
    }  # fmt: skip
    absent = [] if case.plane else ["index"]
    absent += [] if case.learned else ["u", "gh", "totals"]
    absent += [] if case.state else ["state", "start"]
    constants |= dict.fromkeys(absent)
    kinds = dict.fromkeys(("steps", "size", "outputs", "blocks"), "i32")
    kinds |= {"size": "i64", "outputs": "i64"} if case.wide else {}
    kinds |= {"index": "*i64" if case.wide else "*i32", "totals": "*fp64"}
    kinds |= {"c": "*u8"} if case.detached else {}
    signature = {n: "constexpr" if n in constants else kinds.get(n, f"*{case.dtype}") for n in names}
    aligned = [i for i, n in enumerate(names) if n not in constants and n not in ("steps", "blocks")]
    return (
        {n: c for n, c in constants.items() if n in names},
        signature,
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )


def _dumped(option: str, file: Path) -> str:
    """Return what NVIDIA's cuobjdump, which comes with Triton, tells of a file with machine code."""
    import triton.backends.nvidia as nvidia

    program = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    return subprocess.run([program, option, file], capture_output=True, text=True, check=True).stdout


def table(found: dict[tuple[str, Case, int], Compiled]) -> str:
    """Return the table of all kernels: registers per thread, and the spills if there are any."""
    architectures = sorted({arch for _, _, arch in found})
    heads = [f"sm_{arch} ({ARCHITECTURES.get(arch, 'other')})" for arch in architectures]
    lines = [f"| kernel | arguments | {' | '.join(heads)} |", "| --- " * (2 + len(heads)) + "|"]
    for kernel, case in dict.fromkeys((kernel, case) for kernel, case, _ in found):
        row = [found[kernel, case, arch] for arch in architectures]
        cells = [f"{c.registers}" + f" (spills: {c.spills})" * (c.spills > 0) for c in row]
        lines.append(f"| {kernel} | {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def wrong(found: dict[tuple[str, Case, int], Compiled]) -> list[str]:
    """Return one line for every kernel with too many spills, or with fused multiply-adds where there must be none."""
    lines = []
    for (kernel, case, arch), used in found.items():
        if used.spills > SPILLS:
            lines.append(f"{kernel} ({case}) on sm_{arch} has {used.spills} spills, more than {SPILLS}")
        if kernel == "value" and used.fused:
            lines.append(f"{kernel} ({case}) on sm_{arch} has {used.fused} fused multiply-adds")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), help="such as 90 (default: all)")
    parser.add_argument("--quick", action="store_true", help="only two of the arguments")
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"  # read when Triton is imported
    cases = CASES[1::3] if options.quick else CASES
    found = {(k, c, arch): compiled(k, c, arch) for k in KERNELS for c in cases for arch in options.arch}
    import triton

    print(f"Registers per thread, Triton {triton.__version__}:\n\n{table(found)}")
    if lines := wrong(found):
        sys.exit("\n".join(lines))


if __name__ == "__main__":
    main()
