"""What an exercise prints, gives back and remembers."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from labkit.course import progress_file
from labkit.course.check import close
from labkit.course.exercises import Exercise


def double(x: float) -> float:
    return 2 * x


@pytest.fixture
def item() -> Exercise:
    return Exercise(
        "98.1",
        "Doubling",
        difficulty=1,
        minutes=2,
        statement="Return $2x$.",
        starter="def my_double(x):\n    raise NotImplementedError",
        solution=double,
        check=lambda fn: close(fn(3.0), 6.0, "your double"),
        hints=["Add it to itself.", "`x + x`."],
    )


def test_right_gives_back_the_learners_own(item: Exercise, capsys: pytest.CaptureFixture[str]) -> None:
    def mine(x: float) -> float:
        return x + x

    assert item.check(mine) is mine
    assert capsys.readouterr().out == "Exercise 98.1 · Doubling: right. The next cells run your function.\n"


def test_wrong_and_open_give_back_the_solution(item: Exercise, capsys: pytest.CaptureFixture[str]) -> None:
    assert item.check(lambda x: x) is double
    said = capsys.readouterr().out
    assert "your double is 3; expected 6." in said
    assert "It was given x = 3." in said

    def starter(x: float) -> float:
        raise NotImplementedError

    assert item.check(starter) is double
    assert capsys.readouterr().out.count("\n") == 1, "one calm line"


def test_hints_come_one_by_one(item: Exercise, capsys: pytest.CaptureFixture[str]) -> None:
    for expected in ("Hint 1 of 2: Add", "Hint 2 of 2: `x", "last hint"):
        item.hint()
        assert expected in capsys.readouterr().out
    item.solution()
    assert capsys.readouterr().out == "def double(x: float) -> float:\n    return 2 * x\n"


def test_progress_is_private_and_right_stays_right(item: Exercise, work: Path) -> None:
    item.check(double)
    item.check(lambda x: 0.0)
    item.hint()
    path = work / "progress.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert progress_file.read()["98.1"] == {
        "attempts": 2,
        "hints": 1,
        "solution_seen": False,
        "state": "right",
    }


def test_not_attempted_leaves_no_trace(item: Exercise, work: Path) -> None:
    def starter(x: float) -> float:
        raise NotImplementedError

    item.check(starter)
    assert not work.exists()


def test_a_file_where_the_folder_should_be_is_no_obstacle(item: Exercise, work: Path) -> None:
    work.write_text("in the way")
    assert item.check(double) is double


@pytest.mark.parametrize("broken", ["{", "[]", '{"exercises": [1]}'])
def test_an_unreadable_file_is_set_aside(item: Exercise, work: Path, broken: str) -> None:
    work.mkdir()
    (work / "progress.json").write_text(broken)
    item.check(double)
    assert (work / "progress.1.json").read_text() == broken
    assert json.loads((work / "progress.json").read_text())["exercises"]["98.1"]["state"] == "right"


def test_the_statement_is_plain_and_rich(item: Exercise) -> None:
    assert repr(item) == "Exercise 98.1 · Doubling (easy, about 2 minutes)\n\nReturn $2x$."
    assert item._repr_markdown_().startswith("**Exercise 98.1 · Doubling**")


def test_names_survive_any_order_of_imports() -> None:
    import importlib

    import labkit.course

    for name in labkit.course.__all__:
        importlib.import_module(f"labkit.course.{labkit.course._HOME.get(name, name)}")
    assert all(callable(getattr(labkit.course, n)) for n in labkit.course.__all__ if n != "plot")
