"""The cost of curvature products on networks as people bring them: python benchmarks/networks.py [--rounds 9].

Every network (network_cases.py) runs in its own process, with all alternatives interleaved, in one thread. A ratio is
taken within a round, to that round's gradient of the user's network as its library computes it. With one thread,
seconds are CPU seconds of the process, which other processes disturb less. Columns of the table that need a word:

- from scratch: a Hessian product that computes the network's values first (the primal), as for batches beyond --memory.
- first, trace: seconds of the first product, and of them those by which it exceeds a later one from scratch.
- double backward: the user's own gradient with its graph kept, written here with torch.autograd.grad.
- GEMMs: only the convolutions and matrix products of one kept Hessian product, replayed with random entries.
- error: relative difference of a float64 product to the user's own double backward in float64.
- spikes: whether every neuron of the opened network spikes as in the user's own forward pass.

Peers (pip install '.[benchmarks]') get the user's network. What cannot be measured has its reason below the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch


def _threads() -> None:
    """Set the number of threads before torch is imported."""
    if "--threads" in sys.argv:
        os.environ["OMP_NUM_THREADS"] = sys.argv[sys.argv.index("--threads") + 1]
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


if __name__ == "__main__":
    _threads()
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import ikun_hessian  # noqa: E402, F401, I001  # sets the environment of torch as the commands have it
import numpy as np  # noqa: E402
import peers  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from network_cases import CASES, Case, Own, make_case  # noqa: E402
from rounds import Candidates, ratios, relative_error  # noqa: E402
from scipy.sparse.linalg import LinearOperator, eigsh  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import hessian_tools  # noqa: E402
import ikun  # noqa: E402
from hessian_tools.evaluation import copy_model, is_spiking_neuron  # noqa: E402
from hessian_tools.objective import Objective  # noqa: E402

MEMORY = 2**34
CLOSE = 1e-2  # a peer whose product differs by more computes something else
RATIOS: tuple[str, ...] = ("Hessian", "GGN", "from scratch", "double backward")
RATIOS += ("PyHessian, kept", "PyHessian, loader", "hessian-eigenthings", "curvlinops", "GEMMs")
GEMMS = {"convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm", "baddbmm_", "mv", "addmv", "addbmm"}
Entry = dict[str, Any]
Product = Callable[[Tensor], Tensor]


class Gemms(TorchDispatchMode):
    """Records the convolutions and matrix products that run, without their entries."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []
        self._made: dict[Any, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in GEMMS:
            found = [tree_map(self._like, (place, arg)) for place, arg in enumerate(args)]
            self.calls.append((func, tuple(arg for _, arg in found), tree_map(self._like, kwargs or {})))
        return func(*args, **(kwargs or {}))

    def _like(self, t: Any) -> Any:
        """Return a random tensor of the shape, strides and dtype of t, the same one for all such t."""
        if not isinstance(t, Tensor):
            return t
        key = t.shape, t.stride(), t.dtype
        if key not in self._made:
            size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
            self._made[key] = torch.randn(max(size, 1)).to(t.dtype).as_strided(t.shape, t.stride())
        return self._made[key]

    def replay(self) -> None:
        """Run the recorded calls."""
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


def clock() -> float:
    """Return CPU seconds of this process if it has one thread, otherwise wall-clock seconds."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(run: Callable[[], object], least: float) -> float:
    """Return the mean seconds of as many runs as take `least` seconds."""
    count, began = 0, clock()
    while not count or clock() - began < least:
        run()
        count += 1
    return (clock() - began) / count


def interleaved(candidates: Candidates, rounds: int, least: float) -> dict[str, list[float]]:
    """Return the seconds of every candidate in every round. Each runs once before it is timed."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(rounds):
        for name, run in candidates.items():
            times[name].append(seconds(run, least))
    return times


def opened(case: Case, data: tuple[Tensor, Tensor]) -> Objective:
    """Open the user's network as the library is used."""
    if case.options is None:
        return hessian_tools.make_objective(case.net, F.cross_entropy, data)
    a = ikun.adapt(case.net, data[0], **case.options)
    return hessian_tools.make_objective(a.model, F.cross_entropy, data, reset=a.reset)


def gradient(own: Own, data: tuple[Tensor, Tensor], create: bool = False) -> tuple[Tensor, ...]:
    """Return the gradient of the user's own network, one tensor per parameter. create: with its graph."""
    loss = F.cross_entropy(own(data[0]), data[1])
    return torch.autograd.grad(loss, list(own.parameters()), create_graph=create)


def double_backward(own: Own, data: tuple[Tensor, Tensor]) -> Product:
    """Return the Hessian product of the user's own network from one kept graph. It shares no code with our products."""
    parameters = list(own.parameters())
    grads = gradient(own, data, True)
    live = [i for i, g in enumerate(grads) if g.requires_grad]

    def product(v: Tensor) -> Tensor:
        parts = [t.view_as(p) for t, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]
        chosen, vectors = [grads[i] for i in live], [parts[i] for i in live]
        found = torch.autograd.grad(chosen, parameters, vectors, retain_graph=True, allow_unused=True)
        return torch.cat(
            [
                torch.zeros(p.numel(), dtype=v.dtype) if h is None else h.flatten()
                for h, p in zip(found, parameters, strict=True)
            ]
        )

    return product


def spikes(model: nn.Module, run: Callable[[], object]) -> dict[str, Tensor]:
    """Return the outputs of every spiking neuron over all calls, flat, by its name."""
    found: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in model.named_modules():
        if is_spiking_neuron(module) or hasattr(module, "tracing"):

            def note(_: Any, __: Any, out: Any, name: str = name) -> None:
                found.setdefault(name, []).append((out[0] if isinstance(out, tuple) else out).detach().flatten())

            hooks.append(module.register_forward_hook(note))
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def compare_spikes(own: Own, objective: Objective, x: Tensor) -> str:
    """Return in words whether the opened network spikes as the user's own."""
    theirs, ours = spikes(own.net, lambda: own(x)), spikes(objective.model, lambda: objective.outputs(x))
    with torch.no_grad():
        outputs = bool(torch.equal(own(x), objective.outputs(x)))
    common = [name for name in theirs if name in ours and ours[name].numel() == theirs[name].numel()]
    other = {name: int((ours[name] != theirs[name]).sum()) for name in common}
    if changed := sum(other.values()):
        return f"{changed} of {sum(theirs[name].numel() for name in common)} differ"
    if not common:
        return "same outputs" if outputs else "other outputs"
    some = "" if len(common) == len(theirs) else f" ({len(common)} of {len(theirs)} neurons)"
    return f"same{some}" if outputs else f"same{some}, other outputs"


def reasons(objective: Objective) -> list[str]:
    """Return why products of the objective are not traced."""
    return sorted({p for p in objective.programs.values() if isinstance(p, str)})


def peers_of(own: Own, data: tuple[Tensor, Tensor], v: Tensor, exact: Tensor, notes: list[str]) -> Candidates:
    """Return the products of other tools on the user's network. What fails, or gives another product, is noted."""
    makers: dict[str, Callable[[Objective], Product]] = {
        "PyHessian, kept": lambda o: peers.pyhessian(o, o.model, False),
        "PyHessian, loader": lambda o: peers.pyhessian(o, o.model, True),
        "hessian-eigenthings": lambda o: peers.eigenthings(o, o.model),
        "curvlinops": lambda o: peers.curvlinops(o, o.model),
    }
    found: Candidates = {}
    for name, make in makers.items():
        try:
            product = make(hessian_tools.make_objective(own, F.cross_entropy, data, check=False))
            error = relative_error(product(v).detach(), exact)
        except Exception as problem:  # a peer may raise anything
            (line, *_) = str(problem).splitlines() or [""]
            notes.append(f"{name}: {type(problem).__name__}: {line[:120]}")
            continue
        if not error <= CLOSE:
            notes.append(f"{name}: another product, relative difference {error:.0e}")
            continue
        found[name] = lambda p=product: p(v)  # type: ignore[misc]
    return found


def lambda_max(objective: Objective, product: Product) -> tuple[float, float]:
    """Return the largest eigenvalue by our operator, and by scipy over the user's own double backward."""
    pairs = hessian_tools.eigenpairs(
        hessian_tools.hessian(objective, MEMORY), 1, generator=torch.Generator().manual_seed(0), tol=1e-7,
        max_basis=min(400, max(20, int(MEMORY / 8 / objective.size))),
    )  # fmt: skip

    def multiply(v: Any) -> Any:
        return product(torch.from_numpy(np.ascontiguousarray(v).reshape(-1))).numpy()

    n = objective.size
    operator = LinearOperator((n, n), matvec=multiply, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(n)
    (value,) = eigsh(operator, k=1, which="LA", tol=1e-9, v0=start, return_eigenvectors=False)
    return float(pairs.values[0]), float(value)


def in_double(case: Case, targets: Tensor, check: bool, row: Entry) -> None:
    """Compare products, and with `check` largest eigenvalues, in float64."""
    double = replace(case, net=copy_model(case.net).double(), x=case.x.double())
    data = double.x, targets
    objective = opened(double, data)
    with patch.object(Tensor, "float", Tensor.double):  # snnTorch's spikes are (x > 0).float()
        product = double_backward(Own(double), data)
    v = torch.randn(objective.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact = product(v)
    if float(exact.norm()) == 0:
        raise ValueError("the Hessian product is zero: the network is dead")
    row["error"] = relative_error(hessian_tools.hessian(objective, MEMORY) @ v, exact)
    if check:
        row["lambda_max"] = lambda_max(objective, product)


def in_single(case: Case, own: Own, data: tuple[Tensor, Tensor], options: argparse.Namespace, row: Entry) -> None:
    """Measure times, memory and spikes in float32."""
    gradient(own, data)  # libraries warm up
    notes = row["notes"]
    objective = opened(case, data)
    row["parameters"] = objective.size
    v = torch.randn(objective.size, generator=torch.Generator().manual_seed(0))
    hessian, scratch = hessian_tools.hessian(objective, MEMORY), hessian_tools.hessian(objective, 0)
    row["first"] = seconds(lambda: hessian @ v, 0)
    row["trace"] = max(0.0, row["first"] - seconds(lambda: scratch @ v, 0))
    row["memory"] = hessian._used / 2**20
    ggn = hessian_tools.ggn(objective, MEMORY)
    ggn @ v
    notes += [f"by autograd: {reason}" for reason in reasons(objective)]
    row["spikes"] = compare_spikes(own, objective, case.x)

    recorded = Gemms()
    with recorded:
        found = hessian @ v
    with FlopCounterMode(display=False) as flops:
        recorded.replay()
    row["gemms"] = [len(recorded.calls), flops.get_total_flops()]
    kept = double_backward(own, data)
    exact = kept(v)
    row["error32"] = relative_error(found, exact)
    candidates: Candidates = {
        "gradient": lambda: gradient(own, data),
        "Hessian": lambda: hessian @ v,
        "GGN": lambda: ggn @ v,
        "from scratch": lambda: scratch @ v,
        "double backward": lambda: kept(v),
        "GEMMs": recorded.replay,
        **peers_of(own, data, v, exact, notes),
    }
    times = interleaved(candidates, options.rounds, 0 if options.small else 0.1)
    row["gradient"] = float(np.median(times["gradient"]))
    row["ratios"] = {name: ratios(times, name, "gradient") for name in times if name != "gradient"}


def measure_case(name: str, options: argparse.Namespace) -> Entry:
    """Return all numbers of one network."""
    case = make_case(name, options.small)
    own = Own(case)
    data = case.x, torch.randint(0, case.classes, (len(case.x),), generator=torch.Generator().manual_seed(0))
    row: Entry = {"name": name, "about": case.about, "notes": []}
    in_single(case, own, data, options, row)
    try:
        in_double(case, data[1], options.check, row)
    except Exception as problem:  # the times are measured
        row["notes"].append(f"float64: {type(problem).__name__}: {str(problem)[:200]}")
    return row


def shown(values: list[float] | None) -> str:
    """Return the median and the range in words."""
    if not values:
        return ""
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(rows: list[Entry]) -> str:
    """Return the results as a Markdown table, with notes below it."""
    heads = [
        "network",
        "parameters",
        "gradient, ms",
        *RATIOS,
        "GEMM calls, GFLOP",
        "primal, MiB",
        "trace, s",
        "first, s",
    ]
    heads += [
        "error",
        "spikes",
        *(["lambda_max, relative difference"] if any("lambda_max" in row for row in rows) else []),
    ]
    lines = [heads, ["---"] * len(heads)]
    notes = []
    for row in rows:
        title = CASES[row["name"]][0]
        notes += [f"- {title}: {note}" for note in row["notes"]]
        if "ratios" not in row:
            lines.append([title, *[""] * (len(heads) - 1)])
            continue
        calls, flops = row["gemms"]
        cells = [f"{title}: {row['about']}", f"{row['parameters']:,}", f"{1e3 * row['gradient']:.1f}"]
        cells += [shown(row["ratios"].get(name)) for name in RATIOS]
        cells += [f"{calls}, {flops / 1e9:.2f}", f"{row['memory']:.0f}", f"{row['trace']:.1f}", f"{row['first']:.1f}"]
        cells += [f"{row['error']:.0e}" if "error" in row else "", row["spikes"]]
        if "lambda_max" in heads[-1]:
            a, b = row.get("lambda_max", (np.nan, np.nan))
            cells.append(f"{abs(a / b - 1):.0e}")
        lines.append(cells)
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return text + ("\n\n" + "\n".join(notes) if notes else "")


def in_process(name: str, options: argparse.Namespace) -> Entry:
    """Measure one network in a process of its own, whose failure is a note."""
    flags = [*(["--small"] if options.small else []), *(["--check"] if options.check else [])]
    numbers = ["--rounds", str(options.rounds), "--threads", str(options.threads)]
    command = [sys.executable, __file__, "--child", "--networks", name, *numbers, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return dict(json.loads(lines[-1]))
    (*_, line) = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return {"name": name, "notes": [f"not measured: {line[:300]}"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--networks", nargs="+", choices=list(CASES), default=list(CASES), metavar="NAME", help=", ".join(CASES)
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="small networks, to try the script")
    parser.add_argument(
        "--check", action="store_true", help="compare lambda_max with scipy over the user's double backward"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        (name,) = options.networks
        print(json.dumps(measure_case(name, options)))
        return
    rows = []
    for name in options.networks:
        began = time.perf_counter()
        rows.append(in_process(name, options))
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
