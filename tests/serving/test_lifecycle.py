"""``labkit serve`` as a person meets it: it says when it is ready, minds its errors, and leaves nothing
behind.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

LABKIT = [sys.executable, "-m", "labkit.cli"]
READY_S = 240
GONE_S = 30
# A parent that is no shell: it starts the server, says which process that is, and waits.
PARENT = """
import subprocess, sys
server = subprocess.Popen(sys.argv[1:])
print(server.pid, file=sys.stderr, flush=True)
server.wait()
"""


class Server:
    """One ``labkit serve`` and everything that it started."""

    def __init__(self, folder: Path, *options: str, by_a_parent: bool = False) -> None:
        self.out, self.err = folder / "out", folder / "err"
        command = [*LABKIT, "serve", "--checkpoint", "tiny", "--threads", "1", *options]
        if by_a_parent:
            command = [sys.executable, "-c", PARENT, *command]
        with self.out.open("w") as out, self.err.open("w") as err:
            # A process group of its own, as a shell gives every job.
            self.started = subprocess.Popen(command, stdout=out, stderr=err, start_new_session=True)
        self.by_a_parent = by_a_parent
        self.tree: dict[int, psutil.Process] = {}

    @property
    def pid(self) -> int:
        return int(self.err.read_text().split()[0]) if self.by_a_parent else self.started.pid

    def wait_until_ready(self) -> None:
        until(lambda: self.out.read_text() != "" or self.started.poll() is not None, READY_S)
        assert self.started.poll() is None, self.err.read_text()
        self.look()

    def look(self) -> None:
        """Note every process of this server that is there now."""
        root = psutil.Process(self.pid)
        self.tree = {process.pid: process for process in [root, *root.children(recursive=True)]}
        [self.folder] = [
            process.cmdline()[-1]
            for process in self.tree.values()
            if "labkit.cluster.watch" in process.cmdline()
        ]

    @property
    def url(self) -> str:
        word, url = self.out.read_text().split()
        assert word == "ready" and self.out.read_text() == f"ready {url}\n"
        return url

    def answers(self) -> bool:
        ask = {"model": "tiny", "prompt": "Call me", "max_tokens": 4}
        return httpx.post(f"{self.url}/completions", json=ask, timeout=60).status_code == 200

    def left(self) -> list[str]:
        """What there still is of it: processes (a number given to a new process does not count), folder,
        port.
        """
        found = [f"process {p.pid} {p.cmdline()}" for p in self.tree.values() if alive(p)]
        if Path(self.folder).exists():
            found.append(self.folder)
        if self.out.read_text():
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", httpx.URL(self.url).port or 0)) == 0:
                    found.append("port")
        return found

    def is_gone(self) -> None:
        until(lambda: self.left() == [], GONE_S, lambda: f"left behind: {self.left()}")

    def clean_up(self) -> None:
        for process in self.tree.values():
            if alive(process):
                process.kill()
        if self.started.poll() is None:
            self.started.kill()
        self.started.wait()


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(condition: Callable[[], bool], seconds: float, why: Callable[[], str] = lambda: "") -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, why() or "it did not come about in time"
        time.sleep(0.1)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(*options: str, by_a_parent: bool = False) -> Server:
        folder = tmp_path / str(len(servers))
        folder.mkdir()
        servers.append(Server(folder, *options, by_a_parent=by_a_parent))
        return servers[-1]

    yield make
    for server in servers:
        server.clean_up()


def everything() -> set[int]:
    """Every process in this namespace that is not a zombie; where there is no namespace, this test's own
    family.
    """
    if os.environ.get("LABKIT_TEST_NAMESPACE") == "1":
        return {process.pid for process in psutil.process_iter() if alive(process)}
    return {process.pid for process in psutil.Process().children(recursive=True)}


@pytest.mark.needs("linux")
def test_side_by_side_and_however_they_end(start: Callable[..., Server]) -> None:
    """Two people's servers on one machine; each end leaves the other alone and nothing behind."""
    before = everything()
    killed = start()
    killed.wait_until_ready()  # one after the other: a busy machine starts two slower than one twice
    orphan = start(by_a_parent=True)
    orphan.wait_until_ready()
    assert killed.url != orphan.url and killed.folder != orphan.folder
    assert not set(killed.tree) & set(orphan.tree)
    assert len(killed.folder) < 30 and Path(killed.folder).stat().st_mode & 0o077 == 0
    assert len(killed.tree) > 5  # raylet, GCS, controller, proxy, replica: the tree was really looked at
    assert killed.answers() and orphan.answers()

    os.kill(killed.pid, signal.SIGKILL)
    killed.started.wait()
    killed.is_gone()
    assert orphan.answers()

    third = start()  # its Ray is still starting when the other one's parent dies
    until(
        lambda: "raylet" in str([p.name() for p in psutil.Process(third.pid).children(recursive=True)]),
        READY_S,
    )
    third.look()
    orphan.started.kill()  # the parent, without a word
    orphan.started.wait()
    orphan.is_gone()

    third.wait_until_ready()
    assert third.answers()
    os.killpg(third.pid, signal.SIGINT)  # a Ctrl-C reaches the whole process group
    assert third.started.wait(60) == 0
    third.is_gone()
    assert everything() <= before


@pytest.mark.needs("linux")
def test_sigterm_while_ray_is_starting(start: Callable[..., Server]) -> None:
    before = everything()
    server = start()
    until(lambda: len(psutil.Process(server.pid).children()) > 2, READY_S)
    server.look()
    os.kill(server.pid, signal.SIGTERM)
    assert server.started.wait(90) == 0
    server.is_gone()
    assert server.out.read_text() == ""
    assert everything() <= before


def refused(*options: str) -> str:
    """What ``labkit serve`` says when it refuses before Ray starts."""
    folders = set(Path("/tmp").glob("lk-*"))
    done = subprocess.run([*LABKIT, "serve", *options], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and done.stdout == ""
    assert set(Path("/tmp").glob("lk-*")) == folders
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_port_in_use_is_said_before_ray_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 cannot be used" in refused(
            "--checkpoint", "tiny", "--port", str(port)
        )


def test_a_missing_checkpoint_is_said_before_ray_starts(tmp_path: Path) -> None:
    assert "is not a folder" in refused("--checkpoint", str(tmp_path / "none"))
    assert "no config.json" in refused("--checkpoint", str(tmp_path))
