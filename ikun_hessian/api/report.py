"""What all results of the Python functions have in common: a short `repr`, HTML for notebooks, and a citation."""

from __future__ import annotations

import html
import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


class Report(ABC):
    """A result that shows itself: `repr`, HTML in a notebook, `plot`, `to_pandas`, `save` and `cite`."""

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """Return the numbers as rows of a table."""

    @abstractmethod
    def plot(self) -> Figure:
        """Return the figure."""

    @abstractmethod
    def save(self, stem: str | Path) -> list[Path]:
        """Write the result and its figure to files that begin with `stem`, and return their paths."""

    @abstractmethod
    def cite(self) -> str:
        """Return one sentence for a paper and one row of a LaTeX table, on two lines."""

    @abstractmethod
    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        """Return head and rows of the table that a notebook shows."""

    @abstractmethod
    def _notes(self) -> Sequence[str]:
        """Return the lines that a notebook shows above and below the table: the first is above."""

    def to_pandas(self) -> pandas.DataFrame:
        """Return the rows as a pandas DataFrame.

        Raises:
            ImportError: If pandas is not installed.
        """
        return data_frame(self.rows())

    def _repr_html_(self) -> str:
        """Return the table and the figure as HTML."""
        head, rows = self._table()
        first, *notes = self._notes()
        cells = "".join(f"<th>{html.escape(text)}</th>" for text in head)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>" for row in rows)
        below = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
        table = f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"
        return f"<div><p>{html.escape(first)}</p>{table}{below}{image(self.plot())}</div>"


def data_frame(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    """Return rows as a pandas DataFrame. Raise ImportError if pandas is not installed."""
    try:
        frames: Any = importlib.import_module("pandas")
    except ImportError:
        raise ImportError("to_pandas needs the package pandas: pip install pandas") from None
    table: pandas.DataFrame = frames.DataFrame(rows)
    return table


def image(figure: Figure) -> str:
    """Return a figure as an HTML image that holds its own data (PNG)."""
    import base64
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="figure" style="max-width:100%" src="data:image/png;base64,{data}">'


def latex(text: str) -> str:
    """Escape the characters that are special in LaTeX."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
