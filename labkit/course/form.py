"""The form of a notebook, as rules that can be read off its file. ``faults`` names every place that departs from it."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from labkit.course.publish import KEPT_CELL_METADATA, METADATA, PLOTLY, WIDGET

MAX_LINES = 15  # of a code cell
MAX_HELPER = 10  # lines of a function defined in a notebook
MAX_BYTES = 1_000_000
COMPARED = 2 / 3  # of the cells that print a value
UNCOMPARED = "nbval-ignore-output"
OPENING = ("You will be able to", "Time", "Builds on")
SECTIONS = ("What breaks", "Self-check", "What next", "Clean up")


def faults(path: Path) -> list[str]:
    """Every departure from the form, one sentence each; empty for a notebook in good form."""
    notebook = nbformat.read(path, as_version=4)
    found = [*_opening(notebook), *_sections(notebook), *_pieces(notebook), *_file(notebook, path)]
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            found += [f"cell {number}: {fault}" for fault in _code_cell(notebook, number)]
    return found + _comparison(notebook)


def _opening(notebook: NotebookNode) -> list[str]:
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        return ["the first cell must be Markdown with the title as '# ...'"]
    missing = [f"the first cell lacks **{word}**" for word in OPENING if f"**{word}" not in first.source]
    if not re.search(r"runs in (about )?\d+ s; read and solve: \d+ min", first.source):
        missing.append("the first cell must say 'runs in N s; read and solve: N min'")
    return missing


def _sections(notebook: NotebookNode) -> list[str]:
    headings = re.findall(r"^##+ (.+)$", "\n".join(c.source for c in _markdown(notebook)), re.MULTILINE)
    found = [
        f"there is no section '## {name}'"
        for name in SECTIONS
        if not any(h.startswith(name) for h in headings)
    ]
    if headings and "Clean up" not in headings[-1]:
        found.append("the last section must be 'Clean up'")
    return found


def _pieces(notebook: NotebookNode) -> list[str]:
    code = "\n".join(c.source for c in _code(notebook))
    found = []
    if len(set(re.findall(r"exercise\(\"([\d.]+)\"\)\.check\(", code))) < 2:
        found.append("fewer than two exercises are checked")
    if not re.search(r"\bexplore\(", code):
        found.append("there is nothing to drag: no explore()")
    if not any(
        PLOTLY in o.get("data", {}) and "explore(" not in c.source
        for c in _code(notebook)
        for o in c.outputs
    ):
        found.append("no Plotly figure is stored, other than that of explore()")
    if not re.search(r"\bquiz\(", code):
        found.append("there is no quiz()")
    return found


def _file(notebook: NotebookNode, path: Path) -> list[str]:
    found = []
    if path.stat().st_size > MAX_BYTES:
        found.append(f"the file has {path.stat().st_size} bytes, more than {MAX_BYTES}")
    if dict(notebook.metadata) != METADATA:
        found.append("the metadata is not normalised; publish the notebook")
    if len({c.get("id") for c in notebook.cells}) < len(notebook.cells):
        found.append("cell ids are missing or repeated; publish the notebook")
    return found


def _code_cell(notebook: NotebookNode, number: int) -> list[str]:
    cell = notebook.cells[number]
    found = []
    lines = [line for line in cell.source.splitlines() if line.strip()]
    if not lines:
        return ["is empty"]
    if len(lines) > MAX_LINES:
        found.append(f"has {len(lines)} lines, more than {MAX_LINES}")
    if set(cell.metadata) - set(KEPT_CELL_METADATA) or cell.execution_count is None:
        found.append("is not normalised or was not executed; publish the notebook")
    for before, step in ((True, -1), (False, 1)):
        if not _sentence(_neighbour(notebook, number, step)):
            found.append(f"has no sentence {'before' if before else 'after'} it")
    for output in cell.outputs:
        if output.output_type == "error" and "raises-exception" not in cell.metadata.get("tags", []):
            found.append(f"stored an error: {output.ename}")
        if WIDGET in output.get("data", {}):
            found.append("stored a widget view; publish the notebook")
        if PLOTLY in output.get("data", {}) and "image/png" not in output.data:
            found.append("stored a figure without its picture; publish the notebook")
        if output.output_type == "stream" and output.name == "stderr":
            found.append(f"stored a warning: {output.text.strip().splitlines()[-1][:80]}")
    return found + _helpers(cell.source)


def _helpers(source: str) -> list[str]:
    try:
        tree = ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source, flags=re.MULTILINE))
    except SyntaxError as error:
        return [f"does not parse: {error.msg}"]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_HELPER and "NotImplementedError" not in source:
                found.append(
                    f"{node.name} has {length} lines, more than {MAX_HELPER}: it belongs into labkit"
                )
    return found


def _neighbour(notebook: NotebookNode, number: int, step: int) -> NotebookNode | None:
    """The cell before or after; statement, starter and check of one exercise count as one block."""
    at = number + step
    if _in_exercise(notebook.cells[number]):
        while 0 <= at < len(notebook.cells) and _in_exercise(notebook.cells[at]):
            at += step
    return notebook.cells[at] if 0 <= at < len(notebook.cells) else None


def _in_exercise(cell: NotebookNode) -> bool:
    return cell.cell_type == "code" and bool(re.search(r"\bexercise\(|NotImplementedError", cell.source))


def _sentence(cell: NotebookNode | None) -> bool:
    """Whether a Markdown cell says something: a line that is no heading, ending as a sentence does."""
    if cell is None or cell.cell_type != "markdown":
        return False
    text = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#")]
    return any(re.search(r"[.:?!)|*`$]\s*$", line) for line in text)


def _comparison(notebook: NotebookNode) -> list[str]:
    compared = claimed = 0
    found = []
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            continue
        tags = cell.metadata.get("tags", [])
        if "nbval-skip" in tags:
            found.append(f"cell {number}: nbval-skip runs nothing; use {UNCOMPARED}")
        drawn = any(PLOTLY in o.get("data", {}) for o in cell.outputs)
        if drawn and UNCOMPARED not in tags:
            found.append(f"cell {number}: a figure needs the tag {UNCOMPARED}")
        if not _prints_value(cell):
            continue
        if UNCOMPARED not in tags:
            compared += 1
        elif re.search(r"\b(claim|verdict)\(", cell.source):
            claimed += 1
        else:
            found.append(f"cell {number}: prints a value that is neither compared nor claimed")
    if compared < COMPARED * (compared + claimed):
        found.append(
            f"{compared} of {compared + claimed} cells that print a value are compared; at least two thirds must be"
        )
    return found


def _prints_value(cell: NotebookNode) -> bool:
    if _in_exercise(cell) or "quiz(" in cell.source:
        return False

    def text(output: Any) -> bool:
        return output.output_type == "stream" or (
            "text/plain" in output.get("data", {})
            and PLOTLY not in output.data
            and "image/png" not in output.data
        )

    return any(text(output) for output in cell.outputs) and "explore(" not in cell.source


def _code(notebook: NotebookNode) -> list[NotebookNode]:
    return [c for c in notebook.cells if c.cell_type == "code"]


def _markdown(notebook: NotebookNode) -> list[NotebookNode]:
    return [c for c in notebook.cells if c.cell_type == "markdown"]
