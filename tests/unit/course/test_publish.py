"""A published notebook holds what a diff should show and nothing else; the form's rules find what departs from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from labkit.course.form import faults
from labkit.course.publish import PLOTLY, WIDGET, normalise, publish, read


def test_normalise_strips_and_is_stable() -> None:
    figure = {"data": [{"y": [0.123456789]}], "layout": {}, "config": {"x": 1}, "frames": []}
    outputs = [
        new_output("stream", name="stdout", text="10%\r50%\r100%\n"),
        new_output("stream", name="stdout", text="done\n"),
        new_output(
            "display_data", data={WIDGET: {"model_id": "1"}, PLOTLY: figure}, metadata={"x": {"y": 1}}
        ),
    ]
    cell = new_code_cell("a = 1   \n", outputs=outputs, metadata={"vscode": {"t": 1}, "tags": ["t"]})
    notebook = new_notebook(
        cells=[cell],
        metadata={"widgets": {"state": {}}, "kernelspec": {"name": "mine", "display_name": "Mine"}},
    )
    normalise(notebook)
    once = nbformat.writes(notebook)
    normalise(notebook)
    assert nbformat.writes(notebook) == once
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    assert dict(cell.metadata) == {"tags": ["t"]}
    assert cell.source == "a = 1"
    assert cell.execution_count == 1
    assert cell.outputs[0].text == "100%\ndone\n"
    assert dict(cell.outputs[1].data) == {PLOTLY: {"data": [{"y": [0.123457]}], "layout": {}}}


def test_ids_follow_the_source(tmp_path: Path) -> None:
    script = tmp_path / "a.py"
    script.write_text("# %%\na = 1\n\n# %%\nb = 1\n")
    first = [c.id for c in read(script).cells]
    script.write_text("# %%\nnew = 1\n\n# %%\na = 1\n\n# %%\nb = 1\n")
    assert [c.id for c in read(script).cells][1:] == first
    script.write_text("# %%\na = 1\n\n# %%\na = 1\n")
    assert len({c.id for c in read(script).cells}) == 2


def test_a_failing_cell_writes_nothing(tmp_path: Path) -> None:
    from nbclient.exceptions import CellExecutionError

    target = tmp_path / "a.ipynb"
    target.write_text("as it was")
    script = tmp_path / "a.py"
    script.write_text("# %%\n1 / 0\n")
    with pytest.raises(CellExecutionError):
        publish(target, source=script)
    assert target.read_text() == "as it was"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ipynb", "a.py"]


OPENING = "# 06 · T\n\n**You will be able to** x.\n\n**Time**: runs in 9 s; read and solve: 9 min.\n\n**Builds on** y."
CLOSING = "Seen.\n\n## What breaks\n\n## Self-check\n\n## What next\n\n## Clean up\n\nNothing."
GOOD = [
    'f = exercise("06.1").check(my_f)',
    'g = exercise("06.2").check(my_g)',
    "explore(f)",
    "figure()",
    'quiz("06")',
    "print(1)",
    "print(2)",
    "claim('x', 1)",
]


def make(path: Path, sources: list[str] = GOOD, tags: dict[str, list[str]] | None = None) -> list[str]:
    """A notebook with these code cells, each with the outputs that its first word suggests, and its faults."""
    cells: list[Any] = [new_markdown_cell(OPENING)]
    for source in sources:
        cell = new_code_cell(source)
        if source.startswith(("explore", "figure")):
            cell.outputs = [new_output("display_data", data={PLOTLY: {}, "image/png": "AAAA"})]
        elif source.startswith(("print", "claim")):
            cell.outputs = [new_output("stream", name="stdout", text="1\n")]
        if source.startswith(("explore", "figure", "claim")):
            cell.metadata["tags"] = ["nbval-ignore-output"]
        cell.metadata.update({"tags": tags[source]} if tags and source in tags else {})
        cells += [cell, new_markdown_cell("Seen.")]
    cells[-1] = new_markdown_cell(CLOSING)
    notebook = new_notebook(cells=cells)
    normalise(notebook)
    nbformat.write(notebook, path)
    return faults(path)


def test_good_form_has_no_faults(tmp_path: Path) -> None:
    assert make(tmp_path / "a.ipynb") == []


@pytest.mark.parametrize(
    ("sources", "tags", "words"),
    [
        (GOOD[1:], {}, "fewer than two exercises"),
        ([s for s in GOOD if "explore" not in s], {}, "nothing to drag"),
        ([s for s in GOOD if "figure" not in s], {}, "no Plotly figure"),
        ([s for s in GOOD if "quiz" not in s], {}, "no quiz()"),
        ([*GOOD, "x = 1\n" * 16], {}, "16 lines, more than 15"),
        ([*GOOD, "def f():\n" + "    x = 1\n" * 10], {}, "11 lines, more than 10"),
        (GOOD, {"print(1)": ["nbval-ignore-output"]}, "neither compared nor claimed"),
        (GOOD, {"figure()": []}, "a figure needs the tag"),
        (GOOD, {"print(1)": ["nbval-skip"]}, "nbval-skip"),
        ([*GOOD, "claim('y', 1)"], {}, "2 of 4 cells"),
    ],
)
def test_each_departure_is_named(
    tmp_path: Path, sources: list[str], tags: dict[str, list[str]], words: str
) -> None:
    assert any(words in fault for fault in make(tmp_path / "a.ipynb", sources, tags))


def test_text_around_code_is_required(tmp_path: Path) -> None:
    path = tmp_path / "a.ipynb"
    make(path)
    notebook = nbformat.read(path, as_version=4)
    index = next(i for i, c in enumerate(notebook.cells) if c.source == "print(1)")
    notebook.cells[index + 1].source = "## Only a heading"
    nbformat.write(notebook, path)
    assert f"cell {index}: has no sentence after it" in faults(path)
    assert f"cell {index + 2}: has no sentence before it" in faults(path)
