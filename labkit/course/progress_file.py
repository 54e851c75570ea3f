"""What a learner has done, kept in work/progress.json: private, whole, and never in the way."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from labkit.course.workspace import work
from labkit.files import whole_file

try:
    import fcntl
except ImportError:  # not POSIX: two notebooks that record at the same instant may lose one record
    fcntl = None  # type: ignore[assignment]


def read() -> dict[str, dict[str, Any]]:
    """What is kept, by exercise: state, attempts, hints, solution_seen. Empty where nothing is, or it
    cannot be read."""
    try:
        kept = json.loads((work() / "progress.json").read_text(encoding="utf-8"))["exercises"]
        return {str(k): dict(v) for k, v in kept.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def record(
    id: str, *, state: str | None = None, hints: int | None = None, solution_seen: bool = False
) -> None:
    """Keep what happened with exercise ``id``. On a read-only disk nothing is kept, and nothing is said.

    An exercise once right stays right.
    """
    try:
        folder = work()
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            _keep_unreadable(folder / "progress.json")
            everything = read()
            entry = everything.setdefault(
                id, {"state": "not yet", "attempts": 0, "hints": 0, "solution_seen": False}
            )
            if state is not None:
                entry["attempts"] = int(entry.get("attempts", 0)) + 1
                entry["state"] = "right" if "right" in (state, entry.get("state")) else state
            entry["hints"] = max(hints or 0, int(entry.get("hints", 0)))
            entry["solution_seen"] = solution_seen or bool(entry.get("solution_seen"))
            with whole_file(folder / "progress.json", mode=0o600) as part:
                part.write_text(
                    json.dumps({"version": 1, "exercises": everything}, indent=1, sort_keys=True) + "\n"
                )
    except (OSError, ValueError, TypeError):
        return


class Progress:
    """A table of every exercise and how far the learner is; what ``progress()`` shows."""

    def __init__(self) -> None:
        from labkit.course.lessons import lesson, names

        kept = read()
        self.rows = []
        for name in names():
            for exercise in getattr(lesson(name[1:3]), "EXERCISES", []):
                entry = kept.get(exercise.id, {})
                state = str(entry.get("state", "open"))
                self.rows.append(
                    (exercise.id, exercise.title, exercise.minutes, state, int(entry.get("hints", 0)))
                )

    @property
    def solved(self) -> int:
        return sum(row[3] == "right" for row in self.rows)

    def __repr__(self) -> str:
        width = max((len(row[1]) for row in self.rows), default=0)
        lines = [f"{self.solved} of {len(self.rows)} exercises solved"]
        for id, title, minutes, state, hints in self.rows:
            mark = "✓" if state == "right" else "·"
            seen = f", {hints} hint{'s' * (hints > 1)}" if hints else ""
            lines.append(f"{mark} {id}  {title:<{width}}  {minutes:>3} min  {state}{seen}")
        return "\n".join(lines)


def progress() -> Progress:
    """How far the learner is, exercise by exercise."""
    return Progress()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    handle = os.open(folder / ".progress.lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _keep_unreadable(path: Path) -> None:
    """A progress file that no longer parses is set aside under a number, never overwritten."""
    if not path.exists():
        return
    try:
        json.loads(path.read_text(encoding="utf-8"))["exercises"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        path.rename(numbered(path))


def numbered(path: Path) -> Path:
    """The first free ``name.1.ext``, ``name.2.ext``, ... beside ``path``."""
    number = 1
    while (free := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return free
