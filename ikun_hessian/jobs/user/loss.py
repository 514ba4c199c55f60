"""The loss of a user's network: by name or as a function, and whether its targets fit the network's outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ikun_hessian.jobs.errors import UsageError
from ikun_hessian.jobs.user.code import called, load_function, readable
from ikun_hessian.jobs.user.samples import kind_text

if TYPE_CHECKING:
    from torch import Tensor

    from hessian_tools.objective import Loss
    from ikun.adapters import Adapted

ALIASES = {"cross_entropy": "ce", "cross-entropy": "ce", "mean_square": "mse", "mean-square": "mse"}


def loss_name(text: str) -> str:
    """Return the short name of a loss. Other texts are returned as they are."""
    return ALIASES.get(text, text)


def fitting_targets(loss: str, y: Tensor, adapted: Adapted, x: Any) -> Tensor:
    """Check that targets fit the network's outputs.

    Labels [N] are converted to long, and so are labels [N, ...] of outputs [N, K, ...] for cross-entropy. Targets of
    the shape of the outputs, one-hot or of a regression, are converted to floating point; for cross-entropy they must
    be probabilities along K. The targets of a loss of the user's are not checked.

    Raises:
        UsageError: If the targets do not fit.
    """
    if _weight(loss) is not None:
        loss = "tet"
    if loss not in ("mse", "ce", "tet"):
        return y
    shape = [len(y), *_outputs(adapted, x, 3).shape[1:]]
    over_time = _over_time(adapted)
    if over_time and loss == "ce":
        raise UsageError(
            "{loss} needs one output per sample: with {readout} give tet or a function of your own",
            loss="ce",
            readout="none",
        )
    if loss == "mse" and y.is_floating_point() and y.dim() == 1 and shape == [len(y), 1]:
        return y[:, None]
    if loss == "mse" and y.is_floating_point() and list(y.shape) == [*shape, 1]:
        return y[:, 0]
    if list(y.shape) == shape and (y.dim() > 1 or loss == "mse") and not y.is_complex() and loss != "tet":
        y = y if y.is_floating_point() else y.float()
        if loss == "ce" and bool((y < 0).any() or ((y.sum(1) - 1).abs() > 1e-3).any()):
            raise UsageError("{loss} needs labels [N], or targets [N, K] whose rows are probabilities", loss="ce")
        return y
    labels = [shape[0], *shape[2:]] if loss == "ce" and len(shape) > 1 else shape[:1]  # one per pixel or step
    wrong = y.is_floating_point() or y.is_complex() or str(y.dtype) == "torch.bool"
    if wrong or list(y.shape) not in (labels, shape[:1]):
        raise UsageError(
            "{loss} needs labels {} of whole numbers, not {}: return such labels, targets of the outputs' shape {}, or "
            "give a loss function of your own",
            "[N]" if len(labels) == 1 else labels,
            kind_text(y),
            shape,
            loss=loss,
        )
    if loss == "tet" and len(shape) != 3:
        raise UsageError(
            "{loss} needs outputs [N, T, K], but those of the network are [N, {}: give {readout}",
            str(shape[1:])[1:],
            loss="tet",
            readout="none",
        )
    if len(shape) == 1 or (loss != "tet" and len(shape) > 2 and y.dim() == 1):
        needed = f", or labels {labels}" if len(labels) > 1 else ""
        cure = ": give targets of that shape" if over_time else ""
        raise UsageError(
            "{loss} needs outputs [N, K]{}, but those of the network are [N, {}{}",
            needed,
            str(shape[1:])[1:],
            cure,
            loss=loss,
        )
    classes = shape[-1] if loss == "tet" else shape[1]
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise UsageError(
            f"labels must be from 0 to {classes - 1} for {classes} outputs, but some are {low if low < 0 else high}"
        )
    return y.long()


def _over_time(adapted: Adapted) -> bool:
    """Whether the loss gets the outputs over time."""
    return adapted.plan.time_axis is not None and adapted.plan.readout == "none"


def _weight(loss: str) -> float | None:
    """Return the weight of the square error of "tet" or "tet:WEIGHT"; None for another loss."""
    name, _, weight = loss.partition(":")
    try:
        return None if name != "tet" else float(weight or 0.05)
    except ValueError:
        return None  # a function in a module of that name


def _outputs(adapted: Adapted, x: Any, count: int) -> Tensor:
    """Return the outputs [n, ...] for the first `count` samples."""
    import torch

    from hessian_tools import nested
    from ikun.adapters.summary import inputs_of

    with torch.no_grad():
        out: Tensor = nested.call(adapted.model, inputs_of(adapted, nested.selected(x, slice(count))))
    return out


def loss_by_name(loss: str) -> Loss | None:
    """Return the loss of this name, such as "mse", "ce" or "tet:0.1"; None if there is none."""
    from ikun.losses import LOSSES, tet

    if loss in LOSSES:
        return LOSSES[loss]
    if (weight := _weight(loss)) is None:
        return None
    try:
        return tet(weight)
    except ValueError as error:
        raise UsageError("{loss}: {}", error, loss=loss) from None


def loss_of_option(loss: str, adapted: Adapted, x: Any, y: Tensor) -> tuple[Loss, list[Callable[..., Any]]]:
    """Return the loss that --loss names, and the user's functions that it calls.

    Raises:
        UsageError: If there is no such loss, or a function of the user's cannot be used (see `tried_loss`).
    """
    if (found := loss_by_name(loss)) is not None:
        return found, []
    if ":" not in loss:
        raise UsageError(f"--loss {loss}: give mse, ce, tet, or module:function")
    function = load_function("--loss", loss)
    if isinstance(function, type):
        function = called("--loss", loss, function)
    return tried_loss(function, f"--loss {loss}", adapted, x, y)


def tried_loss(
    function: Callable[..., Any], name: str, adapted: Adapted, x: Any, y: Tensor
) -> tuple[Loss, list[Callable[..., Any]]]:
    """Try a loss of the user's on a few samples. It must return one finite number with a gradient.

    That it is a mean over samples is checked over the data (`hessian_tools.checks`).

    Args:
        function: The function loss(outputs, targets).
        name: What to call it in messages.
        adapted: The network.
        x: Inputs [N, ...].
        y: Targets [N, ...].

    Returns:
        The loss, and the user's functions that it calls.

    Raises:
        UsageError: If the loss cannot be used.
    """
    import torch

    from hessian_tools.evaluation import loss_in_double
    from ikun.losses import time_first

    what = f"{name} in double precision"
    outputs = _outputs(adapted, x, 8).double().requires_grad_()
    if _over_time(adapted):
        what += f" on outputs {list(outputs.shape)}, the samples first"
    code = [function if hasattr(function, "__code__") else type(function)]
    if type(function).__module__.startswith("snntorch.functional"):  # these take outputs [T, N, K]
        if outputs.dim() < 3:
            raise UsageError("{} needs the outputs over time: give {readout}", name, readout="none")
        function = time_first(function)
    wide = loss_in_double(function)
    targets = y[:8].to(outputs.device, torch.float64 if y.is_floating_point() else y.dtype, copy=True)
    with readable(what):
        found = wide(outputs, targets)
    if not isinstance(found, torch.Tensor) or found.dim():
        raise UsageError(f"{what}: returned {kind_text(found)}, but a tensor with one number and no axes is needed")
    if not found.requires_grad:
        raise UsageError(f"{what}: torch finds no gradient with respect to the outputs")
    if not torch.isfinite(found):
        raise UsageError(f"{what}: returned {float(found)}")
    return function, code
