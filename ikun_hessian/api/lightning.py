"""The monitor as a callback of Lightning."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ikun_hessian.api.monitor import Monitor


def monitor_callback(monitor: Monitor, network: Callable[[Any], nn.Module] | None) -> Any:
    """Return a Lightning callback that measures with a monitor (see `Monitor.callback`).

    Raises:
        ImportError: If neither `lightning` nor `pytorch_lightning` is installed.
    """

    def on_train_batch_end(self: Any, trainer: Any, module: Any, *_: Any) -> None:
        step = int(trainer.global_step)
        if step == self.last or not trainer.is_global_zero:  # batches of which the gradients are only accumulated
            return
        self.last = step
        if network is not None:
            found = monitor(network(module), step)
        else:
            owner, module._trainer = module._trainer, None  # a copy of the module would copy the trainer too
            try:
                found = monitor(module, step)
            finally:
                module._trainer = owner
        if found is not None and monitor.log is None:
            values = {f"{monitor.prefix}{name}": value for name, value in found.items() if name != "step"}
            for logger in trainer.loggers:
                logger.log_metrics(values, step)

    kind = type("MonitorCallback", (_lightning().Callback,), {"last": -1, "on_train_batch_end": on_train_batch_end})
    return kind()


def _lightning() -> Any:
    """Return the installed package of Lightning."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError("a callback needs Lightning: pip install lightning")
