"""The learner's own copies of the notebooks, in work/notebooks: made, renewed after an update, made afresh.

A copy whose cells the learner changed is never written over. What is replaced is kept under a number first.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from labkit.course.progress_file import numbered
from labkit.course.workspace import notebooks, work
from labkit.files import whole_file


@dataclass
class Refreshed:
    """What a refresh did, by notebook name."""

    new: list[str] = field(default_factory=list)
    renewed: list[str] = field(default_factory=list)
    left: list[str] = field(
        default_factory=list
    )  # the learner's own changes, and the course has a newer version
    kept: list[str] = field(default_factory=list)  # nothing to do


def numbers() -> list[str]:
    """The notebooks there are: ``["00", "01", ...]``."""
    return [path.name[:2] for path in _originals()]


def refresh() -> Refreshed:
    """Copy notebooks that are new, renew copies that the learner never changed, leave the others and name them.

    Running cells changes outputs only, so it counts as unchanged; what a renewed copy held is kept if it
    differs at all.
    """
    done = Refreshed()
    made_from = _read_record()
    for original in _originals():
        copy = _copy_of(original)
        name = original.stem
        if not copy.exists():
            _write(original, copy)
            done.new.append(name)
        elif _sources(copy) == _sources(original):
            done.kept.append(name)
        elif made_from.get(copy.name) != _sources(copy):
            # Changed by the learner. Only worth naming where the course moved on since the copy was made.
            moved_on = made_from.get(copy.name) != _sources(original)
            (done.left if moved_on else done.kept).append(name)
            continue
        else:
            _set_aside(copy)
            _write(original, copy)
            done.renewed.append(name)
        made_from[copy.name] = _sources(original)
    _write_record(made_from)
    return done


def reset(number: str) -> tuple[Path, Path | None]:
    """Make a fresh copy of notebook ``number``; gives back the copy and where the old one is kept, if there was one."""
    original = find(number)
    copy = _copy_of(original)
    kept = _set_aside(copy) if copy.exists() else None
    _write(original, copy)
    _write_record(_read_record() | {copy.name: _sources(original)})
    return copy, kept


def ready(number: str) -> Path:
    """The learner's copy of notebook ``number``, made if it is missing."""
    copy = _copy_of(find(number))
    return copy if copy.exists() else reset(number)[0]


def find(number: str) -> Path:
    """The course's own notebook for "6", "06" or "06_gptq". Raises KeyError naming those there are."""
    wanted = number.removesuffix(".ipynb")
    wanted = wanted.zfill(2) if wanted.isdigit() else wanted
    for path in _originals():
        if path.stem == wanted or path.name[:2] == wanted:
            return path
    raise KeyError(f"there is no notebook {number!r}; there are {', '.join(p.stem for p in _originals())}")


def _originals() -> list[Path]:
    return sorted(notebooks().glob("[0-9][0-9]_*.ipynb"))


def _copy_of(original: Path) -> Path:
    return work() / "notebooks" / original.name


def _write(original: Path, copy: Path) -> None:
    with whole_file(copy) as part:
        part.write_bytes(original.read_bytes())


def _set_aside(copy: Path) -> Path:
    kept = numbered(copy)
    copy.rename(kept)
    return kept


def _sources(path: Path) -> str:
    """What the cells say, without outputs: a learner's change is a change of this. An unreadable file
    counts as changed."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        said = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    except (ValueError, KeyError, TypeError):
        return "unreadable " + hashlib.sha256(path.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _record() -> Path:
    return work() / "notebooks" / ".copies.json"


def _read_record() -> dict[str, str]:
    try:
        return {str(k): str(v) for k, v in json.loads(_record().read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _write_record(made_from: dict[str, str]) -> None:
    with whole_file(_record()) as part:
        part.write_text(json.dumps(made_from, indent=1, sort_keys=True) + "\n", encoding="utf-8")
