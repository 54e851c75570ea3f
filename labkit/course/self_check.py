"""The self-check at a notebook's end: read the question, pick an answer, see why.

A front end shows each answer as something to click; it opens without a kernel, also on GitHub's and the book's pages.
Plain text shows questions and answers, and ``quiz("06").answer(1, "b")`` says whether b is right.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass

from labkit.course.lessons import lesson


@dataclass(frozen=True)
class Question:
    """One question. ``options`` maps each answer to why it is right or wrong; ``answer`` is the right one's letter."""

    text: str
    options: Mapping[str, str]
    answer: str

    def __post_init__(self) -> None:
        if self.answer not in self.letters:
            raise ValueError(
                f"the answer must be one of {self.letters}, found {self.answer!r}: {self.text}"
            )

    @property
    def letters(self) -> str:
        return "abcdefgh"[: len(self.options)]

    def lines(self) -> list[tuple[str, str, str]]:
        """(letter, answer, why) for each option."""
        return [(letter, *pair) for letter, pair in zip(self.letters, self.options.items(), strict=True)]


class Quiz:
    """The questions of one notebook; as the last line of a cell it shows them."""

    def __init__(self, number: str, questions: list[Question]) -> None:
        self.number, self.questions = number, questions

    def answer(self, question: int, letter: str) -> None:
        """Print whether ``letter`` answers question ``question`` (counted from 1), and why."""
        if not 1 <= question <= len(self.questions):
            raise ValueError(f"there are questions 1 to {len(self.questions)}, found {question!r}")
        asked = self.questions[question - 1]
        for own, _, why in asked.lines():
            if own == letter.strip().lower():
                print(f"{question}{own}: {'right' if own == asked.answer else 'no'}. {why}")
                return
        raise ValueError(
            f"question {question} has the answers {', '.join(asked.letters)}, found {letter!r}"
        )

    def __repr__(self) -> str:
        lines = []
        for i, question in enumerate(self.questions, 1):
            lines.append(f"{i}. {question.text}")
            lines += [f"   {letter}) {text}" for letter, text, _ in question.lines()]
        lines.append(f'Your answer: quiz("{self.number}").answer(1, "a")')
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = []
        for i, question in enumerate(self.questions, 1):
            parts.append(f"<p><b>{i}.</b> {_inline(question.text)}</p>")
            for letter, text, why in question.lines():
                mark = "✓ Right." if letter == question.answer else "✗ No."
                parts.append(
                    f"<details><summary>{letter}) {_inline(text)}</summary>"
                    f"<p>{mark} {_inline(why)}</p></details>"
                )
        return "<div>" + "".join(parts) + "<p>Click an answer to see whether it is right.</p></div>"


def quiz(number: str) -> Quiz:
    """The self-check of notebook ``number`` ("06")."""
    return Quiz(number, list(lesson(number).QUIZ))


def _inline(text: str) -> str:
    """Backquoted words as code; the rest as plain text."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
