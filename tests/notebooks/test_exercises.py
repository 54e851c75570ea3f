"""Each exercise accepts its solution and honest variants, and refuses plausible mistakes by name.

Wrong answers and variants of notebook 06 lie in wrong/n06_gptq.py:

    WRONG = {"06.1": [(forgets_the_clamp, "clamp"), ...]}   # a function, words that the message must contain
    RIGHT = {"06.1": [looped, in_float64]}
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from labkit.course import Exercise, exercise
from labkit.course.lessons import lesson, names

HERE = Path(__file__).parent
EXERCISES: list[Exercise] = [e for name in names() for e in lesson(name[1:3]).EXERCISES]


def answers(number: str) -> ModuleType:
    (path,) = (HERE / "wrong").glob(f"n{number}_*.py")
    spec = importlib.util.spec_from_file_location(f"answers_{number}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cases(kind: str) -> list[Any]:
    """(id, function[, words]) of every WRONG or RIGHT table."""
    found = []
    for name in names():
        for id, entries in getattr(answers(name[1:3]), kind).items():
            for entry in entries:
                function, *words = entry if isinstance(entry, tuple) else (entry,)
                found.append(pytest.param(id, function, *words, id=f"{id}-{function.__name__}"))
    return found


@pytest.mark.parametrize("item", EXERCISES, ids=lambda e: e.id)
def test_the_solution_passes(item: Exercise) -> None:
    finding = item.examine(item.solution_function)
    assert finding.state == "right", finding.message


@pytest.mark.parametrize("item", EXERCISES, ids=lambda e: e.id)
def test_the_starter_counts_as_not_attempted(item: Exercise) -> None:
    scope: dict[str, Any] = {}
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
