"""Every notebook is in the form that the course promises its readers."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from labkit.course.form import faults
from labkit.course.lessons import lesson, names

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_form(path: Path) -> None:
    assert not (found := faults(path)), "\n".join(found)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_starter_cells_are_the_lessons_own(path: Path) -> None:
    cells = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    text = "\n".join(cells)
    for item in lesson(path.name[:2]).EXERCISES:
        assert item.starter in cells, (
            f"no cell holds the starter of exercise {item.id} as the lesson has it"
        )
        assert f'exercise("{item.id}").check(' in text, f"exercise {item.id} is never checked"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_self_check_has_three_questions(path: Path) -> None:
    questions = lesson(path.name[:2]).QUIZ
    assert len(questions) == 3
    assert all(len(q.options) >= 3 for q in questions), (
        "a question needs at least three answers to choose from"
    )
    assert all(why.strip() for q in questions for why in q.options.values()), "each answer says why"


def test_each_notebook_has_its_lesson_and_each_lesson_its_notebook() -> None:
    assert [f"n{p.stem}" for p in NOTEBOOKS] == names()
