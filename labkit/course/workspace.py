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
    return (_checkout() or Path.cwd()) / "work"


def notebooks() -> Path:
    """The course's own notebooks. Raises FileNotFoundError where labkit was installed without them."""
    if (folder := _checkout()) is not None:
        return folder / "notebooks"
    raise FileNotFoundError(
        f"the course's notebooks were found neither above {Path.cwd()} nor beside {_PACKAGE}; "
        "run this inside a clone of the project"
    )


def _checkout() -> Path | None:
    """The clone that the current folder lies in, else the one that labkit was imported from."""
    here = Path.cwd()
    for folder in (here, *here.parents, _PACKAGE.parent):
        if (folder / "notebooks").is_dir() and (folder / "labkit").is_dir():
            return folder
    return None
