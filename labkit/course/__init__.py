"""What a notebook needs beside the lab itself: exercises, claims, things to drag, a house style for figures.

Names are imported on first use, so that ``import labkit.course`` costs nothing on the command line.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labkit.course import plot
    from labkit.course.checkpoints import checkpoint
    from labkit.course.claims import claim, verdict
    from labkit.course.exercises import Exercise, exercise
    from labkit.course.progress_file import progress
    from labkit.course.self_check import Question, quiz
    from labkit.course.widget import explore

__all__ = [
    "Exercise",
    "Question",
    "checkpoint",
    "claim",
    "exercise",
    "explore",
    "plot",
    "progress",
    "quiz",
    "verdict",
]

# No module bears the name of something it offers: importing it would put the module in that name's place.
_HOME = {
    "Exercise": "exercises",
    "Question": "self_check",
    "checkpoint": "checkpoints",
    "claim": "claims",
    "exercise": "exercises",
    "explore": "widget",
    "progress": "progress_file",
    "quiz": "self_check",
    "verdict": "claims",
}


def __getattr__(name: str) -> Any:
    if name == "plot":
        return import_module("labkit.course.plot")
    if name not in _HOME:
        raise AttributeError(f"labkit.course has no {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f"labkit.course.{_HOME[name]}"), name)
