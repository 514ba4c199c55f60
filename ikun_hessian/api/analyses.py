"""Analyse a network that is in memory: `analyze`, `flatness`, `landscape` and `true_hessian`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hessian_tools.io.errors import ParameterError
from ikun_hessian.jobs.errors import in_keywords
from ikun_hessian.jobs.given import Opening, open_given, untouched

if TYPE_CHECKING:
    from ikun_hessian.api.flatness import Flatness
    from ikun_hessian.api.landscape import Landscape
    from ikun_hessian.api.spectrum import Analysis
    from ikun_hessian.api.true_hessian import TrueHessian
    from ikun_hessian.jobs.job import Job

Loss = str | Callable[..., Any]


def analyze(
    model: Any,
    data: Any = None,
    loss: Loss | None = None,
    *,
    timesteps: int | None = None,
    samples: int | None = None,
    density: bool = False,
    progress: bool = True,
    **options: Any,
) -> Analysis:
    """Measure the curvature of a network's loss: eigenvalues and traces of its Hessian and GGN, with their errors.

    The same numbers as from the command `ikun-hessian spectrum`. The model is not changed: not its weights, modes,
    gradients and neurons' states, nor the states of the random generators.

    Args:
        model: A torch module, also of SpikingJelly, snnTorch, Norse or Sinabs, a `nir.NIRGraph`, or the path of a
            checkpoint of ikun-hessian or of a .nir file.
        data: Samples: tensors (inputs [N, ...], targets [N, ...]), a Dataset, or a DataLoader. None: those that the
            checkpoint was trained on.
        loss: "ce" (cross-entropy), "mse" (of one-hot targets), "tet", or a function loss(outputs, targets) that is a
            mean over samples. None: that of the checkpoint.
        timesteps: Number of time steps T to run the network for. None if it runs through time by itself.
        samples: Number of samples; None for all. The errors say how far the numbers would differ for others.
        density: Whether to estimate the spectral density too.
        progress: Whether to show a progress bar, if standard error is a terminal.
        options: Fields of `hessian_tools.SpectrumSettings`, such as top=10, operators=("hessian", "ggn") and seed=0,
            and of `Opening`, such as sequences=True, readout="last", surrogate="atan:2" and device="cuda".

    Returns:
        The result, for example `r.hessian.eigenvalues` and `r.ggn.trace`.

    Raises:
        ValueError: If the network, the samples or an option cannot be used. The message is one line that says what to
            do.
        AnalysisError: If a number is not finite.
        TypeError: If an option does not exist.
    """
    from hessian_tools.analysis.settings import SpectrumSettings
    from ikun_hessian.api.spectrum import Analysis
    from ikun_hessian.jobs.analyses.spectrum import analyse_spectrum

    chosen, opening = split_options(SpectrumSettings, options, timesteps, samples)
    with opened_job(model, data, loss, opening) as (job, memory):
        settings = SpectrumSettings(**{"memory": memory, **chosen}, density=density)
        return Analysis(analyse_spectrum(job, settings, None, shown=progress))


def flatness(
    model: Any,
    data: Any = None,
    loss: Loss | None = None,
    *,
    timesteps: int | None = None,
    samples: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Flatness:
    """Compute standard flatness metrics of a network, each with errors and the loss that it describes.

    The same numbers as from the command `ikun-hessian flatness`. The model is not changed.

    Args:
        model: See `analyze`, as for `data`, `loss`, `timesteps`, `samples` and `progress`.
        data: Samples; None for those of a checkpoint.
        loss: Name of a loss, or a function.
        timesteps: Number of time steps.
        samples: Number of samples; None for all.
        progress: Whether to show a progress bar.
        options: Fields of `hessian_tools.FlatnessSettings`, such as rho=0.05 and seed=0, and of `Opening`.

    Returns:
        The metrics, for example `r["critical sharpness"].value`.

    Raises:
        ValueError: If the network, the samples or an option cannot be used.
        AnalysisError: If the loss is not finite.
        TypeError: If an option does not exist.
    """
    from hessian_tools.analysis.flatness.settings import FlatnessSettings
    from ikun_hessian.api.flatness import Flatness
    from ikun_hessian.jobs.analyses.flatness import analyse_flatness

    chosen, opening = split_options(FlatnessSettings, options, timesteps, samples)
    with opened_job(model, data, loss, opening) as (job, memory):
        settings = FlatnessSettings(**{"memory": memory, **chosen})
        return Flatness(analyse_flatness(job, settings, None, shown=progress))


def landscape(
    model: Any,
    data: Any = None,
    loss: Loss | None = None,
    *,
    timesteps: int | None = None,
    samples: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Landscape:
    """Compute the loss along lines and planes through a network's weights.

    The same numbers as from the command `ikun-hessian landscape`. The model is not changed.

    Args:
        model: See `analyze`, as for `data`, `loss`, `timesteps`, `samples` and `progress`.
        data: Samples; None for those of a checkpoint.
        loss: Name of a loss, or a function.
        timesteps: Number of time steps.
        samples: Number of samples; None for all.
        progress: Whether to show a progress bar.
        options: Fields of `hessian_tools.LandscapeSettings`, such as directions=("top1", "random1") and planes=(), and
            of `Opening`.

    Returns:
        The lines and planes, for example `r.lines["top1"].loss`.

    Raises:
        ValueError: If the network, the samples or an option cannot be used.
        AnalysisError: If a number is not finite.
        TypeError: If an option does not exist.
    """
    from hessian_tools.analysis.landscape import LandscapeSettings
    from ikun_hessian.api.landscape import Landscape
    from ikun_hessian.jobs.analyses.landscape import analyse_landscape

    chosen, opening = split_options(LandscapeSettings, options, timesteps, samples)
    with opened_job(model, data, loss, opening) as (job, memory):
        settings = LandscapeSettings(**{"memory": memory, **chosen})
        return Landscape(analyse_landscape(job, settings, None, shown=progress))


def true_hessian(
    model: Any,
    data: Any = None,
    loss: Loss | None = None,
    *,
    timesteps: int | None = None,
    samples: int | None = None,
    progress: bool = True,
    **options: Any,
) -> TrueHessian:
    """Measure the Hessian of a network's smoothed loss itself, from forward passes only.

    The smoothed loss is the mean of the loss under weight noise. For a spiking network it has a curvature where the
    loss itself is piecewise constant, and no surrogate is involved. The same numbers as from the command
    `ikun-hessian spectrum --operator true`. The model is not changed.

    Args:
        model: See `analyze`, as for `data`, `loss`, `timesteps`, `samples` and `progress`.
        data: Samples; None for those of a checkpoint.
        loss: Name of a loss, or a function.
        timesteps: Number of time steps.
        samples: Number of samples; None for all.
        progress: Whether to show a progress bar.
        options: Fields of `hessian_tools.TrueHessianSettings`, such as noise=0.1, draws=4000 and operators="ggn" (whose
            eigenvectors are measured too), and of `Opening`.

    Returns:
        The result, for example `r.trace.value`.

    Raises:
        ValueError: If the network, the samples or an option cannot be used.
        FloatingPointError: If the loss is not finite under the noise.
        TypeError: If an option does not exist.
    """
    from hessian_tools.analysis.true_hessian.settings import TrueHessianSettings
    from ikun_hessian.api.true_hessian import TrueHessian
    from ikun_hessian.jobs.analyses.true_hessian import analyse_true_hessian

    chosen, opening = split_options(TrueHessianSettings, options, timesteps, samples)
    with opened_job(model, data, loss, opening, forward_only=not chosen.get("operators")) as (job, memory):
        settings = TrueHessianSettings(**{"memory": memory, **chosen})
        return TrueHessian(analyse_true_hessian(job, settings, None, shown=progress))


@contextmanager
def opened_job(
    model: Any, data: Any, loss: Loss | None, opening: Opening, forward_only: bool = False
) -> Iterator[tuple[Job, float]]:
    """Open a network for an analysis that runs inside. The random generators and torch's settings are put back after.

    Raises:
        ParameterError: See `open_given`. Parameters are written as arguments of the functions of `ikun_hessian`.
    """
    try:
        with untouched():
            yield open_given(model, data, loss, opening, forward_only)
    except ParameterError as error:
        raise type(error)("{}", in_keywords(error)) from error.__cause__


def opening_of(options: dict[str, Any], timesteps: int | None, samples: int | None) -> Opening:
    """Return the options of an `Opening`. Raise TypeError for an unknown name."""
    known = {f.name for f in dataclasses.fields(Opening)}
    _refuse_unknown(options, known)
    return Opening(**options, timesteps=timesteps, samples=samples)


def split_options(
    kind: type[Any], options: dict[str, Any], timesteps: int | None, samples: int | None
) -> tuple[dict[str, Any], Opening]:
    """Split options into fields of settings of a kind and an `Opening`. Raise TypeError for an unknown name."""
    own = {f.name for f in dataclasses.fields(kind)} - {"memory"}
    _refuse_unknown(options, own | {f.name for f in dataclasses.fields(Opening)})
    chosen = {name: options.pop(name) for name in own & options.keys()}
    if isinstance(chosen.get("operators"), str):
        chosen["operators"] = (chosen["operators"],)
    return chosen, opening_of(options, timesteps, samples)


def _refuse_unknown(options: Iterable[str], known: set[str]) -> None:
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise TypeError(f"no option '{name}'" + (f": did you mean '{near[0]}'?" if near else ""))
