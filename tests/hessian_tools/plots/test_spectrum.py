"""Tests of the figure of a spectrum: curves, marks, captions, and legibility for every kind of result."""

from __future__ import annotations

import ast
import dataclasses
import math
import operator
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from figure_tools import SMALLS, TOPS, collisions, eigenvalue, line, on_paper, result, said, spectrum, words
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure

from hessian_tools.plots import captions, curves
from hessian_tools.plots import line_panels as curve_panels
from hessian_tools.plots import spectrum as figures
from hessian_tools.plots import spectrum_panels as panels
from hessian_tools.plots import style as typesetting
from hessian_tools.plots.curves import cumulative, density_curves, is_positive, one_eigenvalue, symlog_axis
from hessian_tools.plots.spectrum import rank_figure, spectrum_figure
from hessian_tools.plots.style import save_figure
from hessian_tools.results import spectrum as results
from hessian_tools.results import trajectory
from hessian_tools.results.operator_spectrum import Density, Eigenvalue, Spectrum
from hessian_tools.results.spectrum import SpectrumResult

pytestmark = pytest.mark.usefixtures("warnings_are_errors")


def mapped(function: Callable[[float], float]) -> SpectrumResult:
    """A result with every eigenvalue and node replaced."""

    def pair(e: Eigenvalue) -> Eigenvalue:
        return dataclasses.replace(e, value=function(e.value), data_stderr=abs(function(e.data_stderr)))

    def one(s: Spectrum) -> Spectrum:
        assert s.density is not None
        nodes = tuple(tuple(function(x) for x in probe) for probe in s.density.nodes)
        return dataclasses.replace(
            s,
            eigenvalues=tuple(pair(e) for e in s.eigenvalues),
            smallest_eigenvalues=tuple(pair(e) for e in s.smallest_eigenvalues),
            density=dataclasses.replace(s.density, nodes=nodes),
        )

    return result({name: one(s) for name, s in result().spectra.items()})


@pytest.fixture(scope="module")
def drawn() -> Figure:
    return spectrum_figure(result())


def test_density_integrates_to_the_weight_of_the_bulk() -> None:
    made = result()
    axis = symlog_axis(made)
    for each in made.spectra.values():
        assert each.density is not None
        x, curves = density_curves(each.density, axis)
        assert curves.shape == (3, len(x))
        assert np.trapezoid(curves, x, axis=1) == pytest.approx(np.full(3, 1 - 5 / 500), rel=1e-3)


def test_the_density_of_a_positive_operator_ends_at_zero() -> None:
    density = Density(((0.0, 1e-4, 0.02, 0.5),), ((0.4, 0.3, 0.2, 0.1),), 1, 60, 0)
    made = result({"ggn": dataclasses.replace(spectrum(), density=density)})
    x, y = density_curves(density, symlog_axis(made), is_positive("ggn", density))
    assert 0 <= x[0] < 1e-4
    assert np.trapezoid(y[0], x) == pytest.approx(1, rel=0.02)
    assert not is_positive("hessian", density)
    assert not is_positive("ggn", dataclasses.replace(density, nodes=((-0.1, 0.0, 0.02, 0.5),)))


def test_density_grid_resolves_sigma() -> None:
    made = result()
    axis = symlog_axis(made)
    density = made.main[1].density
    assert density is not None
    x, _ = density_curves(density, axis)
    assert np.diff(axis.forward(x)).max() <= axis.sigma / 3
    nodes = np.array(density.nodes[0][5:])
    reach = np.arcsinh(nodes / axis.linthresh)
    assert axis.sigma >= 0.9 * np.ptp(reach) / density.steps


def test_density_of_a_dense_quadrature_is_the_true_one() -> None:
    x = np.linspace(1, 2, 400)
    density = Density((tuple(x.tolist()),), (tuple([1 / 400] * 400),), 1, 400, 0)
    made = result({"hessian": dataclasses.replace(spectrum(), density=density)})
    grid, curves = density_curves(density, symlog_axis(made))
    inside = (grid > 1.25) & (grid < 1.75)
    assert inside.any()
    assert curves[0][inside] == pytest.approx(np.ones(inside.sum()), rel=0.05)


def test_deflated_eigenvalues_stay_out_of_the_curve_and_in_the_rug(drawn: Figure) -> None:
    ax = drawn.axes[0]
    x, y = line(ax, "hessian")
    assert y[np.abs(x) > 1.5].max(initial=0.0) < ax.get_ylim()[0]
    (rug,) = [c for c in ax.collections if isinstance(c, LineCollection) and c.get_label() == "rug hessian"]
    assert sorted(segment[0][0] for segment in rug.get_segments()) == sorted((*TOPS, *SMALLS))
    assert ax.get_xscale() == "symlog"
    assert ax.get_yscale() == "log"
    low, high = ax.get_xlim()
    assert low < -2 < 8 < high
    assert "floor" in [each.get_label() for each in ax.lines]


def test_floor_is_the_density_of_one_eigenvalue() -> None:
    weights = (*[1 / 100] * 100,)
    nodes = (*np.linspace(0.01, 1, 99).tolist(), 50.0)  # the last far from all others
    density = Density((nodes,), (weights,), 1, 100, 0)
    axis = symlog_axis(result({"hessian": dataclasses.replace(spectrum(), density=density)}))
    x, curves = density_curves(density, axis)
    near = np.abs(x - 50).argmin()
    floor = one_eigenvalue([density], x, axis)[near] / 100
    assert curves[0][near] == pytest.approx(floor, rel=0.02)


def test_line_is_the_mean_and_band_the_range_over_probes(drawn: Figure) -> None:
    made = result()
    density = made.main[1].density
    assert density is not None
    x, y = density_curves(density, symlog_axis(made))
    drawn_x, drawn_y = line(drawn.axes[0], "hessian")
    bottom = drawn.axes[0].get_ylim()[0]
    assert drawn_x == pytest.approx(x)
    assert drawn_y == pytest.approx(y.mean(0).clip(bottom / 10))
    outlines = [c.get_paths()[0].get_extents() for c in drawn.axes[0].collections if isinstance(c, PolyCollection)]
    assert any(box.y1 == pytest.approx(y.max()) for box in outlines)


def test_cdf_rises_to_one(drawn: Figure) -> None:
    density = result().main[1].density
    assert density is not None
    x, steps = cumulative(density)
    assert steps[:, -1] == pytest.approx(np.ones(3))
    assert (np.diff(steps, axis=1) >= 0).all()
    assert (np.diff(x) > 0).all()
    assert steps[:, 0] == pytest.approx(np.full(3, 1 / 500))  # the most negative eigenvalue, an atom
    assert steps[:, np.searchsorted(x, 1.0) - 1] == pytest.approx(np.full(3, 1 - 3 / 500))
    for name in ("hessian", "ggn"):
        shown_x, shown_y = line(drawn.axes[1], name)
        assert shown_y[[0, -1]] == pytest.approx([0, 1])
        assert tuple(shown_x[[0, -1]]) == drawn.axes[1].get_xlim()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scaling_the_eigenvalues_only_relabels(drawn: Figure, scale: float) -> None:
    scaled = spectrum_figure(mapped(lambda x: scale * x))
    for panel, power, name in [(i, p, n) for i, p in ((0, -1), (1, 0)) for n in ("hessian", "ggn")]:
        (x, y), (u, v) = line(drawn.axes[panel], name), line(scaled.axes[panel], name)
        assert u / scale == pytest.approx(x, rel=1e-6, abs=1e-12)
        assert v / scale**power == pytest.approx(y, rel=1e-6)
    for panel in range(3):
        before, after = (on_paper(f.axes[panel]) for f in (drawn, scaled))
        assert after == pytest.approx(before, abs=1e-6)
    if scale < 1:
        assert collisions(scaled) == []


def markers(ax: Axes, marker: str, face: str | None = None) -> np.ndarray:
    found = [each for each in ax.lines if each.get_marker() == marker]
    found = [each for each in found if face is None or each.get_markerfacecolor() == face]
    return np.concatenate([np.asarray(each.get_xydata()).reshape(-1, 2) for each in found])


def test_ranks_signs_and_convergence_are_drawn() -> None:
    tops = (eigenvalue(8.0), eigenvalue(-4.0, data_stderr=math.nan), eigenvalue(3.0, converged=False))
    made = dataclasses.replace(spectrum(), eigenvalues=tops)
    figure = rank_figure([("a", result({"hessian": made}))])
    (ax,) = figure.axes
    assert sorted(markers(ax, "o").tolist()) == [[1, 8], [3, 3]]
    assert markers(ax, "o", "white").tolist() == [[3, 3]]
    assert sorted(markers(ax, "v").tolist()) == [[2, 4], [5, 1], [6, 2]]  # the most negative has rank P
    drawn_bars = [c.get_segments() for c in ax.collections if isinstance(c, LineCollection)]
    bars = next(each for each in drawn_bars if len(each) == 2)  # 8 and 3, not -4
    assert bars[0].tolist() == [[1, pytest.approx(7.2)], [1, pytest.approx(8.8)]]
    assert [t.get_text() for t in ax.get_xticklabels()][:1] == ["P"]
    assert "not converged" in said(figure)
    assert "λ < 0" in said(figure)


def test_eigenvalues_below_the_floor_lie_on_it() -> None:
    made = dataclasses.replace(spectrum(), smallest_eigenvalues=(eigenvalue(-1e-9), eigenvalue(0.0)))
    figure = rank_figure([("a", result({"hessian": made}))])
    (ax,) = figure.axes
    floor = line(ax, "floor")[1][0]
    assert floor == pytest.approx(8e-4)
    assert markers(ax, "v").tolist() == [[6, floor]]
    assert [5, floor] in markers(ax, "o").tolist()
    assert "floor: smaller |λ| are drawn on it" in said(figure)


def test_layers_of_the_first_operator_are_drawn(drawn: Figure) -> None:
    ax = drawn.axes[3]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["conv1.weight", "conv2.weight", "fc.weight"]
    shown = np.asarray(ax.collections[0].get_array()).reshape(3, 5)
    assert shown == pytest.approx(np.tile([[0.5], [0.3], [0.2]], 5))
    assert ax.collections[0].get_clim() == (0, 1)


def test_many_layers_add_up() -> None:
    shares = {f"layers.{i}.weight": s for i, s in enumerate(np.random.default_rng(0).dirichlet(np.ones(40)).tolist())}
    names, table = panels.share_table([eigenvalue(1.0, layers=shares), eigenvalue(0.5, layers=shares)])
    assert len(names) == panels.ROWS
    assert names[-1] == f"other ({40 - panels.ROWS + 1})"
    assert table.sum(0) == pytest.approx([1, 1])


def test_caption_tells_the_provenance(drawn: Figure) -> None:
    text = said(drawn).replace("\n", " ")
    for part in (
        "ckpt.pt (sha256 01234567)", "csnn", "surrogate atan:2", "hard reset", "digits, train, 1437 samples",
        "float32, seed 7", "P = 500", "loss 0.25", "σ = ",
    ):  # fmt: skip
        assert part in text


def test_the_figure_has_its_print_size_and_nothing_is_cut(drawn: Figure) -> None:
    assert drawn.get_size_inches().tolist() == [7.0, 5.2]
    assert min(float(t.get_fontsize()) for t in words(drawn)) >= 7
    assert collisions(drawn) == []
    letters = [ax.get_title(loc="left").split("$")[1] for ax in drawn.axes[:4]]
    assert letters == [rf"\mathbf{{({letter})}}" for letter in "abcd"]


def without_density() -> SpectrumResult:
    return result({n: dataclasses.replace(s, density=None) for n, s in result().spectra.items()})


def test_without_a_density_there_are_no_empty_panels_and_a_caption_can_be_left_out() -> None:
    figure = spectrum_figure(without_density(), captioned=False)
    assert [ax.get_title(loc="left").split("  ")[-1] for ax in figure.axes[:2]] == [
        "ends of the spectrum",
        "layers of the Hessian eigenvectors",
    ]
    assert figure.get_size_inches().tolist() == [7.0, 2.9]
    assert figure._supxlabel is None  # type: ignore[attr-defined]
    assert "(a) Bars" in said(spectrum_figure(without_density()))
    assert collisions(figure) == []


def test_error_bars_are_not_cut_off_and_panels_that_are_compared_have_one_range() -> None:
    wide = {
        n: dataclasses.replace(s, eigenvalues=(eigenvalue(8.0), eigenvalue(1.0, data_stderr=0.9)))
        for n, s in result().spectra.items()
    }
    left, right = rank_figure([("a", result(wide)), ("b", mapped(lambda x: 3 * x))]).axes
    assert left.get_ylim() == right.get_ylim()
    assert left.get_ylim()[0] < 0.1


def of_three(atoms: int) -> SpectrumResult:
    density = Density(((2.0, 0.5, -0.1),), ((1 / 3,) * 3,), 1, 3, atoms)
    small = (eigenvalue(-0.1),)
    made = dataclasses.replace(spectrum(), eigenvalues=(eigenvalue(2.0),), smallest_eigenvalues=small, density=density)
    return result({"hessian": made}, num_parameters=3)


def bare() -> SpectrumResult:
    """One operator, no smallest eigenvalues, no errors, no layers, no provenance, one probe of one step."""
    tops = (eigenvalue(1.0, data_stderr=math.nan, converged=False, layers={}),)
    density = Density(((0.5,),), ((1.0,),), 1, 1, 0)
    made = dataclasses.replace(spectrum(), eigenvalues=tops, smallest_eigenvalues=(), density=density)
    return result({"hessian": made}, checkpoint={}, data={}, network={}, loss=math.nan)


def strange() -> SpectrumResult:
    """Names that matplotlib could take for mathematics or cannot print, too many layers, no number where one was."""
    shares = {f"layers.block_{i}.a_very_long_name$_${i}.weight": 0.04 for i in range(25)}
    tops = tuple(eigenvalue(v, layers=shares) for v in (3.0, math.nan, 1.0, *np.geomspace(1, 0.1, 60).tolist()))
    made = dataclasses.replace(spectrum(), eigenvalues=tops)
    path = "/x/" + "W" * 100 + "モデル\n$x_{.pt"
    spectra = {"_odd$": made, "ggn": spectrum(0.5), "fisher": spectrum(1.5), "relaxed": spectrum(2.0)}
    return result(spectra, checkpoint={"path": path, "sha256": None}, network={"model": "$\\frac{"})


CASES: dict[str, tuple[Callable[[], SpectrumResult], str]] = {
    "no density": (without_density, "ends of the spectrum"),
    "all zero": (lambda: mapped(lambda x: 0.0), "all eigenvalues are 0"),
    "negative": (lambda: mapped(lambda x: -abs(x) - 0.01), "λ < 0"),
    "far from zero": (lambda: mapped(lambda x: 100 + x), "P = 500"),
    "three, all deflated": (lambda: of_three(3), "no bulk:\nevery eigenvalue\nis deflated"),
    "three": (lambda: of_three(1), "P = 3"),
    "bare": (bare, "no layer shares"),
    "strange": (strange, "other (18)"),
    "no eigenvalue": (
        lambda: result({"hessian": dataclasses.replace(spectrum(), eigenvalues=(), smallest_eigenvalues=())}),
        "no eigenvalue found",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_results_with_missing_pieces_are_drawn(case: str) -> None:
    make, message = CASES[case]
    figure = spectrum_figure(make())
    assert message in said(figure)
    if case == "strange":
        assert collisions(figure) == []


def test_without_a_density_there_are_no_empty_panels() -> None:
    figure = spectrum_figure(without_density())
    titles = [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")]
    assert len(titles) == 2
    assert "(a)" in titles[0]
    assert "ends of the spectrum" in titles[0]
    assert "(b)" in titles[1]
    assert "no density" not in said(figure)
    assert collisions(figure) == []


def test_one_line_a_result_in_the_rank_figure() -> None:
    labels = [
        "kaiming_uniform",
        "ikun_v1",
        "_private $x$",
        "a name far too long to be printed whole",
        "e",
        "f",
        "g",
        "h",
    ]
    figure = rank_figure([(label, mapped(partial(operator.mul, k + 1))) for k, label in enumerate(labels)])
    left, right = figure.axes
    looks = {(str(each.get_color()), str(each.get_linestyle())) for each in left.lines if each.get_marker() == "None"}
    assert len(looks - {("0.75", "-")}) == 8
    assert "Hessian" in left.get_title(loc="left")
    assert "GGN" in right.get_title(loc="left")
    entries = [t.get_text().replace(r"\$", "$").strip() for t in figure.legends[0].get_texts()]
    assert entries[:3] == labels[:3]
    assert len(entries[3]) == 26
    assert collisions(figure) == []
    assert len(markers(left, "v")) == 8 * len(SMALLS)


def test_rank_figure_draws_the_operators_that_all_results_have() -> None:
    alone = dataclasses.replace(spectrum(), smallest_eigenvalues=(), eigenvalues=(eigenvalue(7.0, converged=False),))
    pyhessian = result({"hessian": alone}, settings={"method": "power", "backend": "pyhessian"})
    for pair in ([("own", result()), ("theirs", pyhessian)], [("theirs", pyhessian), ("own", result())]):
        figure = rank_figure(pair)
        (ax,) = figure.axes
        assert ax.get_title(loc="left").endswith("Hessian")
        assert len(markers(ax, "o")) == len(TOPS) + 1
        ((x, y),) = markers(ax, "o", "white")
        assert (round(x), y) == (1, 7.0)
        assert len(markers(ax, "v")) == len(SMALLS)
        assert "not converged" in said(figure)
        assert "GGN" not in said(figure)
        assert collisions(figure) == []


def test_the_rank_figure_draws_many_operators() -> None:
    spectra = {name: spectrum(i + 1.0) for i, name in enumerate(("hessian", "ggn", "fisher"))}
    figure = rank_figure([(label, result(spectra)) for label in "ab"])
    shown = [ax.get_title(loc="left").split("  ")[-1] for ax in figure.axes]
    assert shown == ["Hessian", "GGN", "Fisher"]
    assert collisions(figure) == []


def test_rank_figure_refuses_nothing_in_common() -> None:
    with pytest.raises(ValueError, match="no operator in common"):
        rank_figure([("a", result({"fisher": spectrum()})), ("b", result())])
    with pytest.raises(ValueError, match="no result"):
        rank_figure([])


def test_save_writes_both_files_and_the_same_bytes_again(tmp_path: Path) -> None:
    first = save_figure(spectrum_figure(of_three(3)), tmp_path / "new" / "a.spectrum")
    assert [p.name for p in first] == ["a.spectrum.png", "a.spectrum.pdf"]
    png, pdf = (p.read_bytes() for p in first)
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == 2100  # 7 in at 300 dpi
    assert int.from_bytes(png[20:24], "big") == 1560
    assert pdf.startswith(b"%PDF")
    assert b"CreationDate" not in pdf
    assert b"/Subtype /Type0" in pdf  # TrueType, not Type 3
    assert b"/Type3" not in pdf
    with matplotlib.rc_context({"font.size": 20, "savefig.bbox": "tight", "pdf.fonttype": 3, "axes.grid": True}):
        again = save_figure(spectrum_figure(of_three(3)), tmp_path / "b")
    assert [p.read_bytes() for p in again] == [png, pdf]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.pdf", "b.png", "new"]


def test_neither_torch_nor_global_state() -> None:
    for module in (captions, curve_panels, curves, figures, panels, results, trajectory, typesetting):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name for name in names if name.split(".")[0] in ("torch", "ikun") or "pyplot" in name}
    before, shown = dict(matplotlib.rcParams), pyplot.get_fignums()
    rank_figure([("a", without_density())])
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == shown


def test_layers_figure_has_a_panel_a_layer_on_one_axis() -> None:
    base = result()
    blocks = {name: spectrum(scale, seed=i) for i, (name, scale) in enumerate((("conv1", 1.0), ("fc1", 3.0)))}
    figure = figures.layers_figure(dataclasses.replace(base, blocks=blocks))
    drawn = [ax for ax in figure.axes if ax.axison]
    assert [ax.get_title() for ax in drawn] == ["conv1", "fc1"]
    assert drawn[0].get_xlim() == drawn[1].get_xlim()
    with pytest.raises(ValueError, match="no diagonal blocks"):
        figures.layers_figure(base)


def test_errors_of_which_only_a_lower_limit_is_known_are_dotted() -> None:
    known, limited = eigenvalue(8.0), eigenvalue(4.0, data_stderr=math.nan, data_stderr_least=0.5)
    made = dataclasses.replace(spectrum(), eigenvalues=(known, limited), smallest_eigenvalues=())
    (ax,) = rank_figure([("a", result({"hessian": made}))]).axes
    solid, dotted = (c for c in ax.collections if isinstance(c, LineCollection) and c.get_segments())
    assert [len(c.get_segments()) for c in (solid, dotted)] == [1, 1]
    assert dotted.get_segments()[0][:, 1].tolist() == [3.5, 4.5]
    assert solid.get_linestyle() != dotted.get_linestyle()
    assert "dotted: a lower limit" in said(spectrum_figure(result({"hessian": made})))
