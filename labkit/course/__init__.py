"""What a notebook needs beside the lab itself: exercises, claims, things to drag, a house style for figures.

Names are imported on first use, so that ``import labkit.course`` costs nothing on the command line.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labkit.course import plot
    from labkit.course.checkpoint import checkpoint
    from labkit.course.claims import claim, verdict
    from labkit.course.exercise import Exercise, exercise
    from labkit.course.explore import explore
    from labkit.course.progress import progress
    from labkit.course.quiz import Question, quiz

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

_HOME = {
    "Exercise": "exercise",
    "Question": "quiz",
    "claim": "claims",
    "verdict": "claims",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"labkit.course has no {name!r}; it offers {', '.join(__all__)}")
    module = import_module(f"labkit.course.{_HOME.get(name, name)}")
    value = module if name == "plot" else getattr(module, name)
    globals()[name] = value  # also wins over the submodule of the same name
    return value
