"""For the site: docstrings are plain prose, so brackets, stars and underscores in them are no Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

CODE = re.compile(r"(`[^`\n]*`|^ {4}.*$)", re.MULTILINE)  # stays as it is


class PlainProse(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            parts = CODE.split(obj.docstring.value)
            parts[::2] = [re.sub(r"(?<!\\)([\[\]*_<|])", r"\\\1", prose) for prose in parts[::2]]
            obj.docstring.value = "".join(parts)
