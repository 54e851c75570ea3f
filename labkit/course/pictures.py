"""A PNG beside each stored Plotly figure, so that GitHub, diffs and readers without a browser see it too.

Drawn by Plotly's own JavaScript in Chromium: a maintainer's tool, needed only to publish a notebook.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import plotly

LIMIT = 60_000  # bytes of one picture
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-device-scale-factor=1",
]


def chromium() -> str | None:
    """The path of a Chromium on this machine: LABKIT_CHROMIUM, or the first found on PATH."""
    named = os.environ.get("LABKIT_CHROMIUM")
    return named or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )


class Camera:
    """Turns figures into PNG bytes; made by :func:`camera`."""

    def __init__(self, page: Any) -> None:
        self.page = page

    def png(self, figure: dict[str, Any]) -> bytes:
        """The figure, as stored in a notebook, drawn at its own size."""
        size = figure.get("layout", {})
        width, height = int(size.get("width") or 700), int(size.get("height") or 400)
        url = self.page.evaluate(
            "([f, w, h]) => Plotly.toImage({data: f.data, layout: f.layout}, "
            "{format: 'png', width: w, height: h, scale: 1})",
            [json.loads(json.dumps(figure)), width, height],
        )
        png = base64.b64decode(url.partition(",")[2])
        if len(png) > LIMIT:
            title = size.get("title", {})
            name = title.get("text") if isinstance(title, dict) else title
            raise ValueError(
                f"the picture of {name!r} has {len(png)} bytes, more than {LIMIT}: "
                "draw fewer points or a smaller figure"
            )
        return png


@contextmanager
def camera() -> Iterator[Camera]:
    """A Chromium with Plotly loaded and no network. Raises RuntimeError where there is no Chromium."""
    path = chromium()
    if path is None:
        raise RuntimeError(
            "no Chromium was found; `make system-packages` installs it, or set LABKIT_CHROMIUM to its path"
        )
    from playwright.sync_api import sync_playwright

    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": 1000, "height": 800}, device_scale_factor=1)
            page.context.set_offline(True)
            page.set_content("<html><body></body></html>")
            page.add_script_tag(path=str(script))
            yield Camera(page)
        finally:
            browser.close()
