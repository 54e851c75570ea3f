"""The text that calibration and evaluation draw from: Moby Dick, by chapter."""

from __future__ import annotations

from dataclasses import dataclass

from labkit.files import data_path


@dataclass(frozen=True)
class Chapter:
    """One numbered chapter of the book: ``number`` from 1, its title, and its text without the heading."""

    number: int
    title: str
    text: str


def chapters() -> list[Chapter]:
    """The 135 chapters of Moby Dick in order; the etymology, extracts and epilogue are left out.

    Source and licence stand in ``data/texts/README.md``.
    """
    book = data_path("texts/moby_dick.txt").read_text(encoding="utf-8")
    found = []
    for part in book.removeprefix("=== ").split("\n=== "):
        heading, _, text = part.partition("\n")
        number, _, title = heading.partition(": ")
        if number.isdigit():
            found.append(Chapter(int(number), title, text.strip("\n")))
    return found
