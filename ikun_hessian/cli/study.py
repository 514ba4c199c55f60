"""The command `study`: train, analyse, and write tables and figures."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ikun_hessian.cli.click_options import options
from ikun_hessian.cli.screen import FailedError, echo
from ikun_hessian.cli.signals import end_with, interrupted_by
from ikun_hessian.experiments.selection import parse_condition
from ikun_hessian.experiments.study import preset
from ikun_hessian.experiments.study.grid import run_grid
from ikun_hessian.experiments.study.preset import AnalysisTable, Preset, PresetError
from ikun_hessian.jobs.device import half_of_the_memory, pick
from ikun_hessian.jobs.options import DATA_DIR, DEVICE, MOST_MEMORY
from ikun_hessian.jobs.schema import Option

if TYPE_CHECKING:
    from ikun_hessian.experiments.generalization.network import NetworkUnit
    from ikun_hessian.experiments.runs import TrainingRun
    from ikun_hessian.experiments.study.plan import StudyPlan
    from ikun_hessian.experiments.study.unit import Unit


PUBLISHED = AnalysisTable(
    "spectrum", "final", "published", {"samples": 1, "split": "test", "density": False, "magnitude": 50}
)
MEMORY = Option(
    "memory", float, None, "Memory per run in GiB [default: half of the memory, divided by --jobs].", positive=True,
    most=MOST_MEMORY,
)  # fmt: skip
TEMPORARIES = r"study\.json|tables\.md|(compare|robustness)\.csv"
DRAWN = r".+\.(png|pdf|csv)"


@click.command("study")
@click.argument("name", required=False)
@click.option("--list", "listed", is_flag=True, help="List the presets of the package, and show where their files are.")
@click.option("--quick", is_flag=True, help="Run the small version of the preset: minutes on two cores.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Folder of the study [default: study-NAME]."
)
@click.option("--jobs", type=click.IntRange(1), help="Number of parallel runs [default: one per core; 1 on CUDA].")
@click.option("--seeds", type=click.IntRange(1), help="Number of seeds per combination [default: that of the preset].")
@click.option(
    "--as-published/--no-as-published",
    default=None,
    help="Also compute the spectrum on one test image, as the paper's code does [default: what the preset says].",
)
@options(MEMORY)
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a key of the preset. Repeatable.")
@click.option("--dry-run", is_flag=True, help="Show what would run and what is already done.")
@click.option("--force", is_flag=True, help="Redo results of other settings, and allow more than 1000 runs.")
@options(DATA_DIR, DEVICE)
def study_command(
    name: str | None,
    listed: bool,
    quick: bool,
    out: Path | None,
    jobs: int | None,
    seeds: int | None,
    as_published: bool | None,
    memory: float | None,
    changes: tuple[str, ...],
    dry_run: bool,
    force: bool,
    data_dir: Path | None,
    device: str,
) -> None:
    """Train and analyse all runs of a study, then write its tables and figures.

    NAME is a preset (see --list) or a TOML file of your own. To continue a study that was stopped, run the same
    command again: finished work is kept. The results are OUT/runs, OUT/tables.md, OUT/compare.csv and OUT/figures.
    Keys of --set are the options of `train`, spectrum.KEY, flatness.KEY, robustness.KEY, own.KEY,
    generalization.KEY, and the top-level keys of the preset. A preset with a table [own] runs your code.
    """
    if listed:
        echo("\n".join(_list()))
        return
    if name is None:
        raise click.UsageError("give the NAME of a preset (--list shows them), or a .toml file of your own")
    path = preset.find(name)
    found = _published(preset.read_preset(path, quick=quick, changes=changes, seeds=seeds), as_published)
    folder = out or Path("-".join(["study", path.stem, *(["quick"] if quick else [])]))
    where = pick(device)
    jobs = jobs or _jobs(where)
    memory = memory or round(half_of_the_memory(where) / jobs, 2)
    plan = _plan(found, folder, data_dir, where, memory, force)
    echo("\n".join(_opening_lines(found, plan, folder, jobs)))
    if dry_run:
        echo("\n".join(_states(plan, force)))
        if plan.refusal and not force:
            raise PresetError(plan.refusal)
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _alone(folder):
            from ikun_hessian.experiments.study.record import settle

            settle(plan.record, folder, force)
            failures = _work(plan.units, jobs)
            for run_unit, why in failures.items():
                echo(f"! {run_unit} failed: {why}")
            written = _finish(found, plan, folder)
    except BrokenExecutor:
        raise FailedError(
            "a worker process was killed, possibly because memory ran out. Run the same command again to resume, with "
            "fewer --jobs if memory is short."
        ) from None
    except KeyboardInterrupt as error:
        echo("Interrupted. Run the same command again to resume.", err=True)
        raise click.exceptions.Exit(interrupted_by(error)) from None
    echo("\n".join(written))
    if len(failures) == len(plan.units):
        raise FailedError(f"all {len(failures)} runs failed. Run the same command again to retry them.")


def _list() -> list[str]:
    lines = []
    for name in preset.names():
        full, quick = (preset.read_preset(preset.find(name), quick=q) for q in (False, True))
        lines.append(f"{name:<16}{full.title} ({_count(full)} runs, --quick {_count(quick)})")
    return [*lines, f"files: {preset.FOLDER}/NAME.toml. Copy one, edit it, and pass its path."]


def _count(found: Preset) -> int:
    """Return the number of runs. A study of generalization repeats its grid in every environment."""
    return len(run_grid(found)) * max(1, len(found.generalization.get("environments", {})))


def _published(found: Preset, wanted: bool | None) -> Preset:
    there = [a for a in found.analyses if a.tag == PUBLISHED.tag]
    if wanted is None or wanted == bool(there):
        return found
    analyses = tuple(a for a in found.analyses if a not in there)
    return dataclasses.replace(found, analyses=(*analyses, PUBLISHED) if wanted else analyses)


def _plan(found: Preset, folder: Path, data_dir: Path | None, device: str, memory: float, force: bool) -> StudyPlan:
    from ikun_hessian.experiments.study import plan

    return plan.make(found, folder, data_dir=data_dir, device=device, memory=memory, leader=os.getpid(), force=force)


def _jobs(device: str) -> int:
    """Return the number of parallel runs: that of joblib.parallel_config, or all cores, or one for a GPU."""
    import joblib
    from joblib.parallel import get_active_backend

    _, asked = get_active_backend()
    return int(joblib.effective_n_jobs(asked or (-1 if device == "cpu" else 1)))


def _opening_lines(found: Preset, plan: StudyPlan, folder: Path, jobs: int) -> list[str]:
    done = sum(unit.done() for unit in plan.units if unit.name not in plan.others)
    levels = plan.levels(found.by)
    return [
        f"study       {found.title} ({found.source})",
        *([f"question    {found.question}"] if found.question else []),
        f"runs        {len(plan.units)}, {done} done; {jobs} in parallel; in {folder}/runs",
        f"steps       {', '.join(['training', *_steps(found)])}",
        *(f"! data set {name} is skipped: {why}" for name, why in plan.skipped.items()),
        *([f"! all runs have {found.by} {levels.pop()}: there is nothing to compare"] if len(levels) == 1 else []),
    ]


def _steps(found: Preset) -> list[str]:
    """Return what is done with every run after its training."""
    if found.generalization:
        return ["all measures at the matched training loss and at the end"]
    return [str(analysis) for analysis in found.analyses]


def _states(plan: StudyPlan, force: bool) -> list[str]:
    """Return a line per run that says whether it is done, for --dry-run."""
    other = "redo" if force else "other settings: --force"
    states = [other if unit.name in plan.others else _state(unit) for unit in plan.units]
    width = max(12, *(len(state) + 2 for state in states))
    return [f"{state:<{width}}{unit.name}" for state, unit in zip(states, plan.units, strict=True)]


def _state(unit: Unit | NetworkUnit) -> str:
    if unit.failure.exists():
        return "failed"
    return "done" if unit.done() else f"{unit.progress():.0%}"


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a study's folder, after the worker processes of a killed study have ended there."""
    from hessian_tools.io.files import alone, locked
    from ikun_hessian.experiments.study.runner import WORKING

    with contextlib.ExitStack() as held:
        try:
            held.enter_context(alone(folder / "study", TEMPORARIES))
            with locked(folder / WORKING, wait=30):
                pass
        except BlockingIOError:
            raise click.UsageError(
                f"{folder}: another study is running here: wait for it, or choose another --out"
            ) from None
        yield


def _work(units: Sequence[Unit | NetworkUnit], jobs: int) -> dict[str, str]:
    """Run all units that are not done. Return the reasons of those that failed, by name."""
    from joblib import Parallel, delayed
    from joblib.parallel import get_active_backend

    left = [unit for unit in units if not unit.done()]
    failures: dict[str, str] = {}
    if not left:
        return failures
    with _bar(units, left) as say:
        backend = get_active_backend()[0]
        loky = type(backend).__name__ == "LokyBackend"  # its workers are children of this process
        watched = {"initializer": end_with, "initargs": (os.getpid(),)} if loky else {}
        form = "generator_unordered" if backend.supports_return_generator else "list"  # Ray's has only lists
        pool = Parallel(n_jobs=jobs, return_as=form, pre_dispatch="all", **watched)
        for name, why in pool(delayed(_named)(unit) for unit in left):
            if why:
                failures[name] = why
                say(f"{name} failed: {why}")
    return failures


def _named(unit: Unit | NetworkUnit) -> tuple[str, str]:
    from ikun_hessian.experiments.study.runner import run_unit

    return unit.name, run_unit(unit)


@contextlib.contextmanager
def _bar(units: Sequence[Unit | NetworkUnit], left: Sequence[Unit | NetworkUnit]) -> Iterator[Callable[[str], None]]:
    """Show a progress bar over all runs, and yield a function that prints a line above it.

    The progress is read from the files of the runs, so that it does not depend on where they are computed.
    """
    from tqdm import tqdm

    from hessian_tools.io.text import one_line

    done = len(units) - len(left)
    form = "{desc}{percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    start = done + sum(unit.progress() for unit in left)
    with tqdm(total=len(units), initial=start, disable=None, smoothing=0, dynamic_ncols=True, bar_format=form) as bar:
        over = threading.Event()

        def follow() -> None:
            while not over.wait(1.0):
                shares = [unit.progress() for unit in left]
                bar.set_description_str(f"{done + sum(s == 1 for s in shares)} of {len(units)} runs ", refresh=False)
                bar.update(done + sum(shares) - bar.n)

        thread = threading.Thread(target=follow, daemon=True)
        if not bar.disable:
            thread.start()
        try:
            yield lambda line: tqdm.write(one_line(line), file=sys.stderr)
        finally:
            over.set()
            if thread.is_alive():
                thread.join()


def _tables(runs: Sequence[TrainingRun], by: str, found: Preset, folder: Path) -> list[str]:
    """Write tables.md, compare.csv and, if robustness was measured, robustness.csv. Return lines that name them."""
    from hessian_tools.io.files import write_atomically, write_table
    from hessian_tools.io.text import markdown
    from ikun_hessian.experiments.comparison.comparison import compare_settings
    from ikun_hessian.reports.comparison_files import settings_markdown, settings_rows
    from ikun_hessian.reports.robustness import robustness_markdown, robustness_rows

    failed = [
        markdown(f"- {run_unit.name}: {why}")
        for run_unit in runs
        for why in run_unit.failures
        if why.startswith(("NaN", "failed"))
    ]
    text = [f"# {markdown(found.title)}", "", *([markdown(found.question), ""] if found.question else [])]
    text += ["Diverged or failed:", "", *failed, ""] if failed else []
    compared = compare_settings(runs, by, accuracy=found.accuracy)
    text.append(settings_markdown(compared))
    write_table(settings_rows(compared), folder / "compare.csv")
    lines = [f"tables      {folder}/tables.md, compare.csv"]
    if table := robustness_rows(runs, by):
        write_table(table, folder / "robustness.csv")
        text += ["", "## Robustness", "", robustness_markdown(runs, by)]
        lines[0] += ", robustness.csv"
    whole = "\n".join(text).rstrip() + "\n"
    write_atomically(folder / "tables.md", lambda file: file.write(whole.encode()))
    return lines


def _finish(found: Preset, plan: StudyPlan, folder: Path) -> list[str]:
    """Write tables and figures of the finished runs. Return lines that name them."""
    from hessian_tools.io.files import alone
    from ikun_hessian.experiments.figures.figures import draw_all
    from ikun_hessian.experiments.generalization.finish import finish
    from ikun_hessian.experiments.generalization.network import NetworkUnit

    networks = [unit for unit in plan.units if isinstance(unit, NetworkUnit)]
    if networks:
        paths, threshold = [unit.path for unit in networks], networks[0].settings.threshold
        return finish(paths, found.title, threshold, folder, partial(echo, err=True))
    runs = _gathered([unit for unit in plan.units if not isinstance(unit, NetworkUnit)], partial(echo, err=True))
    if not runs:
        return ["! no tables or figures: no run has a usable file"]
    by = parse_condition(found.by)
    lines = _tables(runs, by, found, folder)
    with alone(folder / "figures" / "figures", DRAWN):
        drawn = draw_all(runs, folder / "figures", found.figures, by=by, accuracy=found.accuracy)
    names = dict.fromkeys(path.stem for path in drawn.written)
    lines.append(f"figures     {folder}/figures/{{{','.join(names)}}}.{{png,pdf,csv}}")
    return [*lines, *(f"! skipped figure {name}: {why}" for name, why in drawn.skipped.items())]


def _gathered(units: Sequence[Unit], warn: Callable[[str], None]) -> list[TrainingRun]:
    """Read the runs of these units. Files that cannot be used are skipped, with a warning."""
    from hessian_tools.io.json import ResultError
    from ikun_hessian.experiments.runs import TRAIN, gather

    whole = []
    for unit in units:
        for path in sorted(unit.files(), key=lambda path: (not path.name.endswith(TRAIN), path.name)):
            try:
                gather([path], lambda _: None)
                whole.append(path)
            except ResultError as error:
                warn(f"! {error} (skipped)")
                if path.name.endswith(TRAIN):
                    break  # without its description the run is unknown
    return gather(whole, warn) if whole else []
