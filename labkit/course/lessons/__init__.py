"""One file a notebook: its exercises (EXERCISES), its self-check (QUIZ), and what it draws.

A lesson draws, asks and checks. The arithmetic is the package's own: an algorithm in a lesson is a defect.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType


def names() -> list[str]:
    """The lessons there are, in reading order: ``n00_start_here``, ``n01_number_formats``, ..."""
    return sorted(
        m.name for m in pkgutil.iter_modules(__path__) if m.name[:1] == "n" and m.name[1:3].isdigit()
    )


def lesson(number: str) -> ModuleType:
    """The lesson of notebook ``number``, for example ``"06"``.

    Raises KeyError naming the lessons there are.
    """
    for name in names():
        if name[1:3] == number:
            return import_module(f"{__name__}.{name}")
    raise KeyError(f"no lesson has the number {number!r}; there are {', '.join(n[1:3] for n in names())}")
