"""A real browser for tests: Chromium, driven over the WebDriver protocol of `chromedriver`, without another package."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DRIVER, CHROMIUM = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
MISSING = "" if DRIVER and CHROMIUM else "no browser: install the packages chromium and chromium-driver"
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # chromedriver is on this machine


class Browser:
    """One window.

    Args:
        port: Port of chromedriver.
        width: Width of the window in CSS pixels, as a telephone's if it is below 500.
        dark: Whether the window prefers a dark colour scheme.
    """

    def __init__(self, port: int, width: int, dark: bool) -> None:
        self._base = f"http://127.0.0.1:{port}/session"
        phone = {"deviceMetrics": {"width": width, "height": 844, "pixelRatio": 1, "touch": False}}
        options: dict[str, Any] = {
            "binary": CHROMIUM,
            "args": [
                "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},900",
                "--disable-background-networking", "--disable-component-update", "--no-first-run",
                *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            ],
        }  # fmt: skip
        options |= {"mobileEmulation": phone} if width < 500 else {}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        opened = self._ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self._base += f"/{opened['sessionId']}"

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with OPENER.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()[:500]) from None

    def open(self, path: Path) -> None:
        self._ask("POST", "/url", {"url": path.absolute().as_uri()})

    def run(self, script: str) -> Any:
        """Run JavaScript in the page, and return the value of its `return`."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": []})

    def point(self, x: float, y: float, drag: tuple[float, float] | None = None) -> None:
        """Move the mouse to a place in the window, and drag it from there if asked."""
        at = {"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y), "origin": "viewport"}
        steps: list[dict[str, Any]] = [at]
        if drag:
            there = {**at, "x": round(x + drag[0]), "y": round(y + drag[1])}
            steps += [{"type": "pointerDown", "button": 0}, there, {"type": "pointerUp", "button": 0}]
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": steps}
        self._ask("POST", "/actions", {"actions": [mouse]})

    def complaints(self) -> list[str]:
        """Return warnings and errors of the console since the last call."""
        found = self._ask("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in found if entry["level"] in ("WARNING", "SEVERE")]

    def picture(self, path: Path) -> None:
        """Save a screenshot of the whole page."""
        height = self.run("return document.documentElement.scrollHeight")
        width = self.run("return window.innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        command = {"cmd": "Page.captureScreenshot", "params": {"captureBeyondViewport": True, "clip": clip}}
        path.write_bytes(base64.b64decode(self._ask("POST", "/goog/cdp/execute", command)["data"]))

    def close(self) -> None:
        with contextlib.suppress(OSError, AssertionError):
            self._ask("DELETE", "")


@contextlib.contextmanager
def browser(width: int, dark: bool = False) -> Iterator[Browser]:
    """Open a window, and end the browser afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # without the proxies that a machine may be set up with
    plain = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    driver = subprocess.Popen([str(DRIVER), f"--port={port}", "--log-level=OFF"], env=plain, stdout=subprocess.DEVNULL)
    window = None
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        window = Browser(port, width, dark)
        yield window
    finally:
        if window:
            window.close()
        driver.terminate()
        driver.wait(20)
