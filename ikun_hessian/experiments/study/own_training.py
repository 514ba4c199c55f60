"""The training of one run of a study by a function of the user's, on a network of the user's own."""

from __future__ import annotations

import dataclasses
import inspect
import math
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikun_hessian.jobs.errors import UsageError
from ikun_hessian.jobs.job import Own
from ikun_hessian.jobs.user.code import load_function, readable, sources

if TYPE_CHECKING:
    from torch import Tensor, nn

AS_BUILT = "as_built"  # the initializer of a network that keeps the weights of its constructor
OFFERED = ("seed", "report", "path")  # arguments that the function gets only if it has parameters of these names
MEASURED = 256  # samples for initializers that measure, and for the statistics at the start


@dataclasses.dataclass(frozen=True)
class OwnTraining:
    """One training run.

    Attributes:
        own: Description of the network and its samples.
        function: "module:function" of the training function.
        init: Name of the initializer, or AS_BUILT.
        alpha: Parameter of ikun and tdbn.
        gain: Factor on the variance of the initial weights.
        options: Arguments of the function, by name.
        seed: Random seed.
        epochs: Number of epochs, if the function has such an argument; otherwise 0.
        snapshots: Number of checkpoints to write during training, at equal intervals.
        save_at_loss: Losses at whose first epoch a checkpoint is written.
        code: Start of the SHA-256 of the source files of the functions.
        memory: Memory in GiB.
    """

    own: Own
    function: str
    init: str
    alpha: float
    gain: float
    options: dict[str, Any]
    seed: int
    epochs: int
    snapshots: int
    save_at_loss: tuple[float, ...]
    code: str
    memory: float

    @property
    def data_dir(self) -> Path | None:
        """Folder of a data set of this package: None."""
        return None

    def settings(self) -> dict[str, Any]:
        """Return the settings that NAME.train.json records."""
        start = {} if self.init == AS_BUILT else {"alpha": self.alpha, "gain": self.gain}
        return {
            "network": {"model": self.own.model, "code": self.code},
            "data": {"name": self.own.data},
            "training": {"init": self.init, **start, **self.options, "seed": self.seed},
        }

    def run(self, out: Path, device: str) -> None:
        """Initialize and train the network, and write the checkpoint `out`, its log and its description.

        An interrupted training starts again, unless the function keeps its own state next to `path`.

        Raises:
            UsageError: If a function of the user's fails. The message names its line.
            AdapterError: If the network cannot be analysed.
        """
        import torch

        from ikun.checkpoint import save_atomically

        began = time.perf_counter()
        seed_everything(self.seed)
        model = str(self.own.model)
        function = load_function("--model", model)
        with readable(f"model {model}"):
            network = function()
        start = self._initialized(network, out)
        network.to(device)
        report = RunReport(self, out, network, start)
        report.describe(finished=False, seconds=0.0)
        offered = {"seed": self.seed, "report": report, "path": out}
        train = load_function("train", self.function)
        extra = {name: offered[name] for name in _parameters(train) if name in offered}
        seed_everything(self.seed)
        with readable(f"train {self.function}"):
            weights = _weights(train(network, **self.options, **extra), network, self.function)
        if not all(torch.isfinite(t).all() for t in weights.values() if t.is_floating_point()):
            report.failures.append("NaN: weights at the end")
        save_atomically({"state_dict": {name: t.detach().cpu() for name, t in weights.items()}}, out)
        report.describe(finished=True, seconds=time.perf_counter() - began)

    def _initialized(self, network: nn.Module, out: Path) -> dict[str, Any]:
        """Initialize the network in place. Return the cost, and the statistics of its neurons."""
        import torch

        from hessian_tools import nested
        from ikun.adapters import adapt
        from ikun.adapters.adapt_network import bare
        from ikun.adapters.layer_activity import layer_activity
        from ikun.adapters.summary import inputs_of
        from ikun.adapters.time.loop import InTime
        from ikun.checkpoint import save_atomically
        from ikun.initializers.catalog import initialize_module
        from ikun.layer_statistics import batch_norm_by_batch
        from ikun_hessian.jobs.user.network import adapt_options, located, open_own

        first = out.with_name(f"{out.name}.start")
        began, passes = time.perf_counter(), 0
        try:
            save_atomically({"state_dict": network.state_dict()}, first)
            with located():
                found = open_own(first, self.own, samples=str(MEASURED), surrogate=None, memory=self.memory, fewer=True)
            if self.init != AS_BUILT:
                adapted = found.adapted()
                m = adapted.model
                driven = InTime(bare(network), m.plan, m.clear, m.live) if isinstance(m, InTime) else network
                done = initialize_module(
                    driven, self.init, generator=torch.Generator().manual_seed(self.seed),
                    x=inputs_of(adapted, found.x), alpha=self.alpha, gain=self.gain,
                )  # fmt: skip
                passes = done.forward_passes
        finally:
            first.unlink(missing_ok=True)
        seconds = time.perf_counter() - began
        with located():
            adapted = adapt(network, nested.selected(found.x, slice(8)), **adapt_options(self.own))
            with batch_norm_by_batch(adapted.model):
                rows = layer_activity(adapted, found.x, found.y, found.loss)
        layers = [dataclasses.asdict(row) for row in rows]
        return {"seconds": seconds, "forward_passes": passes, "layers": layers}


class RunReport:
    """What a training function calls after every epoch: `report(loss=..., test_accuracy=...)`.

    It writes a line of the log, and the checkpoints that the study asks for.

    Args:
        training: The run.
        out: Path of the checkpoint.
        network: The network that is trained.
        start: State at initialization.
    """

    def __init__(self, training: OwnTraining, out: Path, network: nn.Module, start: dict[str, Any]) -> None:
        from ikun.training.log import loss_path, run_paths, write_log

        self.training, self.out, self.network, self.start = training, out, network, start
        self.epoch, self.saved_at_loss, self.failures = 0, dict[str, int](), list[str]()
        self.paths = run_paths(out)
        for path in [*(loss_path(out, x) for x in training.save_at_loss), *self._snapshots().values()]:
            path.unlink(missing_ok=True)  # left by an earlier run of the same name
        write_log(self.paths["log"], [])

    def __call__(self, **numbers: Any) -> None:
        """Record the numbers of one epoch.

        Args:
            numbers: `loss` of the training samples, `accuracy`, `test_loss`, `test_accuracy` as fractions, and any
                others. All are numbers or tensors with one number.
        """
        from ikun.checkpoint import save_atomically
        from ikun.training.log import append, loss_path

        self.epoch += 1
        line = {name: float(value.detach() if hasattr(value, "detach") else value) for name, value in numbers.items()}
        append(self.paths["log"], {"epoch": self.epoch, **line})
        loss = line.get("loss", math.inf)
        if math.isnan(loss) and not self.failures:
            self.failures.append(f"NaN: loss of epoch {self.epoch}")
        asked = self.training.save_at_loss
        new = {f"{x:g}": x for x in asked if loss <= x and f"{x:g}" not in self.saved_at_loss}
        self.saved_at_loss |= dict.fromkeys(new, self.epoch)
        moments = [loss_path(self.out, x) for x in new.values()]
        moments += [path for epoch, path in self._snapshots().items() if epoch == self.epoch]
        for path in moments:
            weights = {name: t.detach().cpu() for name, t in self.network.state_dict().items()}
            save_atomically({"state_dict": weights}, path)

    def describe(self, *, finished: bool, seconds: float) -> None:
        """Write NAME.train.json."""
        from ikun.training.log import write_description

        write_description(
            self.paths["run"],
            {
                **self.training.settings(),
                "finished": finished,
                "epochs_run": self.epoch,
                "best_epoch": self.epoch,
                "failures": self.failures,
                "saved_at_loss": self.saved_at_loss,
                "seconds": seconds,
                "start": self.start,
            },
        )

    def _snapshots(self) -> dict[int, Path]:
        """Return the paths of the snapshots by epoch."""
        from ikun.training.log import snapshot_path

        count, epochs = self.training.snapshots, self.training.epochs
        wanted = {round(epochs * k / count) for k in range(1, count + 1)} - {0}
        return {epoch: snapshot_path(self.out, epoch) for epoch in sorted(wanted)}


def seed_everything(seed: int) -> None:
    """Seed all random generators that training code may use."""
    import numpy as np
    import torch

    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def code_of(own: Own, function: str) -> str:
    """Return the first 12 digits of the SHA-256 of the user's source files that a run depends on."""
    from ikun_hessian.jobs.user.network import digest

    named = {"train": function, "--model": own.model, "--data": own.data, "--reset": own.reset}
    if own.loss and ":" in own.loss and not own.loss.startswith("tet:"):
        named["--loss"] = own.loss
    functions = [load_function(option, text) for option, text in named.items() if text]
    return digest(sorted(file.read_bytes() for file in sources(functions)))[:12]


def refuse_call(function: str, options: Mapping[str, Any]) -> None:
    """Raise UsageError if the training function cannot be called with these options."""
    found = load_function("train", function)
    given = {**options, **{name: None for name in _parameters(found) if name in OFFERED}}
    try:
        inspect.signature(found).bind(None, **given)
    except TypeError as error:
        raise UsageError(
            f"train {function}: {error}. It is called with the network, and with the options of the run by name"
        ) from None


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _weights(returned: Any, network: nn.Module, function: str) -> dict[str, Tensor]:
    """Return the weights: those of the network that was given, or those that the function returned."""
    from torch import Tensor, nn

    if returned is None:
        returned = network
    found = returned.state_dict() if isinstance(returned, nn.Module) else returned
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise UsageError(
            f"train {function}: returned a {type(returned).__name__}: return nothing, the network, or its state_dict()"
        )
    return dict(found)
