"""Text that is safe to print and to put into Markdown."""

from __future__ import annotations

import re

from hessian_tools.io.files import without_control_codes

__all__ = ["markdown", "one_line", "without_control_codes"]

_MARKUP = re.compile(r"[\\|`]|<(?=[A-Za-z/!?])|\](?=\()")  # what would end a cell, or become code, HTML or a link


def one_line(text: str) -> str:
    """Return a text as one without_control_codes line, with single spaces."""
    return without_control_codes(" ".join(text.split()))


def markdown(text: str) -> str:
    """Return a text as one line of Markdown that shows it as it is, also in the cell of a table."""
    return _MARKUP.sub(r"\\\g<0>", one_line(text))
