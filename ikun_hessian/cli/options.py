"""Options that several commands share, and what they mean."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ikun_hessian.jobs.job import Own

Command = Callable[..., Any]
LIBRARIES = (
    "spikingjelly",
    "snntorch",
    "norse",
    "none",
)  # as ikun.adapters has them, which takes long to load
OUTPUTS = ("spikes", "membrane")
READOUTS = ("mean", "sum", "last", "max")


def shared(*options: Command) -> Command:
    """One decorator that adds all of these options, in this order in the help."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _positive(context: click.Context, option: click.Parameter, value: float | None) -> float | None:
    if value is not None and not value > 0:
        raise click.UsageError("--batch-size and --memory must be positive")
    return value


device_option = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
data_dir_option = click.option(
    "--data-dir", type=click.Path(path_type=Path), help="Folder with the data set's files [default: the cache]."
)
out_option = click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for results [default: beside it]."
)
tag_option = click.option("--tag", help="Part of the results' name, to keep results of several settings.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output and nothing else.")
opening_options = shared(
    click.option("--samples", default="all", show_default=True, help="So many samples, or all."),
    click.option("--split", type=click.Choice(["train", "test"]), default="train", show_default=True),
    click.option(
        "--batch-size",
        type=int,
        callback=_positive,
        help="Samples a forward pass [default: what fits into a quarter of --memory].",
    ),
    click.option("--params", default="*", show_default=True, help="Pattern of parameter names, for instance 'fc*'."),
    click.option("--surrogate", help="Analyse with this surrogate instead of the one trained with."),
    click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True),
    click.option(
        "--memory",
        type=float,
        callback=_positive,
        help="GiB for kept primals and eigenvectors [default: half of the memory].",
    ),
    data_dir_option,
    device_option,
)


"""What `opening.open_job` takes, under the same names: every command that analyses a checkpoint has these."""


def _keep(context: click.Context, option: click.Parameter, value: Any) -> None:
    context.meta.setdefault(Own.__qualname__, {})[option.name] = value


def _own(*names: str, **settings: Any) -> Command:
    """An option that is no parameter of the command: its value becomes part of the command's `own`."""
    return click.option(*names, callback=_keep, expose_value=False, **settings)


def own_options(command: Command) -> Command:
    """Options on networks of the user's own; the command gets them all as `own`, an Own."""

    @functools.wraps(command)
    def collected(**values: Any) -> Any:
        return command(own=Own(**click.get_current_context().meta[Own.__qualname__]), **values)

    options = shared(
        _own("--model", metavar="MODULE:FUNCTION", help="Your network: the function makes it. This runs your code."),
        _own("--data", metavar="MODULE:FUNCTION", help="Your samples: inputs and targets, a data set or batches."),
        _own("--loss", metavar="LOSS", help="mse on one-hot rates, ce, or MODULE:FUNCTION, a mean over samples."),
        _own("--library", type=click.Choice(LIBRARIES), help="Your network's library [default: found by its layers]."),
        _own("--timesteps", type=int, help="Steps to run it for [default: it runs through time by itself]."),
        _own("--sequences", is_flag=True, help="Samples are sequences [T, ...], one input a step."),
        _own("--time-first/--batch-first", default=None, help="Where time is in its inputs and outputs."),
        _own("--output", type=click.Choice(OUTPUTS), help="Of the (spikes, ..., membrane) it returns."),
        _own("--readout", type=click.Choice(READOUTS), help="Over time."),
        _own(
            "--replace-surrogate", metavar="NAME:P", help="In place of surrogates that cannot be differentiated twice."
        ),
        _own("--reset", metavar="RESET", help="MODULE:FUNCTION that clears its state; of a .nir file, hard or soft."),
        _own("--dt", type=float, help="Time step of a .nir file, in the unit of its time constants."),
    )
    made: Command = options(collected)
    return made
