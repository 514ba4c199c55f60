"""Measure curvature during training, on a fixed batch, without changing the training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hessian_tools.io.errors import ParameterError
from ikun_hessian.api.analyses import Loss, opening_of
from ikun_hessian.api.report import data_frame
from ikun_hessian.jobs.errors import in_keywords
from ikun_hessian.jobs.given import objective_of, untouched

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from torch import Tensor, nn

    from hessian_tools.objective import Objective

METRICS = ("lambda_max", "trace", "gradient_norm", "sharpness")
MORE = ("critical_sharpness",)
MEMORY = 4 * 2**30  # bytes for what a product keeps
TOL = 0.1  # of lambda_max: residual relative to it. The error of the eigenvalue is of second order in the residual.
Log = Callable[[str, float, int], object]


class Monitor:
    """Measure lambda_max, trace, gradient norm and sharpness every few steps of a training loop.

        monitor = Monitor((x, y), loss="ce", timesteps=4, every=100, log=writer.add_scalar)
        for ...:
            optimizer.step()
            monitor(model)

    The measurements are of the loss in evaluation mode, on the same samples every time. The training is not changed:
    not the weights, gradients and modes of the model, the statistics of its BatchNorm layers, the states of its
    neurons, and the random generators. Training with and without a monitor gives the same weights to the bit.

    The model is copied at the first call. Later calls only copy the values of its parameters and buffers. It is copied
    again if it has other parameters or layers, or if a number, text or flag that is an attribute of a layer has
    changed, such as the slope of a surrogate.

    Metrics:
        lambda_max: Largest eigenvalue of the operator. Each search starts from the last eigenvector.
        trace: Trace of the operator by Hutchinson's estimator, with the same probes every time.
        gradient_norm: Norm of the (surrogate) gradient.
        sharpness: Adaptive average sharpness of the loss itself, E L(w + radius |w| z) - L(w), with the same noise z
            every time (Kwon et al. 2021).
        critical_sharpness: 2 / (smallest step along the negative gradient that raises the loss itself). It takes up to
            112 forward passes, so it is measured on request only.

    The loss on the samples is always measured too.

    Args:
        data: Samples: tensors (inputs [N, ...], targets [N, ...]), a Dataset or a DataLoader.
        loss: Name of a loss, or a function loss(outputs, targets) that is a mean over samples.
        every: Number of calls from one measurement to the next. The first call measures.
        log: Called with (name, value, step) for every number: TensorBoard's `writer.add_scalar`, for W&B
            `lambda name, value, step: wandb.log({name: value}, step=step)`. None: the numbers are only kept.
        timesteps: Number of time steps T to run the network for. None if it runs through time by itself.
        samples: Number of samples, the first ones of the data.
        metrics: The metrics to measure.
        operator: "ggn", "hessian" or "fisher".
        probes: Number of probes of the trace.
        draws: Number of noise samples of the sharpness.
        radius: Scale of that noise, relative to the weights.
        seed: Seed of the probes and the noise.
        prefix: Beginning of the names that are logged.
        options: Fields of `Opening`, such as sequences=True, readout="last" and params="fc*".

    Attributes:
        history: One dict for every measurement: "step", "loss" and the metrics. A number is NaN if it is not finite.

    Raises:
        ValueError: If an argument has an invalid value. From the first call if the network or the samples cannot be
            used.
        TypeError: If an option does not exist.
    """

    def __init__(
        self,
        data: Any,
        loss: Loss,
        *,
        every: int = 100,
        log: Log | None = None,
        timesteps: int | None = None,
        samples: int = 128,
        metrics: tuple[str, ...] = METRICS,
        operator: str = "ggn",
        probes: int = 2,
        draws: int = 4,
        radius: float = 0.1,
        seed: int = 0,
        prefix: str = "curvature/",
        **options: Any,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, not {every}")
        if unknown := set(metrics) - {*METRICS, *MORE}:
            raise ValueError(f"unknown metric {', '.join(sorted(unknown))}: choose from {', '.join(METRICS + MORE)}")
        if operator not in ("ggn", "hessian", "fisher"):
            raise ValueError(f"operator must be ggn, hessian or fisher, not {operator}")
        self.every, self.log, self.metrics, self.prefix = every, log, tuple(metrics), prefix
        self.history: list[dict[str, float]] = []
        self._settings = (operator, probes, draws, radius, seed)
        self._opening = opening_of(options, timesteps, None)
        self._loss = loss
        self._data, self._samples = data, samples
        self._calls = 0
        self._objective: Objective | None = None
        self._known: object = None
        self._vector: Tensor | None = None

    def __call__(self, model: nn.Module, step: int | None = None) -> dict[str, float] | None:
        """Measure at every `every`-th call.

        Args:
            model: The model in training.
            step: Number of the step, for the log; None: the number of calls before this one.

        Returns:
            The measurement, or None if this call does not measure.
        """
        count, self._calls = self._calls, self._calls + 1
        return self.measure(model, count if step is None else step) if count % self.every == 0 else None

    def measure(self, model: nn.Module, step: int) -> dict[str, float]:
        """Measure now, log the numbers, and append them to `history`."""
        try:
            with untouched():
                objective = self._updated(model)
                found = {"step": step, **self._measured(objective)}
        except ParameterError as error:
            raise type(error)("{}", in_keywords(error)) from error.__cause__
        self.history.append(found)
        if self.log is not None:
            for name, value in found.items():
                if name != "step":
                    self.log(f"{self.prefix}{name}", value, step)
        return found

    def _updated(self, model: nn.Module) -> Objective:
        """Return the objective at the weights that the model has now."""
        import torch

        from ikun.adapters.adapt_network import bare

        network = bare(model)
        known = _structure(network)
        if self._objective is None or known != self._known:
            self._objective, data = objective_of(network, self._data, self._loss, self._opening, self._samples)
            self._data, self._samples, self._known = data, len(data[1]), known
        here = dict([*self._objective.model.named_parameters(), *self._objective.model.named_buffers()])
        with torch.no_grad():
            for name, value in [*network.named_parameters(), *network.named_buffers()]:
                if name in here and here[name].shape == value.shape:
                    here[name].copy_(value)
        return self._objective

    def _measured(self, objective: Objective) -> dict[str, float]:
        """Return the loss and the metrics."""
        from hessian_tools.analysis.flatness.critical_sharpness import critical_sharpness
        from hessian_tools.linalg.lanczos import eigenpairs, random_vector
        from hessian_tools.linalg.trace import trace
        from hessian_tools.operators.curvature import OPERATORS
        from hessian_tools.perturbation import mean_loss, noise, outputs_at
        from hessian_tools.seeding import stream

        operator, probes, draws, radius, seed = self._settings
        loss, gradient = objective.value_and_gradient()
        found = {"loss": loss, **dict.fromkeys(self.metrics, math.nan)}
        if not (math.isfinite(loss) and bool(gradient.isfinite().all())):
            return found
        if "gradient_norm" in found:
            found["gradient_norm"] = float(gradient.norm())
        try:
            op = OPERATORS[operator](objective, MEMORY) if {"lambda_max", "trace"} & set(found) else None
            top = None
            if op is not None and "lambda_max" in found:
                start = random_vector(op, stream(seed))
                if self._vector is not None and len(self._vector) == len(start):
                    start = self._vector + 0.1 * start / start.norm()
                top = eigenpairs(op, 1, start=start, generator=stream(seed), tol=TOL, max_products=40)
                found["lambda_max"], self._vector = float(top.values[0]), top.vectors[:, 0].clone()
            if op is not None and "trace" in found:
                found["trace"] = trace(op, probes=probes, generator=stream(seed + 1), deflate=top).estimate
            if "sharpness" in found:
                w = objective.weights()
                points = outputs_at(objective, lambda i: w + radius * w.abs() * noise(objective, seed, i), range(draws))
                found["sharpness"] = sum(mean_loss(objective, outputs) for outputs in points) / draws - loss
            if "critical_sharpness" in found:
                found["critical_sharpness"] = critical_sharpness(objective, gradient).value
        except FloatingPointError:
            self._vector = None
        return found

    def to_pandas(self) -> pandas.DataFrame:
        """Return `history` as a pandas DataFrame, one row for each measurement. Raise ImportError without pandas."""
        return data_frame(self.history)

    def plot(self) -> Figure:
        """Return a figure with one panel for the loss and each metric, against the step."""
        from hessian_tools.plots.monitor import monitor_figure

        return monitor_figure(self.history)

    def __repr__(self) -> str:
        last = ", ".join(f"{name} {value:.4g}" for name, value in self.history[-1].items()) if self.history else ""
        return f"Monitor of {', '.join(self.metrics)} every {self.every} calls{f': {last}' if last else ''}"

    def callback(self, network: Callable[[Any], nn.Module] | None = None) -> Any:
        """Return a callback for Lightning's `Trainer(callbacks=[...])`.

        It measures after training batches, by the trainer's global step, and logs to the trainer's loggers if the
        monitor has no `log`. Only the first process measures.

        Args:
            network: Function that returns the network of a LightningModule, for example `lambda module: module.net`.
                None: the LightningModule, whose `forward` must then map inputs to outputs.

        Raises:
            ImportError: If Lightning is not installed.
        """
        from ikun_hessian.api.lightning import monitor_callback

        return monitor_callback(self, network)


def _structure(network: nn.Module) -> object:
    """Return everything about a network that a copy of its parameters and buffers does not bring up to date."""
    tensors = [(name, p.shape, p.device, p.requires_grad) for name, p in network.named_parameters()]
    names = [name for name, _ in network.named_buffers()]
    modules = [
        (name, type(m), {k: v for k, v in vars(m).items() if k != "training" and type(v) in (bool, int, float, str)})
        for name, m in network.named_modules()
    ]
    return network, tensors, names, modules
