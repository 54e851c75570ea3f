"""For maintainers: run a notebook from top to bottom and store it as the project keeps it.

Outputs are stored, widget state and times are not; metadata and cell ids are stable; each figure gets a PNG beside it.
A diff of two published versions shows what changed and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from labkit.course.pictures import Camera, camera
from labkit.files import whole_file

PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
KEPT_CELL_METADATA = ("tags", "jupyter")


def publish(target: Path, *, source: Path | None = None, timeout: int = 300, execute: bool = True) -> float:
    """Execute ``target`` (or ``source``, a notebook or a py:percent script) and write ``target`` whole.

    The kernel runs in the notebook's folder with an empty learner's folder, as a newcomer's would. Gives
    back the seconds that the run took. A cell that fails stops it, and ``target`` stays as it was.
    """
    notebook = read(source or target)
    seconds = 0.0
    if execute:
        seconds = _run(notebook, folder=target.parent, timeout=timeout)
    normalise(notebook)
    if any(True for _ in _figures(notebook)):
        with camera() as cam:
            add_pictures(notebook, cam)
    nbformat.validate(notebook)
    with whole_file(target) as part:
        part.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    return seconds


def read(path: Path) -> NotebookNode:
    """A notebook, or a py:percent script turned into one; cells without a lasting id get one from their source."""
    if path.suffix == ".py":
        import jupytext  # type: ignore[import-untyped]

        notebook = jupytext.read(path, fmt="py:percent")
        for cell in notebook.cells:
            cell.id = ""
    else:
        notebook = nbformat.read(path, as_version=4)
    seen: set[str] = set()
    for cell in notebook.cells:
        if not cell.get("id") or cell.id in seen:
            cell.id = _fresh_id(cell.source, seen)
        seen.add(cell.id)
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def normalise(notebook: NotebookNode) -> None:
    """Bring metadata, counts and outputs into the form in which they are kept. Doing it twice changes nothing."""
    notebook.metadata = nbformat.from_dict(METADATA)
    count = 0
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict(
            {k: cell.metadata[k] for k in KEPT_CELL_METADATA if k in cell.metadata}
        )
        cell.source = "\n".join(line.rstrip() for line in cell.source.splitlines()).strip("\n")
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = _streams_joined(cell.outputs)
        for output in cell.outputs:
            output.pop("transient", None)
            if output.output_type == "execute_result":
                output.execution_count = count
            if "data" in output:
                output.metadata = nbformat.from_dict({})
                output.data.pop(WIDGET, None)
                if PLOTLY in output.data:
                    output.data[PLOTLY] = trim(output.data[PLOTLY])


def trim(figure: dict[str, Any]) -> Any:
    """A figure's JSON without what Plotly fills in by itself, numbers to six digits."""
    figure = {k: v for k, v in dict(figure).items() if k in ("data", "layout")}
    return nbformat.from_dict(_rounded(json.loads(json.dumps(figure))))


def add_pictures(notebook: NotebookNode, cam: Camera) -> None:
    """Put a PNG beside each figure."""
    for data in _figures(notebook):
        data["image/png"] = base64.b64encode(cam.png(data[PLOTLY])).decode() + "\n"


def _figures(notebook: NotebookNode) -> Any:
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if PLOTLY in output.get("data", {}):
                yield output.data


def _run(notebook: NotebookNode, *, folder: Path, timeout: int) -> float:
    with tempfile.TemporaryDirectory(prefix="labkit-work-") as work:
        environment = os.environ | {
            "LABKIT_WORK": work,
            "LABKIT_PROGRESS": "0",
            "OPENBLAS_NUM_THREADS": "2",
        }
        client = NotebookClient(
            notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )
        started = time.monotonic()
        client.execute(env=environment)
        return time.monotonic() - started


def _streams_joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Consecutive pieces of one stream become one; what a progress bar overwrote is dropped."""
    joined: list[NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else None
        if last and output.output_type == last.output_type == "stream" and last.name == output.name:
            last.text += output.text
        else:
            joined.append(output)
    for output in joined:
        if output.output_type == "stream":
            output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
    return [o for o in joined if o.output_type != "stream" or o.text]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return value


def _fresh_id(source: str, seen: set[str]) -> str:
    number = 0
    while (made := hashlib.sha256(f"{number}{source}".encode()).hexdigest()[:8]) in seen:
        number += 1
    return made
