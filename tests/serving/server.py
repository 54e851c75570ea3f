"""One ``labkit serve``, all that it started, and what is left of it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

LABKIT = [sys.executable, "-m", "labkit.cli"]
READY_S = 300
GONE_S = 60
# A parent that is no shell: it starts the server, says which process that is, and waits.
PARENT = """
import subprocess, sys
server = subprocess.Popen(sys.argv[1:])
print(server.pid, file=sys.stderr, flush=True)
server.wait()
"""


class Started:
    """A command in a session of its own, as a terminal gives every job, and its output in files."""

    def __init__(self, folder: Path, command: list[str], *, by_a_parent: bool = False) -> None:
        folder.mkdir()
        self.out, self.err = folder / "out", folder / "err"
        if by_a_parent:
            command = [sys.executable, "-c", PARENT, *command]
        with self.out.open("w") as out, self.err.open("w") as err:
            self.started = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
        self.by_a_parent = by_a_parent

    @property
    def process(self) -> psutil.Process:
        """The one that was asked for, not its parent."""
        if not self.by_a_parent:
            return psutil.Process(self.started.pid)
        until(lambda: self.err.read_text().count("\n") > 0, READY_S)
        return psutil.Process(int(self.err.read_text().split()[0]))

    def wait_until_ready(self) -> None:
        until(lambda: self.out.read_text() != "" or self.started.poll() is not None, READY_S)
        assert self.started.poll() is None, self.err.read_text()

    def clean_up(self) -> None:
        if self.started.poll() is None:
            self.started.kill()
        self.started.wait()


class Server(Started):
    """``labkit serve`` with these options."""

    def __init__(self, folder: Path, *options: str, by_a_parent: bool = False) -> None:
        super().__init__(folder, [*LABKIT, "serve", "--threads", "1", *options], by_a_parent=by_a_parent)
        self.tree: list[psutil.Process] = []
        self.folder = Path()

    def wait_until_ready(self) -> None:
        super().wait_until_ready()
        self.look()

    def look(self) -> None:
        """Note every process of this server that is there now, and its folder."""
        self.tree = [self.process, *self.process.children(recursive=True)]
        [watcher] = [process for process in self.tree if "labkit.cluster.watch" in process.cmdline()]
        self.folder = Path(watcher.cmdline()[-1])

    @property
    def url(self) -> str:
        word, url = self.out.read_text().split()
        assert word == "ready" and self.out.read_text() == f"ready {url}\n"
        return url

    def answers(self) -> bool:
        ask = {"model": "tiny", "prompt": "Call me", "max_tokens": 4}
        return httpx.post(f"{self.url}/completions", json=ask, timeout=60).status_code == 200

    def left(self) -> list[str]:
        """What there still is of it: processes, folder, port."""
        found = [f"process {process.pid} {process}" for process in self.tree if alive(process)]
        if self.folder.exists():
            found.append(str(self.folder))
        if self.out.read_text():
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", httpx.URL(self.url).port or 0)) == 0:
                    found.append("port")
        return found

    def is_gone(self) -> None:
        assert self.tree
        until(lambda: self.left() == [], GONE_S, lambda: f"left behind: {self.left()}")

    def clean_up(self) -> None:
        for process in self.tree:
            if alive(process):
                process.kill()
        if self.tree:  # the watcher was among them
            shutil.rmtree(self.folder, ignore_errors=True)
        super().clean_up()


def alive(process: psutil.Process) -> bool:
    """A number that was given to a new process does not count, nor does a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def everything() -> set[int]:
    """Every process of this namespace; where there is no namespace, this test's own family."""
    if os.environ.get("LABKIT_TEST_NAMESPACE") == "1":
        return {process.pid for process in psutil.process_iter() if alive(process)}
    return {process.pid for process in psutil.Process().children(recursive=True)}


def until(condition: Callable[[], bool], seconds: float, why: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, why() or "it did not come about in time"
        time.sleep(0.1)
