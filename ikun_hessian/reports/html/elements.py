"""HTML that is safe by construction: plain strings are escaped, only `Html` is put in as it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from hessian_tools.io.text import without_control_codes
from hessian_tools.results.text import rounded

EMPTY_ELEMENTS = {"circle", "line", "rect", "path", "meta"}  # in SVG they must be closed
MINUS = "−"


class Html(str):
    """A string that is HTML already."""

    __slots__ = ()


Child = str | Iterable[str]


def html(*children: Child) -> Html:
    """Join children into one piece of HTML. Strings that are not `Html` are escaped."""
    return Html("".join(_safe(part) for child in children for part in ((child,) if isinstance(child, str) else child)))


def _safe(text: str) -> str:
    return text if isinstance(text, Html) else escape(without_control_codes(text))


def tag(name: str, /, *children: Child, **attributes: object) -> Html:
    """Return an element.

    Args:
        name: Name of the element.
        children: Contents, as in `html`.
        attributes: Attributes by name. A trailing underscore is dropped (class_), other underscores become dashes.
            True gives an attribute without a value; None and False leave the attribute out. All values are escaped.
    """
    given = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    text = "".join(
        f" {key}" if value is True else f' {key}="{escape(without_control_codes(str(value)))}"'
        for key, value in given
        if value is not None and value is not False
    )
    return Html(f"<{name}{text}/>" if name in EMPTY_ELEMENTS else f"<{name}{text}>{html(*children)}</{name}>")


def number(x: float, digits: int = 4) -> str:
    """Format a number with a true minus sign, "–" if it is NaN."""
    if math.isnan(x):
        return "–"
    return rounded(x, digits).replace("-", MINUS)


def value_with_error(value: float, error: float, least: float = math.nan) -> str:
    """Format a value with its standard error, or with the lower limit of that; without one if both are NaN."""
    if math.isnan(value):
        return "–"
    if math.isfinite(least):
        return f"{number(value)} (± more than {number(least, 1)})"
    return number(value) if math.isnan(error) else f"{number(value)} ± {number(error, 2)}"


def interval(ends: tuple[float, float]) -> str:
    """Format an interval, "–" if there is none."""
    low, high = ends
    return "–" if math.isnan(low) and math.isnan(high) else f"[{number(low)}, {number(high)}]"


def percent(x: float) -> str:
    """Format a fraction as a percentage, "–" if it is NaN."""
    return "–" if math.isnan(x) else f"{x:.1%}"


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], wide: bool = False, label: str = "") -> Html:
    """Return a table whose first column names the rows.

    Args:
        head: Titles of the columns.
        rows: Cells of the rows.
        wide: Whether the table scrolls on a narrow screen. Otherwise each row becomes a block there, in which every
            cell is preceded by the title of its column.
        label: Description of the table for screen readers.
    """
    titles = tag("tr", [tag("th", title, scope="col") for title in head])
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            [tag("td", c, data_head=h) for c, h in zip(row[1:], head[1:], strict=True)],
        )
        for row in rows
    ]
    found = tag("table", tag("thead", titles), tag("tbody", body), class_="wide" if wide else "cards")
    return tag("div", found, class_="scroll", tabindex="0", role="region", aria_label=label or head[0] or "table")


def details(title: str, *children: Child, opened: bool = False) -> Html:
    """Return contents under a title that folds and unfolds."""
    return tag("details", tag("summary", title), *children, open=opened)


def listed(texts: Iterable[str], class_: str = "") -> Html:
    """Return a list of texts, nothing if there are none."""
    items = [tag("li", text) for text in texts]
    return tag("ul", items, class_=class_ or None) if items else Html("")
