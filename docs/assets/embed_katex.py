"""Make docs/assets/katex.css and katex.js from an unpacked KaTeX release.

Usage: npm pack katex && tar -xzf katex-*.tgz && python docs/assets/embed_katex.py package

The fonts that the formulas of this site use are embedded in the style sheet as data URIs: the built site then works
from a disk without a network, also in browsers that refuse to load fonts from file URLs.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path

FONTS = (
    "Main-Regular",
    "Math-Italic",
    "Caligraphic-Regular",
    "Size1-Regular",
    "Size2-Regular",
    "Size3-Regular",
    "Size4-Regular",
)


def embed(package: Path, assets: Path) -> None:
    """Write katex.css and katex.js to `assets`, each with the licence notice that KaTeX asks for."""
    version = json.loads((package / "package.json").read_text())["version"]
    notice = f"/*! KaTeX {version}, https://katex.org\n\n{(package / 'LICENSE').read_text().strip()}\n*/\n"
    css = (package / "dist" / "katex.min.css").read_text()

    def face(match: re.Match[str]) -> str:
        source = re.search(r"url\(fonts/KaTeX_([\w-]+)\.woff2\)", match[0])
        if source is None or source[1] not in FONTS:
            return ""
        data = base64.b64encode((package / "dist" / "fonts" / f"KaTeX_{source[1]}.woff2").read_bytes()).decode()
        embedded = f'src:url(data:font/woff2;base64,{data}) format("woff2")'
        return re.sub(r"src:url\([^}]*", lambda _: embedded, match[0])

    css = re.sub(r"@font-face\{[^}]*\}", face, css)
    (assets / "katex.css").write_text(notice + css + "\n")
    (assets / "katex.js").write_text(notice + (package / "dist" / "katex.min.js").read_text() + "\n")


if __name__ == "__main__":
    embed(Path(sys.argv[1]), Path(__file__).parent)
