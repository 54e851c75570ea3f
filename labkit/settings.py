"""What a person can set from outside, read from the environment at each call."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Settings:
    """The lab's settings.

    model         LABKIT_MODEL: which model ``load()`` takes: a name, a folder or ``org/name`` of a hub
    cache         LABKIT_CACHE: where converted models and checkpoints are kept
    shared_cache  LABKIT_SHARED_CACHE: a read-only cache that is looked up first (a hub's), or None
    offline       LABKIT_OFFLINE: never ask the network
    progress      LABKIT_PROGRESS: progress bars; 0 switches them off
    node          LABKIT_NODE: the folder of the test node that cluster/node makes; default: in the cache
    work          LABKIT_WORK: the learner's folder, where it is not ``work/`` of the checkout (a hub), or None
    """

    model: str
    cache: Path
    shared_cache: Path | None
    offline: bool
    progress: bool
    node: Path
    work: Path | None = None


def settings() -> Settings:
    """The settings as the environment has them now.

    Raises ValueError when a switch is neither 0 nor 1.
    """
    shared = os.environ.get("LABKIT_SHARED_CACHE")
    cache = Path(os.environ.get("LABKIT_CACHE") or platformdirs.user_cache_path("labkit"))
    return Settings(
        model=os.environ.get("LABKIT_MODEL") or DEFAULT_MODEL,
        cache=cache,
        shared_cache=Path(shared) if shared else None,
        offline=_switch("LABKIT_OFFLINE", default=False),
        progress=_switch("LABKIT_PROGRESS", default=True),
        node=Path(os.environ.get("LABKIT_NODE") or cache / "node"),
        work=Path(os.environ["LABKIT_WORK"]) if os.environ.get("LABKIT_WORK") else None,
    )


def _switch(name: str, *, default: bool) -> bool:
    value = os.environ.get(name, "")
    if value == "":
        return default
    if value not in ("0", "1"):
        raise ValueError(f"{name} must be 0 or 1, found {value!r}; set it to one of them or unset it")
    return value == "1"
