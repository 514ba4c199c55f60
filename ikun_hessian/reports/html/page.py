"""Put the sections into one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import resources

from hessian_tools.io.json import ResultError
from hessian_tools.io.text import one_line
from ikun_hessian.experiments.comparison.comparison import ACCURACY, compare_settings
from ikun_hessian.experiments.comparison.pairing import several_seeds
from ikun_hessian.reports.html.comparison import comparison_section
from ikun_hessian.reports.html.elements import Html, html, tag
from ikun_hessian.reports.html.flatness import flatness_section
from ikun_hessian.reports.html.landscape import landscape_section
from ikun_hessian.reports.html.sources import Sources, networks
from ikun_hessian.reports.html.spectrum import spectrum_section
from ikun_hessian.reports.html.summary import summary
from ikun_hessian.reports.html.training import training_section
from ikun_hessian.reports.html.training_path import training_path_section


def report_page(found: Sources, by: str = "init", accuracy: float = ACCURACY, title: str = "Flatness report") -> str:
    """Return the page.

    Args:
        found: What it shows.
        by: Condition whose levels are compared, if there are several seeds.
        accuracy: Test accuracy to which the comparison counts epochs.
        title: Title of the page.

    Returns:
        The whole HTML text. It is the same for the same results.
    """
    every = networks(found.runs)
    spectra = [(n.name, r) for n in every if (r := n.run.spectra.get(n.key))]
    flats = [(n.name, f) for n in every if (f := n.run.flatness.get(n.key))]
    sections: list[tuple[str, str, Html]] = [("summary", "Summary", summary(every, found.landscapes, found.left_out))]
    if len(found.runs) > 1 and several_seeds(found.runs, by):
        compared = compare_settings(found.runs, by, accuracy=accuracy)
        sections += [("comparison", f"Comparison by {by}", comparison_section(compared))]
    sections += [("spectra", "Spectra", spectrum_section(spectra))] if spectra else []
    sections += [("flatness", "Flatness", flatness_section(flats))] if flats else []
    sections += (
        [("landscapes", "Loss landscapes", landscape_section(list(found.landscapes.items())))]
        if found.landscapes
        else []
    )
    sections += (
        [("training", "Training", training_section(found.runs))]
        if any(run.log or run.training for run in found.runs)
        else []
    )
    paths = list(found.paths.items())
    sections += [("paths", "Paths of training", training_path_section(paths))] if paths else []
    links = [tag("a", name, href=f"#{key}") for key, name, _ in sections]
    body = [
        tag("header", tag("h1", title), tag("nav", *links, aria_label="Sections") if len(links) > 1 else Html("")),
        tag("main", *(tag("section", tag("h2", name), content, id=key) for key, name, content in sections)),
        tag("footer", tag("p", "Made by ikun-hessian from saved results. The page needs no network access.")),
        tag("div", id="tip", role="status", hidden=True),
    ]
    return _document(title, html(*body))


def drawable(found: Sources) -> Sources:
    """Leave out results that can be read but not drawn, because their fields do not fit together.

    Args:
        found: The results.

    Returns:
        The results that can be drawn, with one line for each other one in `left_out`.

    Raises:
        ResultError: If nothing is left.
    """
    left_out = list(found.left_out)

    def fits(name: str, kind: str, draw: Callable[[], object]) -> bool:
        try:
            draw()
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            left_out.append(one_line(f"{name}: its {kind} does not fit together ({error}). Compute it again (skipped)"))
            return False
        return True

    runs = []
    for run in found.runs:
        spectra = {
            key: r
            for key, r in run.spectra.items()
            if fits(run.name, "spectrum", partial(spectrum_section, [(run.name, r)]))
        }
        flats = {
            key: r
            for key, r in run.flatness.items()
            if fits(run.name, "flatness", partial(flatness_section, [(run.name, r)]))
        }
        one = replace(run, spectra=spectra, flatness=flats)
        if fits(run.name, "training record", partial(training_section, [one])):
            runs.append(one)
    landscapes = {
        name: r
        for name, r in found.landscapes.items()
        if fits(name, "landscape", partial(landscape_section, [(name, r)]))
    }
    paths = {
        name: r for name, r in found.paths.items() if fits(name, "path", partial(training_path_section, [(name, r)]))
    }
    if not (runs or landscapes or paths):
        raise ResultError(left_out[0])
    return Sources(tuple(runs), landscapes, paths, tuple(left_out))


def _document(title: str, body: Html) -> str:
    """Return the document. Its policy lets only its own script run, and forbids every request."""
    style, script = _asset("page.css"), _asset("figures.js") + _asset("surfaces.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    head = html(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(style)),
    )
    whole = tag("html", tag("head", head), tag("body", body, tag("script", Html(script))), lang="en")
    return f"<!DOCTYPE html>\n{whole}\n"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")
