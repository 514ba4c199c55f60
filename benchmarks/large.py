"""The default `spectrum` with 11 million parameters: python benchmarks/large.py DIR [--network sew_resnet18].

256 images of 32 x 32, T = 4, after 40 steps of Adam. Printed: what the command says beforehand, and then what it took:
time, CPU time, peak memory, and the products of each operator. DIR keeps checkpoint and results, and a run that was
interrupted is resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TIMESTEPS = {"sew_resnet18": ["--timesteps", "4"], "ms_resnet18": []}


def trained(name: str, steps: int, path: Path) -> None:
    """Train the network for some steps of 64 images and save it, as its users do."""
    import large_networks
    import torch
    import torch.nn.functional as F
    from spikingjelly.activation_based import functional

    net, (x, y) = getattr(large_networks, name)(), large_networks.samples()
    torch.manual_seed(0)
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(steps):
        part = torch.randperm(len(y))[:64]
        optimizer.zero_grad()
        out = net(x[part].repeat(4, 1, 1, 1, 1) if TIMESTEPS[name] else x[part])
        F.cross_entropy(out.mean(0) if out.dim() == 3 else out, y[part]).backward()
        optimizer.step()
        functional.reset_net(net)
    torch.save(net.state_dict(), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--network", choices=sorted(TIMESTEPS), default="sew_resnet18")
    parser.add_argument("--memory", type=float, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="of training")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / f"{options.network}.pt"
    if not path.exists():
        trained(options.network, options.steps, path)
    functions = {"--model": options.network, "--data": "samples"}
    given = [
        word for option, name in functions.items() for word in (option, f"{ROOT}/benchmarks/large_networks.py:{name}")
    ]
    command = [
        "spectrum",
        str(path),
        *given,
        "--loss",
        "ce",
        *TIMESTEPS[options.network],
        "--memory",
        f"{options.memory:g}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(options.threads)}
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "ikun_hessian", *command, "--resume"], env=environment, check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = json.loads(path.with_suffix(".spectrum.json").read_text())
    products = {name: spectrum["hessian_vector_products"] for name, spectrum in result["spectra"].items()}
    print(
        f"{time.perf_counter() - began:.0f} s, {used.ru_utime + used.ru_stime:.0f} s of CPU, peak "
        f"{used.ru_maxrss / 2**20:.2f} GiB, products {products}"
    )


if __name__ == "__main__":
    main()
