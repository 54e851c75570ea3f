"""The watcher, with stand-ins for Ray's processes: its owner is killed, and what belongs to the owner goes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from server import alive, until

from labkit.cluster.watch import GRACE_S, MARKER, end

SLEEP = "import time; time.sleep(600)"
# Starts a watcher as ray_session does, says its number, and waits. With "fork" there is a child that
# holds the watcher's pipe open.
OWNER = """
import os, sys, time
from labkit.cluster import local
watcher = local._watcher(sys.argv[1])
child = os.fork() if "fork" in sys.argv else None
if child != 0:
    print([watcher.pid, child or watcher.pid], flush=True)
time.sleep(600)
"""
TITLED = "import sys, time; held = open(sys.argv[1], 'w'); print(flush=True); time.sleep(600)"


class Family:
    """Stand-ins: of the Ray in ``folder``, and of a stranger's in a folder whose name begins alike."""

    def __init__(self, base: Path) -> None:
        self.folder, self.other = base / "lk-1", base / "lk-12"
        self.all: list[subprocess.Popen[bytes]] = []
        self.ours = [*self._members(self.folder)]
        self.strangers = [*self._members(self.other), self._start([sys.executable, "-c", SLEEP])]

    def _members(self, folder: Path) -> Iterator[psutil.Process]:
        folder.mkdir()
        mother = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]], env={})"
        marked = self._start([sys.executable, "-c", mother, SLEEP], marker=str(folder))
        until(lambda: len(marked.children()) == 1, 20)
        yield from (marked, *marked.children())
        # An agent of Ray's has no environment left, only a title.
        yield self._start(["ray::Agent", "-c", TITLED, str(folder / "log")], wait=True)

    def _start(self, command: list[str], *, marker: str = "", wait: bool = False) -> psutil.Process:
        environment = {**os.environ, **({MARKER: marker} if marker else {})}
        started = subprocess.Popen(
            command, executable=sys.executable, env=environment, stdout=subprocess.PIPE
        )
        self.all.append(started)
        if wait:
            assert started.stdout is not None
            started.stdout.readline()
        return psutil.Process(started.pid)


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    found = Family(tmp_path)
    yield found
    for process in [*found.ours, *found.strangers]:
        if alive(process):
            process.kill()
    for started in found.all:
        started.wait()


@pytest.mark.needs("linux")
@pytest.mark.parametrize("option", ["", "fork"])
def test_a_killed_owner_leaves_nothing(family: Family, option: str) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(family.folder), option], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    watcher, child = (psutil.Process(pid) for pid in json.loads(owner.stdout.readline()))
    try:
        until(lambda: "labkit.cluster.watch" in watcher.cmdline(), 20)
        for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            until(lambda ignored=ignored: ignores(watcher, ignored), 20)  # type: ignore[misc]
            watcher.send_signal(ignored)  # as a Ctrl-C or a closed terminal would
        time.sleep(GRACE_S + 1)  # it waits, and does not begin with what it is there for
        assert all(map(alive, [watcher, *family.ours, *family.strangers])) and family.folder.exists()
        owner.kill()
        owner.wait()
        until(lambda: not alive(watcher), 30)
        assert not any(map(alive, family.ours)) and all(map(alive, family.strangers))
        assert not family.folder.exists() and family.other.exists()
    finally:
        for process in (watcher, child):
            if alive(process):
                process.kill()


def ignores(process: psutil.Process, number: signal.Signals) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigIgn"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.needs("linux")
def test_those_that_end_by_themselves_are_left_to_it(family: Family) -> None:
    first = family.all[0]
    end(str(family.folder), grace=0)
    assert first.wait(10) == -signal.SIGKILL and not any(map(alive, family.ours))
    gentle = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(1)"], env={**os.environ, MARKER: str(family.folder)}
    )
    end(str(family.folder), grace=20)
    assert gentle.wait(10) == 0
