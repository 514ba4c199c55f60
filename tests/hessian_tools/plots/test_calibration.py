"""Tests of the figures of calibrations: marks, captions and legibility for every kind of result."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from figure_tools import collisions, line, on_paper, said, words
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from hessian_tools.analysis.agreement import agreement
from hessian_tools.io.json import ResultError, clean, from_plain
from hessian_tools.plots import calibration as one
from hessian_tools.plots.calibration import calibration_figure
from hessian_tools.results.calibration import CALIBRATION_SCHEMA, Agreement, Calibration, CalibrationResult, Scale
from ikun_hessian.experiments.figures import calibration as study
from ikun_hessian.experiments.figures.calibration import families_of, study_figure, study_tables

pytestmark = pytest.mark.usefixtures("warnings_are_errors")

KINDS = (
    *["hessian, top"] * 4, *["hessian, most negative"] * 4, *["ggn, top"] * 4, *["smoothed, top"] * 4, "gradient",
    *["random"] * 4, *["random, one layer"] * 4, *["mixture"] * 4,
)  # fmt: skip
SCALES = (0.05, 0.1, 0.2, 0.4)


def made(unit: float = 1.0, seed: int = 0, *, scales: Any = SCALES, variants: bool = False, **changes: Any) -> Any:
    """Curvatures over three decades; a GGN twice too small, a smoothed operator nearly right, a Hessian with negative
    values, a Fisher a hundred times too small."""
    rng = np.random.default_rng(seed)
    base = unit * np.geomspace(1e-3, 1, len(KINDS))[::-1]

    def noisy(factor: float, spread: float) -> np.ndarray:
        return factor * base * np.exp(spread * rng.standard_normal(len(base)))

    forms = {"hessian": noisy(0.3, 0.5), "ggn": noisy(0.5, 0.3), "fisher": noisy(0.01, 0.6)}
    forms["hessian"][np.array(KINDS) == "hessian, most negative"] *= -1
    forms["|hessian|"] = np.abs(noisy(0.4, 0.4))
    if variants:
        forms |= {f"{name}, ties reversed": forms[name] * 1.1 for name in ("hessian", "ggn")}
    fitted = noisy(1.05, 0.2)
    found = []
    for s in scales:
        own, c = noisy(0.95, 0.1), noisy(1.0, 0.05)
        compared = {**forms, "smoothed": own, "ggn, fitted": fitted}
        found.append(
            Scale(
                scale=s,
                loss=unit * (0.01 + 0.05 * s),
                movement=0.1,
                curvature=tuple(c.tolist()),
                stderr=tuple((0.05 * c).tolist()),
                step=(0.1,) * len(c),
                trace=unit * 0.1 / s,
                trace_stderr=unit * 0.01 / s,
                predictions={"smoothed": tuple(own.tolist())},
                traces={"smoothed": unit * 0.09 / s},
                agreement={name: agreement(values, c, seed, resamples=20) for name, values in compared.items()},
                fitted="gaussian:0.3",
            )
        )
    forms["ggn, gaussian:0.3"] = fitted
    calibration = Calibration(
        KINDS,
        {name: tuple(values.tolist()) for name, values in forms.items()},
        {"hessian": -0.2 * unit, "ggn": 0.4 * unit, "fisher": 0.001 * unit},
        tuple(found),
    )
    result = CalibrationResult(
        schema=CALIBRATION_SCHEMA,
        checkpoint={"path": "/somewhere/ckpt.pt", "sha256": "0123456789abcdef"},
        data={"name": "digits", "split": "train", "samples": 1024, "loss": "mse"},
        network={"model": "mlp", "surrogate": "atan:2", "reset": "hard", "neuron": "if", "hidden": [8, 8]},
        training={},
        settings={"draws": 32},
        num_parameters=500,
        weight_norms={"fc.weight": 1.0},
        loss=0.25,
        accuracy=0.9,
        dtype="float32",
        device="cpu",
        seed=7,
        seconds=1.0,
        versions={},
        calibration=calibration,
    )
    return dataclasses.replace(result, **changes)


def at_scales(result: CalibrationResult, change: Callable[[Scale], Scale]) -> CalibrationResult:
    scales = tuple(change(s) for s in result.calibration.scales)
    return dataclasses.replace(result, calibration=dataclasses.replace(result.calibration, scales=scales))


@pytest.fixture(scope="module")
def drawn() -> Figure:
    return calibration_figure(made())


def bars(ax: Axes) -> list[list[float]]:
    found = [c for c in ax.collections if isinstance(c, LineCollection)]
    return [[float(seg[0][0]), *sorted(float(y) for _, y in seg)] for each in found for seg in each.get_segments()]


def test_directions_stand_at_prediction_and_truth(drawn: Figure) -> None:
    result = made()
    scale = result.calibration.scales[2]
    c, errors, kinds = np.array(scale.curvature), np.array(scale.stderr), np.array(KINDS)
    for ax, name in zip(drawn.axes, ("hessian", "ggn", "smoothed"), strict=False):
        predicted = np.array({**result.calibration.predictions, **scale.predictions}[name])
        for label, members in (
            ("hessian, most negative", kinds == "hessian, most negative"),
            ("eigenvector", (kinds == "ggn, top") | (kinds == "smoothed, top")),
            ("random", (kinds == "random") | (kinds == "random, one layer")),
        ):
            x, y = line(ax, label)
            assert x.tolist() == predicted[members].tolist()
            assert y.tolist() == c[members].tolist()
        expected = np.stack([predicted, c - errors, c + errors], 1)
        assert np.array(bars(ax)) == pytest.approx(expected)
        low, high = ax.get_xlim()
        assert low < predicted.min()
        assert predicted.max() < high
        x, y = line(ax, "identity")
        assert x.tolist() == y.tolist()
        assert f"rank corr. {scale.agreement[name].correlation:.3f}" in ax.texts[0].get_text()
        assert f"ratio {scale.agreement[name].ratio:.2f}" in ax.texts[0].get_text()
    assert drawn.axes[0].get_xlim()[0] < 0


def test_a_decade_is_as_long_in_one_panel_as_in_another(drawn: Figure) -> None:
    lengths = []
    for ax in drawn.axes[:3]:
        left, right = ax.transData.transform([(0.01, 0.1), (0.1, 0.1)])
        lengths.append(right[0] - left[0])
        assert ax.get_ylim() == drawn.axes[0].get_ylim()
    assert lengths == pytest.approx([lengths[0]] * 3, rel=0.02)


def test_agreement_and_trace_against_the_noise_scale(drawn: Figure) -> None:
    scales = made().calibration.scales
    correlations, ratios, traces = drawn.axes[3:]
    for name in ("hessian", "|hessian|", "fisher", "ggn", "ggn, fitted", "smoothed"):
        x, y = line(correlations, name)
        assert y.tolist() == [one.clipped(s.agreement[name].correlation) for s in scales]
        assert np.log(x / np.array(SCALES)) == pytest.approx(np.zeros(4), abs=0.18)
        ends = [[one.clipped(end) for end in s.agreement[name].ci95] for s in scales]
        assert all([u, *pair] in bars(correlations) for u, pair in zip(x, ends, strict=True))
        if name == "fisher":
            assert name not in [each.get_label() for each in (*ratios.lines, *traces.lines)]
            continue
        x, y = line(ratios, name)
        assert y.tolist() == [s.agreement[name].ratio for s in scales]
        assert all([u, *s.agreement[name].quartiles] in bars(ratios) for u, s in zip(x, scales, strict=True))
    x, y = line(traces, "true")
    assert (x.tolist(), y.tolist()) == (list(SCALES), [s.trace for s in scales])
    assert np.array(bars(traces))[-4:] == pytest.approx(np.array([[s, 0.09 / s, 0.11 / s] for s in SCALES]))
    assert line(traces, "smoothed")[1].tolist() == [s.traces["smoothed"] for s in scales]
    assert set(line(traces, "hessian")[1]) == {-0.2}
    (band,) = [p for p in ratios.patches if p.get_label() == "band"]
    assert band.get_extents().transformed(ratios.transData.inverted()).intervaly == pytest.approx([0.7, 1.4])


def test_caption_says_what_is_not_seen(drawn: Figure) -> None:
    text = said(drawn).replace("\n", " ")
    ratios = [s.agreement["fisher"].ratio for s in made().calibration.scales]
    for part in (
        f"{len(KINDS)} unit directions", "s = 0.2", "32 draws", "along 4 of the 4 most negative", "and down along 0.",
        f"left out of {len(KINDS)}: Hessian 4;", f"Fisher, not drawn in (e, f): {min(ratios):.3g} to",
        "ckpt.pt (sha256 01234567)", "digits, train, 1024 samples", "seed 7", "P = 500", "GGN, width fitted",
        "Mean loss at these s: 0.013, 0.015, 0.02, 0.03",
    ):  # fmt: skip
        assert part in text
    assert collisions(drawn) == []
    letters = [ax.get_title(loc="left").split("$")[1] for ax in drawn.axes]
    assert letters == [rf"\mathbf{{({letter})}}" for letter in "abcdef"]


@pytest.mark.parametrize(("z", "counted"), [(3.0, (4, 4, 0)), (1.0, (4, 0, 0)), (-3.0, (4, 0, 4))])
def test_turns_count_two_standard_errors(z: float, counted: tuple[int, int, int]) -> None:
    result = at_scales(
        made(), lambda s: dataclasses.replace(s, curvature=(0.01 * z,) * len(KINDS), stderr=(0.01,) * 29)
    )
    assert one.turns(result, one.middle(result)) == counted
    positive = dataclasses.replace(result.calibration, predictions={"hessian": (1.0,) * len(KINDS)})
    assert one.turns(dataclasses.replace(result, calibration=positive), one.middle(result)) == (0, 0, 0)


@pytest.mark.parametrize("unit", [1e-12])
def test_scaling_the_loss_only_relabels(drawn: Figure, unit: float) -> None:
    scaled = calibration_figure(made(unit))
    for a, b in zip(drawn.axes[:3], scaled.axes[:3], strict=True):
        assert on_paper(b) == pytest.approx(on_paper(a), abs=0.02)  # the labels differ in width, and so the panels
    for a, b in zip(drawn.axes, scaled.axes, strict=True):
        assert len(b.lines) == len(a.lines)
    assert collisions(scaled) == []


def without_smoothed() -> CalibrationResult:
    def change(s: Scale) -> Scale:
        kept = {name: a for name, a in s.agreement.items() if name != "smoothed"}
        return dataclasses.replace(s, agreement=kept, predictions={}, traces={})

    return at_scales(made(), change)


def curving_down() -> CalibrationResult:
    def change(s: Scale) -> Scale:
        c = np.array(s.curvature)
        c[::3] *= -1
        return dataclasses.replace(s, curvature=tuple(c.tolist()))

    return at_scales(made(), change)


def flat() -> CalibrationResult:
    nan = math.nan
    nothing = Agreement(nan, (nan, nan), nan, (nan, nan), 0.0, nan)
    zero = (0.0,) * len(KINDS)

    def change(s: Scale) -> Scale:
        return dataclasses.replace(
            s, curvature=zero, stderr=zero, trace=0.0, trace_stderr=nan, agreement=dict.fromkeys(s.agreement, nothing)
        )

    return at_scales(made(), change)


def perfect() -> CalibrationResult:
    right = Agreement(1.0, (1.0, 1.0), 1.0, (1.0, 1.0), 1.0, 1.0)
    wrong = Agreement(-1.0, (-1.0, -1.0), 1e-3, (1e-4, 1e3), 0.0, 1.0)
    return at_scales(
        made(), lambda s: dataclasses.replace(s, agreement={**dict.fromkeys(s.agreement, right), "hessian": wrong})
    )


CASES: dict[str, tuple[Callable[[], CalibrationResult], str]] = {
    "ties reversed": (lambda: made(variants=True), "Hessian, ties reversed"),
    "no smoothed operator": (without_smoothed, "(a–b) 29 unit directions"),
    "curving down": (curving_down, "left out of 29: Hessian 13, |Hessian| 10, Fisher 10"),
    "flat": (flat, "Hessian, not drawn in (e, f): not positive"),
    "perfect": (perfect, "rank corr. 1.000"),
    "one scale": (lambda: made(scales=(0.1,)), "s = 0.1 times each"),
    "many scales": (lambda: made(scales=tuple(0.01 * 1.3**k for k in range(12))), "trace of DAD"),
    "no provenance": (
        lambda: made(checkpoint={}, network={}, data={}, settings={}),
        "noise does (bars: standard error)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_calibration_can_be_read(case: str) -> None:
    make, message = CASES[case]
    figure = calibration_figure(make())
    assert message in said(figure).replace("\n", " ")
    assert collisions(figure) == []
    assert min(float(t.get_fontsize()) for t in words(figure)) >= 7
    assert figure.get_size_inches()[0] == 7


def test_neither_torch_nor_global_state() -> None:
    for module in (one, study):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        body = [node for node in tree.body if not isinstance(node, ast.If)]  # but for types
        names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in body if isinstance(node, ast.ImportFrom)}
        assert not {name for name in names if name.split(".")[0] in ("torch", "ikun") or "pyplot" in name}
        assert "hessian_tools.analysis.calibration" not in names


# the study


def networks(count: int = 6) -> dict[str, CalibrationResult]:
    """Two surrogates and two data sets in turn; the last one with other neurons."""
    found: dict[str, CalibrationResult] = {}
    for i in range(count):
        network = {**made().network, "trained_surrogate": ("atan:5", "atan:2", "triangle:0.4")[i % 3]}
        data = {**made().data, "name": ("digits", "fashion-mnist")[i >= 4]}
        found[f"network {i}"] = made(seed=i, network=network, data=data)
    last = dataclasses.replace(found["network 0"], network={**found["network 0"].network, "neuron": "lif"})
    return {**found, "other": last}


@pytest.fixture(scope="module")
def whole() -> Figure:
    return study_figure(networks())


def dots(ax: Axes, colour: Any) -> np.ndarray:
    """[n, 2]: every dot of this colour."""
    found = [each for each in ax.lines if each.get_color() == colour and each.get_linestyle() == "None"]
    return np.concatenate([np.asarray(each.get_xydata()) for each in found])


def test_a_dot_a_network_and_the_median(whole: Figure) -> None:
    results = networks()
    a, b, c, d = whole.axes[:4]
    for ax, value in ((a, study.correlation), (b, study.ratio)):
        for g, name in enumerate(("hessian", "|hessian|", "fisher", "ggn", "ggn, fitted", "smoothed")):
            for k, s in enumerate(SCALES):
                expected = [value(r, s, name) for r in results.values()]
                if name == "fisher" and ax is b:
                    continue
                x, y = dots(ax, one.look_of(name)[0]).T
                at = g + (k - 1.5) * 0.21
                assert sorted(y[np.abs(x - at) < 0.105]) == pytest.approx(sorted(expected))
                medians = [each.get_xydata() for each in ax.lines if each.get_label() == "median"]
                assert any(m[:, 0].mean() == pytest.approx(at) and m[0, 1] == np.median(expected) for m in medians)
    found = [study.ratio(r, s, "fisher") for r in results.values() for s in SCALES]
    assert [t.get_text() for t in b.texts] == [f"{len(found)} ↑{study.short(max(found))}"]
    assert not len(dots(b, one.look_of("fisher")[0]))
    assert [t.get_text() for t in c.get_xticklabels()] == ["atan\n2", "atan\n5", "triangle\n0.4"]
    x, y = dots(d, one.look_of("ggn")[0]).T
    steep = [r for r in results.values() if study.surrogate_of(r) == "atan:5"]
    assert sorted(y[np.round(x) == 1]) == pytest.approx(sorted(study.ratio(r, 0.2, "ggn") for r in steep))


def test_pooled_directions_are_all_there(whole: Figure) -> None:
    results = networks()
    middles = [r.calibration.scales[2] for r in results.values()]
    c = np.concatenate([s.curvature for s in middles])
    kinds = np.tile(KINDS, len(results))
    for ax, name in zip(whole.axes[4:], ("hessian", "ggn", "smoothed"), strict=True):
        shown = np.concatenate([dots(ax, one.look_of(name)[0]), dots(ax, one.TRUE)])
        assert sorted(shown[:, 1]) == pytest.approx(sorted(c))
        negative = dots(ax, one.TRUE)
        assert sorted(negative[:, 1]) == pytest.approx(sorted(c[kinds == "hessian, most negative"]))
        assert (negative[:, 0] < 0).all() == (name == "hessian")
        x = np.concatenate([one.predictions(r, s, name) for r, s in zip(results.values(), middles, strict=True)])
        inside = np.mean([0.7 < truth / p < 1.4 for truth, p in zip(c, x, strict=True)])
        assert f"in band {100 * inside:.0f}%" in ax.texts[0].get_text()
    assert "v′Av ≤ 0: 14%" in whole.axes[4].texts[0].get_text()
    text = said(whole).replace("\n", " ")
    for part in (
        "7 networks (4 digits MLP, 2 Fashion-MNIST MLP, 1 digits MLP variants)", "All 203 directions", "s = 0.2",
        "along 28 of the 28 most negative Hessian eigenvectors", "digits MLP variants",
    ):  # fmt: skip
        assert part in text


def test_results_are_grouped_into_families() -> None:
    results = networks()
    assert list(families_of(results).values()) == [
        *["digits MLP"] * 4, *["Fashion-MNIST MLP"] * 2, "digits MLP variants",
    ]  # fmt: skip
    for changed in ({"timesteps": 16}, {"hidden": [8, 8, 8]}, {"detach_reset": True}):
        other = made(network={**made().network, **changed})
        assert families_of({**results, "another": other})["another"] == "digits MLP variants"
    deep = made(network={**made().network, "model": "csnn"})
    assert families_of({**results, "another": deep})["another"] == "digits CSNN"


STUDIES: dict[str, Callable[[], dict[str, CalibrationResult]]] = {
    "one, small": lambda: {"a": made(1e-12)},
    "flat": lambda: {"a": flat(), "b": flat()},
    "perfect": lambda: {"a": perfect(), "b": made()},
    "some without smoothed, other scales": lambda: {
        **networks(2), "c": without_smoothed(), "d": made(scales=(0.1, 0.2, 0.4), variants=True),
    },
    "curving down, no provenance": lambda: {"a": curving_down(), "b": made(network={}, data={}, checkpoint={})},
    "six surrogates": lambda: {
        f"{i}": made(seed=i, network={"model": "mlp", "surrogate": u})
        for i, u in enumerate(("atan:2", "atan:5", "sigmoid:4", "sigmoid:10", "triangle:1", "triangle:0.4"))
    },
}  # fmt: skip


@pytest.mark.parametrize("case", STUDIES)
def test_every_study_can_be_read(case: str) -> None:
    results = STUDIES[case]()
    figure = study_figure(results)
    assert collisions(figure) == []
    assert min(float(t.get_fontsize()) for t in words(figure)) >= 7
    assert figure.get_size_inches()[0] == 7
    for row in study_tables(results).splitlines():
        assert row.count("|") in (0, 5, 9)


def test_tables_hold_every_network_and_operator() -> None:
    results = networks()
    table = study_tables(results)
    blocks = table.split("\n\n**")
    assert [block.split("**")[-2] for block in (blocks[0], *(f"**{b}" for b in blocks[1:]))] == [
        "digits MLP", "Fashion-MNIST MLP", "digits MLP variants",
    ]  # fmt: skip
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in blocks[0].splitlines() if "|" in line]
    members = list(results.values())[:4]
    found = [r.calibration.scales[2].agreement["hessian"] for r in members]
    (row,) = [row for row in rows if row[:2] == ["0.2", "Hessian"]]
    ranks, ratios = [a.correlation for a in found], [a.ratio for a in found]
    traces = [r.calibration.scales[2].trace / -0.2 for r in members]
    assert row[2:] == [
        f"{np.median(ranks):.2f} ({min(ranks):.2f}..{max(ranks):.2f})",
        f"{np.median(ratios):.2g} ({min(ratios):.2g}..{max(ratios):.2g})",
        "86%",  # 25 of 29
        f"{100 * np.mean([a.within for a in found]):.0f}%",
        f"{traces[0]:.2g} ({traces[0]:.2g}..{traces[0]:.2g})",
        "4",
    ]
    assert ["0.2", "16", "100%", "0%"] in rows
    assert "abs. Hessian" in table
    assert study.short(347.0) == "350"
    with pytest.raises(ValueError, match="no calibration"):
        study_tables({})
    with pytest.raises(ValueError, match="no calibration"):
        study_figure({})


def test_results_come_back_from_plain_values() -> None:
    result = made()
    plain = clean(dataclasses.asdict(result))
    assert from_plain(plain, CalibrationResult, CALIBRATION_SCHEMA) == result
    with pytest.raises(ResultError, match="not a calibration of this version"):
        from_plain({**plain, "schema": "ikun-hessian/spectrum/1"}, CalibrationResult, CALIBRATION_SCHEMA)
    with pytest.raises(ResultError, match=r"lacks loss\. Create the calibration file again\."):
        from_plain({k: v for k, v in plain.items() if k != "loss"}, CalibrationResult, CALIBRATION_SCHEMA)
