"""Each exercise accepts its solution and honest variants, and refuses plausible mistakes by name.

Wrong answers and variants of notebook 06 lie in wrong/n06_gptq.py:

    WRONG = {"06.1": [(forgets_the_clamp, "clamp"), ...]}   # a function, words that the message must contain
    RIGHT = {"06.1": [looped, in_float64]}
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from labkit.course import Exercise, exercise
from labkit.course.lessons import lesson, names

HERE = Path(__file__).parent


def answers(number: str) -> ModuleType:
    """The WRONG and RIGHT tables of one notebook."""
    paths = list((HERE / "wrong").glob(f"n{number}_*.py"))
    assert len(paths) == 1, f"expected one tests/notebooks/wrong/n{number}_*.py, found {len(paths)}"
    spec = importlib.util.spec_from_file_location(f"answers_{number}", paths[0])
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def each_lesson(read: Callable[[str], list[Any]]) -> list[Any]:
    """``read`` of every lesson; one that does not load fails in a test of its own instead of stopping the others."""
    found: list[Any] = []
    for name in names():
        with contextlib.suppress(Exception):
            found += read(name[1:3])
    return found


EXERCISES: list[Exercise] = each_lesson(lambda number: lesson(number).EXERCISES)


def cases(kind: str) -> list[Any]:
    """(id, function[, words]) of every WRONG or RIGHT table."""

    def read(number: str) -> list[Any]:
        found = []
        for id, entries in getattr(answers(number), kind).items():
            for entry in entries:
                function, *words = entry if isinstance(entry, tuple) else (entry,)
                found.append(pytest.param(id, function, *words, id=f"{id}-{function.__name__}"))
        return found

    return each_lesson(read)


@pytest.mark.parametrize("name", names())
def test_lesson_and_answers_load(name: str) -> None:
    asked = {e.id for e in lesson(name[1:3]).EXERCISES}
    table = answers(name[1:3])
    assert asked == set(table.WRONG) == set(table.RIGHT)
    assert all(id[:3] == f"{name[1:3]}." for id in asked)


@pytest.mark.parametrize("item", EXERCISES, ids=lambda e: e.id)
def test_the_solution_passes(item: Exercise) -> None:
    finding = item.examine(item.solution_function)
    assert finding.state == "right", finding.message


@pytest.mark.parametrize("item", EXERCISES, ids=lambda e: e.id)
def test_the_starter_counts_as_not_attempted(item: Exercise) -> None:
    scope = {
        k: v for k, v in vars(lesson(item.id[:2])).items() if k in ("triton", "tl")
    }  # what decorators need
    exec("from __future__ import annotations\n" + item.starter, scope)
    made = [
        v for k, v in scope.items() if callable(v) and k not in ("__builtins__",) and k.startswith("my_")
    ]
    assert len(made) == 1, "the starter defines one function (or class) whose name begins with my_"
    assert item.examine(made[0]).state == "not attempted"


@pytest.mark.parametrize(("id", "function"), cases("RIGHT"))
def test_an_honest_variant_passes(id: str, function: Callable[..., Any]) -> None:
    finding = exercise(id).examine(function)
    assert finding.state == "right", finding.message


@pytest.mark.parametrize(("id", "function", "words"), cases("WRONG"))
def test_a_wrong_answer_is_refused_by_name(id: str, function: Callable[..., Any], words: str) -> None:
    finding = exercise(id).examine(function)
    assert finding.state == "not yet", f"{function.__name__} was accepted"
    assert words in finding.message, f"{finding.message!r} does not say {words!r}"


@pytest.mark.parametrize("item", EXERCISES, ids=lambda e: e.id)
def test_there_are_answers_enough(item: Exercise) -> None:
    table = answers(item.id[:2])
    assert len(table.WRONG.get(item.id, [])) >= 3, "at least three plausible wrong answers"
    assert len(table.RIGHT.get(item.id, [])) >= 1, "at least one honest variant"


@pytest.mark.parametrize("item", EXERCISES, ids=lambda e: e.id)
def test_the_solution_explains_itself(
    item: Exercise, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    item.solution()
    source = capsys.readouterr().out
    assert source.startswith(("def ", "class ", "@"))
    assert "NotImplementedError" not in source


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "looped_update",
            "right, but it loops over rows: use error[:, None] * hinv_row. The next cells run your",
        ),
        ("row_by_row", "right, but it loops over rows"),
        ("column_by_column", "right, but it loops over columns"),
        ("in_place_update", "right. The next cells run your function."),
    ],
)
def test_a_column_update_that_loops_is_right_and_told_so(name: str, said: str) -> None:
    item, function = exercise("06.2"), getattr(answers("06"), name)
    assert said in item.report(item.examine(function))
    assert ("loops" in lesson("06").why_slow(function)) == ("loops" in said)
