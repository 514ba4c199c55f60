"""Format text for the terminal: named entries, warnings and shortened names."""

from __future__ import annotations

import textwrap

SCREEN_WIDTH = 80  # columns


def field(name: str, text: str) -> list[str]:
    """Return the lines of a named entry: the name on the left, the wrapped text to its right."""
    return textwrap.wrap(
        text, SCREEN_WIDTH, initial_indent=f"{name:<12}", subsequent_indent=" " * 12, break_on_hyphens=False
    )


def warning(text: str) -> list[str]:
    """Return the wrapped lines of a warning, marked by an exclamation mark."""
    return textwrap.wrap(text, SCREEN_WIDTH, initial_indent="! ", subsequent_indent="  ", break_on_hyphens=False)


def paragraph(text: str, indent: int = 0) -> list[str]:
    """Return the wrapped lines of a paragraph, indented by some columns."""
    return textwrap.wrap(text, SCREEN_WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)


def shortened(text: str, width: int) -> str:
    """Return the text, without its beginning if it is longer than `width` characters."""
    return text if len(text) <= width else "…" + text[1 - width :]
