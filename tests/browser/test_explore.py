"""A person drags a slider in JupyterLab and sees the figure move; an answer of the self-check opens when it
is clicked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest

pytestmark = pytest.mark.needs("chromium")

EXPLORE = """
from labkit.course import explore, plot

def staircase(bits=3, kind="line"):
    made = plot.lines([0, 1, 2], {"value": [0, bits, 2 * bits]}, title=f"{bits} bits, {kind}")
    return made.update_yaxes(range=[0, 20])

explore(staircase, bits=(3, range(1, 9)), kind=["line", "dots"])
"""
QUIZ = """
from labkit.course.self_check import Question, Quiz
Quiz("99", [Question("How many gaps?", {"16": "That counts the posts.", "15": "One fewer."}, answer="b")])
"""
FAILING = """
from labkit.course import explore
def table(n=1):
    return f"one over {n}: {1 / (3 - n):.3f}"
explore(table, n=range(1, 6))
"""


def open_and_run(page: Any, lab: Any, *cells: str) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c.strip()) for c in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, lab.folder / "a.ipynb")
    page.goto(lab.url("a.ipynb"))
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(
        timeout=60_000
    )  # earlier, Run All asks for a kernel
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()


def photograph(page: Any, name: str) -> None:
    """Keep a screenshot where LABKIT_SCREENSHOTS names a folder."""
    folder = os.environ.get("LABKIT_SCREENSHOTS")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def test_a_slider_moves_the_figure(page: Any, lab: Any) -> None:
    open_and_run(page, lab, EXPLORE)
    title = page.locator(".js-plotly-plot .gtitle")
    title.wait_for(timeout=90_000)
    assert title.text_content() == "3 bits, line"
    assert title.count() == 1, "the static figure must not stand beside the widget"
    before = page.locator(".js-plotly-plot .scatterlayer path.js-line").get_attribute("d")
    photograph(page, "explore-before")

    handle = page.locator(".noUi-handle")
    handle.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "document.querySelector('.js-plotly-plot .gtitle').textContent == '7 bits, line'"
    )
    assert page.locator(".js-plotly-plot .scatterlayer path.js-line").get_attribute("d") != before
    assert page.locator(".widget-readout").text_content() == "7"

    page.get_by_label("kind").select_option("dots")
    page.wait_for_function(
        "document.querySelector('.js-plotly-plot .gtitle').textContent == '7 bits, dots'"
    )
    photograph(page, "explore-after")
    assert page.elsewhere == [], "nothing may be fetched from outside this machine"


def test_a_failing_function_is_told_and_recovers(page: Any, lab: Any) -> None:
    open_and_run(page, lab, FAILING)
    page.get_by_text("one over 1: 0.500").wait_for(timeout=90_000)
    page.locator(".noUi-handle").focus()
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    page.get_by_role("alert").get_by_text("ZeroDivisionError").wait_for(timeout=20_000)
    page.keyboard.press("ArrowRight")
    page.get_by_text("one over 4: -1.000").wait_for(timeout=20_000)
    page.get_by_role("alert").wait_for(state="detached", timeout=20_000)


def test_clicking_an_answer_says_why(page: Any, lab: Any) -> None:
    open_and_run(page, lab, QUIZ)
    right = page.get_by_text("b) 15")
    right.wait_for(timeout=90_000)
    why = page.get_by_text("Right. One fewer.")
    assert not why.is_visible()
    right.click()
    why.wait_for(state="visible", timeout=5_000)
    assert not page.get_by_text("No. That counts the posts.").is_visible()
    photograph(page, "quiz")
