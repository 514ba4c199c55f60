"""Tests of the page: its numbers, order, escaping, and files that cannot be drawn."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
from landscape_tools import made, not_finite, without_relaxed
from run_tools import make_run, make_study, write_run, write_study
from spectra import full, sample

from hessian_tools.analysis.ranking import told_apart
from hessian_tools.io import json as results
from hessian_tools.io.json import ResultError
from hessian_tools.results.spectrum import LossRise, SpectrumResult
from hessian_tools.results.training_path import TRAINING_PATH_SCHEMA, Snapshot, TrainingPath
from ikun_hessian.experiments.runs import TrainingRun
from ikun_hessian.reports.html.page import drawable, report_page
from ikun_hessian.reports.html.sources import Sources, collect

pytestmark = pytest.mark.usefixtures("warnings_are_errors")
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def of(*runs: TrainingRun, **more: object) -> Sources:
    return Sources(runs, more.get("landscapes", {}), more.get("paths", {}), more.get("left_out", ()))  # type: ignore[arg-type]


def run_of(name: str, **parts: object) -> TrainingRun:
    return TrainingRun(name, {"init": name, "seed": 1}, {}, {}, **parts)  # type: ignore[arg-type]


def test_the_summary_comes_first_and_holds_the_main_numbers() -> None:
    one = run_of("one", spectra={"": sample("one")})
    two = run_of("two", spectra={"": sample("two", 2.0)})
    page = report_page(of(one, two, landscapes={"one": made(), "two": made(2.0)}))
    parts = re.findall(r'<section id="(\w+)">', page)
    assert parts == ["summary", "spectra", "landscapes", "training"]
    summary = page[page.index('id="summary"') : page.index('id="spectra"')]
    for text in ("3 ± 0.03", "6 ± 0.06", "12 ± 0.5", "24 ± 1", "90.0%"):
        assert text in summary
    assert "GGN λ max: one &lt; two. All neighbours differ by more than two standard errors" in summary
    assert "several seeds" in summary


def test_the_loss_itself_is_in_the_summary_without_a_flatness_result() -> None:
    rise = LossRise(0.0123, 0.001, 0.002, 0.1, 8)
    page = report_page(of(run_of("a", spectra={"": dataclasses.replace(sample(), loss_rise=rise)})))
    assert page.count("0.0123 ± 0.002") == 2
    assert "if each weight is disturbed by 10% of its magnitude." in page
    assert "mean of 8 draws, which adds a standard error of 0.001" in page


def test_networks_within_their_errors_are_not_ranked() -> None:
    runs = (run_of(f"r{k}", spectra={"": sample(f"r{k}", 1 + 0.01 * k)}) for k in range(2))
    assert "r0 ≈ r1. These two networks cannot be told apart" in report_page(of(*runs))


def test_the_page_tells_apart_what_the_screen_does() -> None:
    """Twice as large: the probes' errors of the traces count too, and eigenvalues that did not converge are unknown."""

    def changed(name: str, scale: float) -> SpectrumResult:
        result = sample(name, scale)
        s = result.spectra["ggn"]
        tops = tuple(dataclasses.replace(e, converged=False) for e in s.eigenvalues)
        ggn = dataclasses.replace(s, eigenvalues=tops, trace=dataclasses.replace(s.trace, stderr=5 * scale))
        return dataclasses.replace(result, spectra={"ggn": ggn})

    results = [(name, changed(name, scale)) for name, scale in (("one", 1.0), ("two", 2.0))]
    found = told_apart(results)
    assert (found.told, found.close, found.unknown) == ((), ("GGN trace",), ("GGN lambda_max",))
    page = report_page(of(*(run_of(name, spectra={"": r}) for name, r in results)))
    assert "GGN λ max: one ≈ two." in page
    assert "GGN trace: one ≈ two." in page


def test_networks_measured_in_different_ways_are_not_ranked() -> None:
    other = sample("b", data={**sample().data, "samples": 7})
    page = report_page(of(run_of("a", spectra={"": sample("a")}), run_of("b", spectra={"": other})))
    assert "Do not compare the numbers of these networks: number of samples differs" in page
    assert "λ max: a" not in page


def test_every_number_has_its_meaning_and_error() -> None:
    page = report_page(of(run_of("a", spectra={"": full()})))
    for text in (
        "sum of all 10 eigenvalues",
        "[3.2, 3.8] at z = 0.05",
        "directions that the data determine",
        "1e−08 (numerical)",
    ):
        assert text in page
    assert (
        'data-tip="a, Hessian, rank 1\n3 ± 0.03\nnumerical error at most 1e−08\n75% of the eigenvector in fc1.weight"'
        in page
    )


def test_strings_of_strangers_stay_texts() -> None:
    spectrum = dataclasses.replace(
        sample(), warnings=(EVIL,), checkpoint={"path": EVIL}, network={"model": EVIL, EVIL: EVIL}
    )
    landscape = dataclasses.replace(made(), refused={EVIL: EVIL}, data={"name": EVIL})
    page = report_page(
        of(run_of(EVIL, spectra={EVIL: spectrum}), landscapes={EVIL: landscape}, left_out=(EVIL,)), title=EVIL
    )
    assert "<img" not in page
    assert "alert(1)</script>" not in page
    assert page.count("<script") == 2  # the losses of the surfaces, and the page's own
    assert page.count("</script>") == 2


def test_only_the_pages_own_script_may_run_and_nothing_is_fetched() -> None:
    page = report_page(of(run_of("a", spectra={"": full()}), landscapes={"a": made()}))
    assert "default-src &#x27;none&#x27;" in page
    assert not re.findall(r'\b(?:src|href|action)="(?!#)', page)
    assert "http" not in page.replace("http-equiv", "")
    assert "@import" not in page
    assert "url(" not in page


def test_the_page_is_the_same_for_the_same_results(tmp_path: Path) -> None:
    write_study(tmp_path, make_study(seeds=(1, 2), moments=("",)))
    assert report_page(collect([tmp_path])) == report_page(collect([tmp_path]))


def test_several_seeds_are_compared(tmp_path: Path) -> None:
    write_study(tmp_path, make_study(seeds=(1, 2, 3), moments=("",)))
    page = report_page(collect([tmp_path]))
    part = page[page.index('id="comparison"') : page.index('id="spectra"')]
    assert "xavier" in part
    assert "reference" in part
    assert "Hodges-Lehmann" in part
    assert "The figures show the first 8 of" in page


def test_damaged_and_stale_results_are_named_and_not_shown(tmp_path: Path) -> None:
    for name in ("good", "stale"):
        run = make_run(name, 1, moments=("",))
        spectrum = dataclasses.replace(run.spectra[""], checkpoint={"path": f"{run.name}.pt", "sha256": "0" * 64})
        write_run(dataclasses.replace(run, spectra={"": spectrum}), tmp_path)
        (tmp_path / f"{run.name}.pt").unlink()
        if name == "stale":
            (tmp_path / f"{run.name}.pt").write_text("trained again")
    landscape = dataclasses.replace(made(), checkpoint={"path": "x.pt", "sha256": "0" * 64})
    results.save_result(landscape, tmp_path / "x.landscape.json")
    (tmp_path / "x.pt").write_text("trained again")
    (tmp_path / "b.landscape.json").write_text("{")
    found = collect([tmp_path])
    assert found.landscapes == {}
    assert [key for run in found.runs for key in run.spectra] == [""]
    assert len(found.left_out) == 3
    assert sum("not of the weights" in line for line in found.left_out) == 2
    page = report_page(found)
    assert "Not shown" in page
    for file in (tmp_path / "b.landscape.json", tmp_path / "x.landscape.json"):
        with pytest.raises(ResultError, match=re.escape(str(file))):
            collect([file])


@pytest.mark.parametrize("landscape", [not_finite(), without_relaxed()], ids=["not finite", "without relaxed"])
def test_odd_landscapes_are_drawn(landscape: object) -> None:
    page = report_page(of(landscapes={"a": landscape}))
    assert 'id="surfaces"' in page
    assert "NaN" not in page[page.index('type="application/json"') : page.index("</script>")]


@pytest.mark.parametrize("kind", ["spectrum", "flatness", "landscape", "record", "log"])
def test_changed_files_are_refused_left_out_or_drawn(kind: str, tmp_path: Path) -> None:
    drawn = 0
    (tmp_path / "a.train.json").write_bytes(fuzz.trained()["record"])
    for number in range(25):
        (tmp_path / fuzz.KINDS[kind].name).write_bytes(fuzz.mutated(kind, 1, number))
        try:
            found = drawable(collect([tmp_path]))
        except ResultError as error:
            fuzz.one_line(str(error))
            continue
        for line in found.left_out:
            fuzz.one_line(line)
        report_page(found).encode()
        drawn += 1
    assert drawn


def test_paths_of_training_are_drawn_unless_a_snapshot_has_changed(tmp_path: Path) -> None:
    snapshots = tuple(
        Snapshot(f"{EVIL}e{k}.pt", "0" * 64, k, (2.0 - k, 0.1 * k), 0.1, 0.5, 0.9, 0.6 + k) for k in range(3)
    )
    grid = (-1.0, 0.5, 2.0)
    path = TrainingPath(
        TRAINING_PATH_SCHEMA, {"path": "e2.pt"}, {}, {}, {}, {}, 10, {}, 10.0, 0.1, 0.9, "float32", "cpu", 0,
        ("pc1", "pc2"), (0.7, 0.2), 0.0, grid, grid, ((0.1, 0.2, math.nan),) * 3, (), snapshots, {}, 9, 1.0, {},
    )  # fmt: skip
    page = report_page(of(paths={"one": path}))
    assert "PC 1 (70.0%)" in page
    assert page.count('class="s8"') == 3
    assert page.count("<rect ") == 6
    assert "loss 0.5, in the plane 0.6" in page
    assert "<img" not in page
    plain = dataclasses.replace(path, snapshots=tuple(dataclasses.replace(s, name=f"e{s.epoch}.pt") for s in snapshots))
    results.save_result(plain, tmp_path / "e2.trajectory.json")
    assert list(collect([tmp_path]).paths) == ["e2"]
    (tmp_path / "e1.pt").write_text("trained again")
    with pytest.raises(ResultError, match="not of the weights"):
        collect([tmp_path / "e2.trajectory.json"])


def test_what_does_not_fit_together_is_left_out() -> None:
    short = dataclasses.replace(made().lines[0], loss=(0.1,))
    odd = dataclasses.replace(made(), lines=(short,))
    found = drawable(of(landscapes={"odd": odd, "good": made()}))
    assert list(found.landscapes) == ["good"]
    assert found.left_out[0].startswith("odd: its landscape does not fit together")
    with pytest.raises(ResultError, match="odd: its landscape"):
        drawable(of(landscapes={"odd": odd}))


def test_a_page_needs_no_torch(tmp_path: Path) -> None:
    results.save_result(made(), tmp_path / "a.landscape.json")
    write_run(make_run("ikun", 1, moments=("",)), tmp_path)
    code = f"""
import sys
class NoTorch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        assert name != "torch", "torch is imported"
sys.meta_path.insert(0, NoTorch)
from ikun_hessian.cli.main import run
assert run(["report", {str(tmp_path)!r}, "-o", {str(tmp_path / "r.html")!r}]) == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "r.html").read_text().startswith("<!DOCTYPE html>")
