"""The objective: a mean loss over named parameters and a fixed set of samples. Everything curved is curved on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Protocol, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hessian_tools.runtime.cuda import full_precision
from hessian_tools.runtime.distributed import Group

Batch = tuple[Tensor, Tensor]


class Inputs(Protocol):
    """Inputs of N samples that are read when asked for: inputs[index] for index [n] is a tensor [n, ...].

    It must give the same for the same index, and may be asked by several threads at once.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Streamed(Sequence[Batch]):
    """Batches of the samples `parts` (indices, one tensor a batch); inputs are read anew every time.

    targets [N, ...] are in memory, on the device of `like`; floating inputs come in its dtype.
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
        """The same samples, numbered from 0 in their order here, in other batches: one of each set of numbers [n]."""
        samples = torch.cat(self.parts)
        return replace(self, parts=tuple(samples[part.cpu()] for part in parts))


def to(t: Tensor, like: Tensor) -> Tensor:
    """t on the device of `like`, and in its dtype if it is floating."""
    return t.to(device=like.device, dtype=like.dtype if t.is_floating_point() else t.dtype)


Loss = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> mean over the batch's samples


class Segmentation(Protocol):
    """Evaluates an objective in segments of time; implemented by the module hessian_tools.chain.segments."""

    def possible(self, objective: Objective) -> bool:
        """Whether the objective's model runs in segments."""

    def outputs(self, objective: Objective, x: Tensor) -> Tensor:
        """The outputs for inputs x, without derivatives."""

    def value_and_gradient(self, objective: Objective, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss on one batch and its gradient [P]."""


@dataclass(frozen=True, eq=False)
class Objective:
    """L(w) = mean over samples of loss(model(x), y); `model` is a private copy in evaluation mode.

    batches: tensors in memory, or Streamed, of which only those at work are in memory.
    parameters: name -> tensor, in the order of the flat vector [P]; all others are constants. group: processes that
    share the batches; each holds all of them and computes its own, what is returned is of all. segmentation: runs a
    network over T steps of time in about sqrt(T) segments, where that is possible: less memory, more time
    (hessian_tools.chain.segments).
    """

    model: nn.Module
    loss: Loss
    batches: Sequence[Batch]
    parameters: dict[str, Tensor]
    reset: Callable[[nn.Module], None] | None = None
    group: Group | None = None
    segmentation: Segmentation | None = None

    @property
    def segmented(self) -> bool:
        """Whether the model is run in segments of time where that is possible."""
        return self.segmentation is not None

    @property
    def samples(self) -> int:
        return sum(self.sizes)

    @property
    def targets(self) -> list[Tensor]:
        """Of every batch; no inputs are read for them."""
        streamed = self.batches
        if isinstance(streamed, Streamed):
            return [streamed.targets[part] for part in streamed.parts]
        return [y for _, y in self.batches]

    @property
    def sizes(self) -> list[int]:
        """Samples of every batch."""
        return [len(y) for y in self.targets]

    def first_inputs(self, count: int) -> Tensor:
        """Of the first batch's first samples; no others are read."""
        if isinstance(self.batches, Streamed):
            return replace(self.batches, parts=(self.batches.parts[0][:count],))[0][0]
        return self.batches[0][0][:count]

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return sum(p.numel() for p in self.parameters.values())

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.parameters.values())).dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def outputs(self, x: Tensor) -> Tensor:
        """Forward pass from a reset state."""
        with full_precision(self.device):
            segments = self.segmentation
            if segments is not None and not torch.is_grad_enabled() and segments.possible(self):
                return segments.outputs(self, x)
            if self.reset is not None:
                self.reset(self.model)
            out: Tensor = self.model(x)
        return out

    def split(self, v: Tensor) -> list[Tensor]:
        """Flat [P] (or [k, P]) -> one tensor per parameter, shaped like it (with the leading k)."""
        tensors = v.split([p.numel() for p in self.parameters.values()], -1)
        return [t.reshape((*v.shape[:-1], *p.shape)) for t, p in zip(tensors, self.parameters.values(), strict=True)]

    def flatten(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The inverse of split for [P]; None (no dependence) counts as zeros."""
        pairs = zip(tensors, self.parameters.values(), strict=True)
        return torch.cat([(torch.zeros_like(p) if t is None else t).reshape(-1) for t, p in pairs])

    def weights(self) -> Tensor:
        """The parameters as a flat vector [P]."""
        return self.flatten([p.detach() for p in self.parameters.values()])

    @property
    def share(self) -> range:
        """Indices of the batches that this process computes: all, or every size-th under a group."""
        rank, size = (0, 1) if self.group is None else (self.group.rank, self.group.size)
        return range(rank, len(self.batches), size)

    def summed(self, t: Tensor) -> Tensor:
        """The sum over the processes that share the batches; t itself in a single one."""
        return t if self.group is None else self.group.sum(t)

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """L and its (surrogate) gradient [P]."""
        both = torch.zeros(self.size + 1, dtype=torch.float64, device=self.device)
        segments = self.segmentation if self.segmentation is not None and self.segmentation.possible(self) else None
        with full_precision(self.device):
            for (x, y), weight in self.weighted_batches():
                if segments is not None:
                    loss, gradient = segments.value_and_gradient(self, (x, y))
                    both[:-1] += weight * gradient
                elif (loss := self.loss(self.outputs(x), y)).requires_grad:
                    grads = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
                    both[:-1] += weight * self.flatten(grads)
                both[-1] += weight * loss.item()
        both = self.summed(both)
        return float(both[-1]), both[:-1]

    def weighted_batches(self) -> Iterator[tuple[Batch, float]]:
        """This process's batches (see share), each with its part of all samples: a ragged last one counts for what
        it holds."""
        for i, weight in self.batch_weights().items():
            yield self.batches[i], weight

    def batch_weights(self) -> dict[int, float]:
        """Index -> weight of weighted_batches."""
        sizes = self.sizes
        total = sum(sizes)
        return {i: sizes[i] / total for i in self.share}

    def rebatched(self, size: int) -> Objective:
        """The same samples in other batches."""
        if isinstance(self.batches, Streamed):
            return self.regrouped(torch.arange(self.samples).split(size))
        x, y = self._together()
        return replace(self, batches=tuple(zip(x.split(size), y.split(size), strict=True)))

    def regrouped(self, parts: Sequence[Tensor]) -> Objective:
        """The samples, numbered from 0 in the order of the batches, in others: one of each set of numbers [n]."""
        if isinstance(self.batches, Streamed):
            return replace(self, batches=self.batches.regrouped(parts))
        x, y = self._together()
        return replace(self, batches=tuple((x[part.to(x.device)], y[part.to(y.device)]) for part in parts))

    def _together(self) -> Batch:
        if len(self.batches) == 1:
            return self.batches[0]
        x, y = (torch.cat(part) for part in zip(*self.batches, strict=True))
        return x, y


def evaluation_mode(model: nn.Module) -> None:
    """BatchNorm and Dropout evaluate; every other module stays as in training.

    Not model.eval(): some spiking libraries swap the surrogate out there, and no gradient is left. Dropout is whatever
    has "Drop" in the name of its class or of one of that class's bases: spiking libraries have their own.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm | nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d):
            module.eval()
        elif any("Drop" in c.__name__ for c in type(module).__mro__):
            module.training = False  # of it alone: what it may hold could be neurons


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
) -> Objective:
    """An objective on a private copy of `model`.

    loss(outputs, targets) must be a mean over the batch. data is (inputs [N, ...], targets [N, ...]) or a sequence
    of such batches. Inputs that are no tensor (see streamed.Inputs) stay where they are: a batch is read when it is
    used, and batch_size says how much that is. params is a pattern of parameter names (`fc*`, or several with commas).
    reset(model), if given, runs before every forward. Raises ValueError for no data, no matching parameter, or weights
    that are not finite.
    """
    model = copy.deepcopy(model)
    if dtype is not None or device is not None:
        model = model.to(device=device, dtype=dtype)
    evaluation_mode(model)
    patterns = params.split(",")
    chosen: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        wanted = p.requires_grad and any(fnmatchcase(name, pattern.strip()) for pattern in patterns)
        p.requires_grad_(wanted)
        if wanted:
            chosen[name] = p
    if not chosen:
        known = ", ".join(name for name, _ in model.named_parameters())
        raise ValueError(f"no parameter matches '{params}': the model has {known or 'none'}")
    for name, tensor in chosen.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"parameter '{name}' has NaN or infinite entries")
    first = next(iter(chosen.values()))
    objective = Objective(model, loss, _batches(data, first), chosen, reset)
    if not objective.samples:
        raise ValueError("no samples: the Hessian of an empty mean is undefined")
    return objective if batch_size is None else objective.rebatched(batch_size)


def _batches(data: Batch | tuple[Inputs, Tensor] | Sequence[Batch], like: Tensor) -> Sequence[Batch]:
    """Those that hold samples, on the device and in the dtype of `like`."""
    if not isinstance(data, tuple):
        return tuple((to(x, like), to(y, like)) for x, y in data if len(y))
    inputs, targets = data
    if isinstance(inputs, Tensor):
        return _batches([(inputs, targets)], like)
    if len(inputs) != len(targets):
        raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets: give one target per input")
    return Streamed(inputs, to(targets, like), (torch.arange(len(targets)),), like.detach())
