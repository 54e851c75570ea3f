"""Where a learner's own things lie: ``work/`` beside the course's notebooks."""

from __future__ import annotations

from pathlib import Path

from labkit.settings import settings

_PACKAGE = Path(__file__).resolve().parents[1]


def work() -> Path:
    """The learner's folder: LABKIT_WORK, or ``work/`` of the checkout that the current folder or labkit is in.

    It need not exist yet.
    """
    chosen = settings().work
    if chosen is not None:
        return chosen
    here = Path.cwd()
    for folder in (here, *here.parents, _PACKAGE.parent):
        if (folder / "notebooks").is_dir() and (folder / "labkit").is_dir():
            return folder / "work"
    return here / "work"


def notebooks() -> Path:
    """The course's own notebooks. Raises FileNotFoundError where labkit was installed without them."""
    here = Path.cwd()
    for folder in (*(p for p in (here, *here.parents)), _PACKAGE.parent):
        if (folder / "notebooks").is_dir() and (folder / "labkit").is_dir():
            return folder / "notebooks"
    raise FileNotFoundError(
        f"the course's notebooks were found neither above {here} nor beside {_PACKAGE}; "
        "run this inside a clone of the project"
    )
