"""A learner's copy is renewed where they changed nothing and left where they did; nothing is ever lost."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from labkit.course import copies


def write(path: Path, text: str, output: str = "") -> None:
    cell = nbformat.v4.new_code_cell(text, id="one")
    if output:
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=output)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), path)


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A course of two notebooks, its first refresh done."""
    folder = tmp_path / "course" / "notebooks"
    (tmp_path / "course" / "labkit").mkdir(parents=True)
    write(folder / "00_start.ipynb", "a = 1")
    write(folder / "06_gptq.ipynb", "b = 1")
    monkeypatch.chdir(tmp_path / "course")
    assert copies.refresh().new == ["00_start", "06_gptq"]
    return folder


def test_untouched_is_renewed_and_touched_is_left(course: Path, work: Path) -> None:
    write(work / "notebooks/06_gptq.ipynb", "b = 'mine'")
    write(course / "00_start.ipynb", "a = 2")
    write(course / "06_gptq.ipynb", "b = 2")
    done = copies.refresh()
    assert (done.renewed, done.left, done.new) == (["00_start"], ["06_gptq"], [])
    assert "a = 2" in (work / "notebooks/00_start.ipynb").read_text()
    assert "mine" in (work / "notebooks/06_gptq.ipynb").read_text()
    assert copies.refresh().left == ["06_gptq"], "named until it is reset"


def test_running_cells_is_not_changing_them_and_outputs_are_kept(course: Path, work: Path) -> None:
    write(work / "notebooks/00_start.ipynb", "a = 1", output="measured here")
    write(course / "00_start.ipynb", "a = 2")
    assert copies.refresh().renewed == ["00_start"]
    assert "measured here" in (work / "notebooks/00_start.1.ipynb").read_text()


def test_a_change_is_not_named_while_the_course_stands_still(course: Path, work: Path) -> None:
    write(work / "notebooks/06_gptq.ipynb", "b = 'mine'")
    done = copies.refresh()
    assert (done.left, done.renewed) == ([], [])


def test_reset_keeps_every_old_copy(course: Path, work: Path) -> None:
    for text in ("first", "second"):
        write(work / "notebooks/06_gptq.ipynb", text)
        copy, kept = copies.reset("6")
        assert kept is not None and text in kept.read_text()
        assert copy.read_bytes() == (course / "06_gptq.ipynb").read_bytes()
    assert sorted(p.name for p in (work / "notebooks").glob("06*")) == [
        "06_gptq.1.ipynb",
        "06_gptq.2.ipynb",
        "06_gptq.ipynb",
    ]


def test_a_copy_without_a_record_is_taken_for_changed(course: Path, work: Path) -> None:
    (work / "notebooks/.copies.json").unlink()
    write(course / "06_gptq.ipynb", "b = 2")
    assert copies.refresh().left == ["06_gptq"]


def test_an_unknown_number_names_those_there_are(course: Path) -> None:
    with pytest.raises(KeyError, match="00_start, 06_gptq"):
        copies.reset("7")
