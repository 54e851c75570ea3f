"""An exercise: a statement, a starter, a check that says what is wrong, up to three hints, a solution."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from IPython.display import display

from labkit.course import progress_file
from labkit.course.lessons import lesson
from labkit.course.sandbox import Finding, examine

Check = Callable[
    [Callable[..., Any]], str | None
]  # refuses by raising Wrong; a text is a remark on a right answer
LEVELS = {1: "easy", 2: "medium", 3: "hard"}


@dataclass
class Exercise:
    """One exercise of a lesson.

    id          notebook and number, "06.1"
    title       a few words
    difficulty  1 easy, 2 medium, 3 hard
    minutes     what it takes a person
    statement   Markdown: what to write, with the formula
    starter     the text of the notebook's starter cell: signature, shapes, one sentence, ``raise NotImplementedError``
    solution    a function that a learner can read on its own; its source is what ``.solution()`` shows
    check       calls the function it is given and raises ``check.Wrong`` where the answer is wrong
    hints       one to three, each a little closer
    seconds     how long all calls of one check may take together
    launch      for a kernel, which is not called: ``launch(kernel, *args)`` runs it on what the check hands over
    """

    id: str
    title: str
    difficulty: int
    minutes: int
    statement: str
    starter: str
    solution_function: Callable[..., Any]
    check_function: Check
    hints: tuple[str, ...] = ()
    seconds: float = 20.0
    launch: Callable[..., Any] | None = None
    _hints_shown: int = field(default=0, repr=False)

    def __init__(
        self,
        id: str,
        title: str,
        *,
        difficulty: int,
        minutes: int,
        statement: str,
        starter: str,
        solution: Callable[..., Any],
        check: Check,
        hints: tuple[str, ...] | list[str] = (),
        seconds: float = 20.0,
        launch: Callable[..., Any] | None = None,
    ) -> None:
        if difficulty not in LEVELS:
            raise ValueError(f"exercise {id}: difficulty must be one of {LEVELS}, found {difficulty!r}")
        if not 1 <= len(hints) <= 3:
            raise ValueError(f"exercise {id}: expected one to three hints, found {len(hints)}")
        self.id, self.title, self.difficulty, self.minutes = id, title, difficulty, minutes
        self.statement = inspect.cleandoc(statement)
        self.starter = textwrap.dedent(starter).strip()
        self.solution_function, self.check_function = solution, check
        self.hints = tuple(inspect.cleandoc(h) for h in hints)
        self.seconds, self.launch, self._hints_shown = seconds, launch, 0

    def examine(self, function: Callable[..., Any]) -> Finding:
        """What the check finds, without printing and without keeping it. Never raises for what a learner wrote."""
        return examine(self.check_function, function, seconds=self.seconds, launch=self.launch)

    def check(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Check ``function``, say what was found, and give back the function that the next cells run.

        That is the learner's own where it is right, labkit's solution where it is not or was not attempted.
        """
        finding = self.examine(function)
        if finding.state != "not attempted":
            progress_file.record(self.id, state=finding.state)
        print(self.report(finding))
        if finding.figure is not None:
            display(finding.figure)
        return function if finding.state == "right" else self.solution_function

    def report(self, finding: Finding) -> str:
        """What ``check`` prints."""
        head = f"Exercise {self.id} · {self.title}: {finding.state}"
        if finding.state == "not attempted":
            return f"{head} yet. The next cells run labkit's solution."
        printed = textwrap.indent(finding.printed, "  | ")
        lines = (
            [f"{head}."]
            if finding.state == "not yet"
            else [
                f"{head}{finding.message and f', but {finding.message}'}. The next cells run your function."
            ]
        )
        if finding.state == "not yet":
            lines.append(textwrap.indent(finding.message, "  "))
            if finding.given:
                lines.append(f"  It was given {finding.given}.")
        if printed:
            lines.append(f"  It printed:\n{printed}")
        if finding.state == "not yet":
            lines.append(f'The next cells run labkit\'s solution. A hint: exercise("{self.id}").hint()')
        return "\n".join(lines)

    def hint(self) -> None:
        """Print the next hint, one a call; after the last one, say so."""
        if self._hints_shown == len(self.hints):
            print(f'That was the last hint. exercise("{self.id}").solution() shows one way to do it.')
            return
        self._hints_shown += 1
        progress_file.record(self.id, hints=self._hints_shown)
        print(f"Hint {self._hints_shown} of {len(self.hints)}: {self.hints[self._hints_shown - 1]}")

    def solution(self) -> None:
        """Print the source of a solution."""
        progress_file.record(self.id, solution_seen=True)
        print(textwrap.dedent(inspect.getsource(_plain(self.solution_function))).rstrip())

    def _head(self) -> tuple[str, str]:
        return (
            f"Exercise {self.id} · {self.title}",
            f"{LEVELS[self.difficulty]}, about {self.minutes} minutes",
        )

    def __repr__(self) -> str:
        title, effort = self._head()
        return f"{title} ({effort})\n\n{self.statement}"

    def _repr_markdown_(self) -> str:
        title, effort = self._head()
        dots = "●" * self.difficulty + "○" * (3 - self.difficulty)
        return f"**{title}**  \n{dots} {effort}\n\n{self.statement}"


def _plain(function: Any) -> Callable[..., Any]:
    """The Python function of a kernel; any other function as it is."""
    plain: Callable[..., Any] = getattr(function, "fn", function)
    return plain


def exercise(id: str) -> Exercise:
    """The exercise ``id`` ("06.1"). As the last line of a cell it shows its statement.

    Raises KeyError naming the exercises there are.
    """
    number = str(id).partition(".")[0]
    found = {e.id: e for e in lesson(number).EXERCISES}
    if id not in found:
        raise KeyError(f"notebook {number} has no exercise {id!r}; there are {', '.join(found)}")
    return found[id]
