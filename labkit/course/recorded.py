"""Steps of a notebook that need a cluster or an image: run where there is one, else shown as they last went.

    lab = Steps("21", connect, versions)      # says in a line which of the two it is

    def nodes(ray):
        return len(ray.list("Node"))

    lab.step(nodes)                           # called with what ``connect`` gave, or read from data/recorded/21.json

What a step returns goes through JSON in both cases, so the next cells cannot tell one from the other.
``LABKIT_LIVE=1`` insists on a real run, 0 on the stored one; ``LABKIT_RECORD=1`` keeps a real run.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from typing import Any, Generic, TypeVar

from IPython.display import display

from labkit.files import data_path, whole_file

T = TypeVar("T")


class Steps(Generic[T]):
    """The live steps of one notebook.

    number    the notebook's, "21"
    connect   gives what the steps are called with; raises RuntimeError that says why there is none
    versions  of what it gave, name to version: stored beside the results

    live      whether they really run; ``seconds`` says how long each took, here or when it was recorded
    """

    def __init__(
        self, number: str, connect: Callable[[], T], versions: Callable[[T], Mapping[str, str]]
    ) -> None:
        self.number, self._versions = number, versions
        self.seconds: dict[str, float] = {}
        self._made: dict[str, Any] = {}
        self._target: list[T] = []
        try:
            if os.environ.get("LABKIT_LIVE") == "0":
                raise RuntimeError("LABKIT_LIVE=0")
            self._target.append(connect())
        except RuntimeError as error:
            if os.environ.get("LABKIT_LIVE") == "1" or _records():
                raise
            self._why = " ".join(str(error).split())
        self._say()

    @property
    def live(self) -> bool:
        return bool(self._target)

    @property
    def target(self) -> T:
        """What the steps are called with. Raises RuntimeError where nothing runs."""
        if not self.live:
            raise RuntimeError(f"nothing runs here, results are recorded: {self._why}")
        return self._target[0]

    def step(self, function: Callable[[T], Any]) -> Any:
        """What ``function`` returns, as JSON gives it back; stored under its name."""
        name = function.__name__
        if not self.live:
            if name not in self._stored["steps"]:
                raise KeyError(
                    f"data/recorded/{self.number}.json has no step {name!r}, it has "
                    f"{', '.join(self._stored['steps'])}; record it anew with LABKIT_RECORD=1"
                )
            entry = self._stored["steps"][name]
        else:
            began = time.monotonic()
            result = json.loads(json.dumps(function(self.target)))
            entry = {"seconds": round(time.monotonic() - began, 2), "result": result}
            self._made[name] = entry
        self.seconds[name] = entry["seconds"]
        return entry["result"]

    def close(self) -> None:
        """The end of the notebook; where it is to be kept, this is where the file is written."""
        if not (self.live and _records()):
            return
        record = {
            "what": f"what the live steps of notebook {self.number} gave",
            "command": f"LABKIT_RECORD=1 .venv/bin/labkit course publish notebooks/{self.number}_*.ipynb",
            "date": datetime.now(UTC).date().isoformat(),
            "versions": {**self._versions(self.target), "labkit": metadata.version("labkit")},
            "steps": self._made,
        }
        with whole_file(data_path("recorded") / f"{self.number}.json") as part:
            part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @cached_property
    def _stored(self) -> dict[str, Any]:
        stored: dict[str, Any] = json.loads(
            data_path(f"recorded/{self.number}.json").read_text(encoding="utf-8")
        )
        return stored

    def _say(self) -> None:
        if self.live:
            line = "**Live**: the steps below run, with " + _listed(self._versions(self.target))
        else:
            with_ = _listed(self._stored["versions"])
            line = f"**Recorded on {self._stored['date']}** with {with_}. Nothing runs here: {self._why}"
        # Without plain text: the stored and the new line differ, and are not compared.
        display({"text/markdown": line.rstrip(".") + "."}, raw=True)


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _records() -> bool:
    return os.environ.get("LABKIT_RECORD") == "1"
