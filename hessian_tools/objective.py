"""The objective: a mean loss over fixed samples as a function of a model's named parameters.

Every operator of this package measures the curvature of an `Objective`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol, overload

import torch
from torch import Tensor, nn

from hessian_tools import nested
from hessian_tools.checks import ObjectiveError, refuse_autocast
from hessian_tools.checks import check as check_objective
from hessian_tools.copy_check import check_copy
from hessian_tools.evaluation import (
    converted_model,
    copy_model,
    differentiable,
    evaluation_mode,
    loss_in_double,
    twice_differentiable,
)
from hessian_tools.runtime.cuda import full_precision
from hessian_tools.runtime.distributed import Group

Batch = tuple[Any, Tensor]  # inputs, a tensor or a dict, tuple or list of tensors (see `nested`), and targets


class Inputs(Protocol):
    """Inputs of N samples that are read on demand: inputs[index] for an index tensor [n] is a tensor [n, ...].

    Implementations must return the same values for the same index and must be safe to call from several threads.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Streamed(Sequence[Batch]):
    """Batches whose inputs are read from storage every time they are used.

    Attributes:
        inputs: The inputs of all samples, read on demand.
        targets: Targets [N, ...] of all samples, held in memory on the device of `like`.
        parts: Sample indices of each batch, one index tensor [n] per batch.
        like: A tensor whose device, and dtype for floating-point inputs, the inputs are converted to.
    """

    inputs: Inputs
    targets: Tensor
    parts: tuple[Tensor, ...]
    like: Tensor

    def __len__(self) -> int:
        return len(self.parts)

    @overload
    def __getitem__(self, i: int) -> Batch: ...
    @overload
    def __getitem__(self, i: slice) -> Streamed: ...
    def __getitem__(self, i: int | slice) -> Batch | Streamed:
        if isinstance(i, slice):
            return replace(self, parts=self.parts[i])
        return to(self.inputs[self.parts[i]], self.like), self.targets[self.parts[i]]

    def regrouped(self, parts: Sequence[Tensor]) -> Streamed:
        """Return the same samples in other batches.

        Args:
            parts: One index tensor [n] per new batch. Samples are numbered from 0 in their current order.
        """
        samples = torch.cat(self.parts)
        return replace(self, parts=tuple(samples[part.cpu()] for part in parts))


def to(t: Tensor, like: Tensor) -> Tensor:
    """Move `t` to the device of `like`, and to its dtype if `t` is floating-point."""
    moved: Tensor = nested.converted(t, like)
    return moved


Loss = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> mean over the batch's samples


@dataclass(frozen=True, eq=False)
class Objective:
    """The function L(w) = mean over samples of loss(model(x), y) of the selected parameters w [P].

    Attributes:
        model: A private copy of the model in evaluation mode (see `evaluation_mode`).
        loss: The function loss(outputs, targets), a mean over the samples of a batch.
        batches: Tensors held in memory, or a `Streamed` object that reads each batch when it is used.
        parameters: Tensor of each selected parameter by name, in the order of the flat vector [P]. All other parameters
            are constants.
        reset: Called with the model before every forward pass, for models that keep a state. None if not needed.
        group: Processes that share the batches. Each process holds all batches and computes its own share; results are
            summed over the processes.
        batch_memory: Bytes that the product of one batch may keep; 0: as many as the operator may. If it keeps more, a
            network that can be traced runs in segments (`hessian_tools.engine.segments`), which takes less memory and
            more time.
        checked: Whether `hessian_tools.checks.check` is done with. If not, the first operator does it, and sets this.
            Objectives that are made from this one (other batches, other parameters) are not checked again.
        traces: Whether products may be traced. Without, autograd computes them, which is sooner done for one or two.
        programs: The traced products of the model, one per kind and shape of a batch (`hessian_tools.engine`).
        parts: Number of consecutive batches of each part that `regrouped` made; empty if each batch is a part.
    """

    model: nn.Module
    loss: Loss
    batches: Sequence[Batch]
    parameters: dict[str, Tensor]
    reset: Callable[[nn.Module], None] | None = None
    group: Group | None = None
    batch_memory: float = 0.0
    checked: bool = False
    parts: tuple[int, ...] = ()
    traces: bool = True

    def check_once(self, derivatives: bool = True) -> None:
        """Check the objective unless that is done (see `hessian_tools.checks.check`).

        Args:
            derivatives: Whether the derivatives of the network's own autograd functions are checked.

        Raises:
            ObjectiveError: If a check fails.
        """
        if not self.checked:
            check_objective(self, derivatives)
            object.__setattr__(self, "checked", True)

    programs: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def samples(self) -> int:
        """N, the number of samples."""
        return sum(self.sizes)

    @property
    def targets(self) -> list[Tensor]:
        """Targets of every batch. No inputs are read."""
        streamed = self.batches
        if isinstance(streamed, Streamed):
            return [streamed.targets[part] for part in streamed.parts]
        return [y for _, y in self.batches]

    @property
    def sizes(self) -> list[int]:
        """Number of samples in every batch."""
        return [len(y) for y in self.targets]

    def first_inputs(self, count: int) -> Any:
        """Return the inputs of the first `count` samples of the first batch. No other samples are read."""
        if isinstance(self.batches, Streamed):
            return replace(self.batches, parts=(self.batches.parts[0][:count],))[0][0]
        x, y = self.batches[0]
        return nested.selected(x, torch.arange(min(count, len(y))))  # a copy

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return next(iter(self.parameters.values())).dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self.parameters.values())).device

    def outputs(self, x: Any) -> Tensor:
        """Run a forward pass on inputs x from a reset state. Raises ObjectiveError inside `torch.autocast`."""
        refuse_autocast(self.device)
        with full_precision(self.device):
            if self.reset is not None:
                self.reset(self.model)
            before = _versions(self.model)
            with twice_differentiable():
                out: Tensor = nested.call(self.model, x)
            if _versions(self.model) != before:
                raise ObjectiveError("a forward pass changes the network's parameters: a Hessian needs fixed weights")
        return out

    def split(self, v: Tensor) -> list[Tensor]:
        """Split a flat vector [P] or [k, P] into one tensor per parameter, of its shape (after the leading k)."""
        tensors = v.split([p.numel() for p in self.parameters.values()], -1)
        return [t.reshape((*v.shape[:-1], *p.shape)) for t, p in zip(tensors, self.parameters.values(), strict=True)]

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Concatenate one tensor per parameter into [P], the inverse of `split`. None counts as zeros."""
        pairs = zip(tensors, self.parameters.values(), strict=True)
        return torch.cat([(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in pairs])

    def weights(self) -> Tensor:
        """Return the parameters as a flat vector [P]."""
        return self.flatten([p.detach() for p in self.parameters.values()])

    @property
    def share(self) -> range:
        """Indices of the batches that this process computes: all, or every size-th one in a group."""
        rank, size = (0, 1) if self.group is None else (self.group.rank, self.group.size)
        return range(rank, len(self.batches), size)

    def summed(self, t: Tensor) -> Tensor:
        """Return the sum of `t` over the processes that share the batches; `t` itself without a group."""
        return t if self.group is None else self.group.sum(t)

    @differentiable
    def value_and_gradient(self) -> tuple[float, Tensor]:
        """Return L and its gradient [P] (the surrogate gradient, for a spiking network)."""
        both = torch.zeros(self.size + 1, dtype=torch.float64, device=self.device)
        with full_precision(self.device):
            for (x, y), weight in self.weighted_batches():
                if (loss := self.loss(self.outputs(x), y)).requires_grad:
                    grads = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
                    both[:-1] += weight * self.flatten(grads)
                both[-1] += weight * loss.item()
        both = self.summed(both)
        return float(both[-1]), both[:-1]

    def weighted_batches(self) -> Iterator[tuple[Batch, float]]:
        """Yield each batch of this process with its weight, its share of all samples (see `share`)."""
        for i, weight in self.batch_weights().items():
            yield self.batches[i], weight

    def batch_weights(self) -> dict[int, float]:
        """Return the weight of each batch of this process by the index of the batch."""
        sizes = self.sizes
        total = sum(sizes)
        return {i: sizes[i] / total for i in self.share}

    def rebatched(self, size: int) -> Objective:
        """Return the same objective with its samples in batches of `size`. The last batch may be smaller.

        Batches whose inputs or targets differ in shape are not joined. Each is divided, so more batches can be smaller.
        """
        if isinstance(self.batches, Streamed):
            return self.regrouped(torch.arange(self.samples).split(size))
        alike = len({nested.signature(batch) for batch in self.batches}) == 1
        whole = (nested.joined_batches(self.batches),) if alike else self.batches
        cut = [(x, y, slice(i, i + size)) for x, y in whole for i in range(0, len(y), size)]
        return replace(self, batches=tuple((nested.selected(x, part), y[part]) for x, y, part in cut), parts=())

    def regrouped(self, parts: Sequence[Tensor]) -> Objective:
        """Return the objective on other batches of its samples.

        Args:
            parts: One index tensor [n] per new batch. Samples are numbered from 0 in the order of the current batches.
                A part whose samples differ in shape becomes several batches, one per shape.
        """
        if isinstance(self.batches, Streamed):
            return replace(self, batches=self.batches.regrouped(parts))
        ends = torch.tensor(self.sizes).cumsum(0)
        found = [nested.picked(self.batches, ends, part.cpu()) for part in parts]
        counts = tuple(len(batches) for batches in found)
        return replace(self, batches=tuple(batch for batches in found for batch in batches), parts=counts)


def _versions(model: nn.Module) -> list[int]:
    """Return how often each parameter was written."""
    return [0 if p.is_inference() else p._version for p in model.parameters()]


@differentiable
def make_objective(
    model: nn.Module,
    loss: Loss,
    data: Batch | tuple[Inputs, Tensor] | Sequence[Batch],
    *,
    batch_size: int | None = None,
    params: str = "*",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    reset: Callable[[nn.Module], None] | None = None,
    check: bool = True,
    forward_only: bool = False,
) -> Objective:
    """Build an objective on a private copy of `model`, in evaluation mode except for spiking neurons.

    Args:
        model: Any model with named parameters.
        loss: The function loss(outputs, targets). It must be a mean over the samples of a batch.
        data: A pair (inputs [N, ...], targets [N, ...]) or a sequence of such batches. Inputs are a tensor, or a dict,
            tuple or list of tensors, which the model gets as keyword arguments or arguments if its forward accepts
            them, and otherwise as one argument. Any other inputs (see `Inputs`) stay where they are, and each batch is
            read when it is used.
        batch_size: Number of samples in a batch. None keeps the given batches.
        params: Pattern of the parameter names to select, such as `fc*`; several patterns are separated by commas.
        dtype: Converts the parameters and floating-point data. None keeps the model's dtype.
        device: Moves the model and the data. None keeps the model's device.
        reset: Called with the model before every forward pass.
        check: Check on a few samples that the network is deterministic, that the output of a sample does not depend on
            the other samples, and that the loss is a mean over samples (see `hessian_tools.checks`).
        forward_only: Whether only forward passes will be made, so that the derivatives of the network's own autograd
            functions are not checked.

    Returns:
        The objective.

    Raises:
        ValueError: If there are no samples, if no parameter matches `params`, if a selected weight is NaN or infinite,
            if the number of inputs differs from the number of targets, or if the device has no float64.
        ObjectiveError: If a check fails.
    """
    where = {p.device.type for p in model.parameters()} if device is None else {torch.device(device).type}
    if "mps" in where:
        raise ValueError(
            "device mps has no float64, in which sums and derivatives of the loss are computed: use the cpu"
        )
    original, model = model, copy_model(model)
    model = model.to(device=device)
    if dtype is not None:
        converted_model(model, dtype)
    patterns = params.split(",")
    chosen: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        wanted = p.requires_grad and any(fnmatchcase(name, pattern.strip()) for pattern in patterns)
        wanted = wanted and p.numel() > 0
        p.requires_grad_(wanted)
        if wanted:
            chosen[name] = p
    if not chosen:
        known = ", ".join(name for name, _ in model.named_parameters())
        raise ValueError(f"no parameter matches '{params}': the model has {known or 'no parameters'}")
    for name, tensor in chosen.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"parameter '{name}' has NaN or infinite entries")
    first = next(iter(chosen.values()))
    objective = Objective(model, loss_in_double(loss), _batches(data, first), chosen, reset)
    if not objective.samples:
        raise ValueError("no samples: the objective needs at least one batch with samples")
    evaluation_mode(model, lambda tried: replace(objective, model=tried).outputs(objective.first_inputs(2)))
    if batch_size is not None:
        objective = objective.rebatched(batch_size)
    if check:
        check_copy(original, model, lambda: objective.outputs(objective.first_inputs(2)))
        objective.check_once(derivatives=not forward_only)
    return replace(objective, checked=True)


def _batches(data: Batch | tuple[Inputs, Tensor] | Sequence[Batch], like: Tensor) -> Sequence[Batch]:
    """Return the batches that contain samples, on the device and in the dtype of `like`."""
    if not (isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor)):
        batches = tuple((nested.converted(x, like), to(y, like)) for x, y in data if len(y))
        for x, y in batches:
            if (count := nested.sample_count(x)) != len(y):
                raise ValueError(f"{count} inputs but {len(y)} targets: give one target per input")
        return batches
    inputs, targets = data
    if isinstance(inputs, Tensor | Mapping | tuple | list):
        return _batches([(inputs, targets)], like)
    if len(inputs) != len(targets):
        raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets: give one target per input")
    return Streamed(inputs, to(targets, like), (torch.arange(len(targets)),), like.detach())
