"""``labkit serve`` as a person meets it: it says when it is ready, minds its errors, and leaves nothing
behind.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from server import LABKIT, READY_S, Server, everything, until

# What Ray does where the machine is too busy to get a raylet up in the 30 s that it has.
BUSY = """
import sys, ray._private.node
from labkit import cli
class Node:
    def __init__(self, *args, **options):
        raise Exception("The current node timed out during startup.")
ray._private.node.Node = Node
sys.argv[1:] = ["serve", "--checkpoint", "tiny"]
cli.main()
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(*, by_a_parent: bool = False) -> Server:
        folder = tmp_path / str(len(servers))
        servers.append(Server(folder, "--checkpoint", "tiny", by_a_parent=by_a_parent))
        return servers[-1]

    yield make
    for server in servers:
        server.clean_up()


@pytest.mark.needs("linux")
def test_side_by_side_and_killed(start: Callable[..., Server]) -> None:
    """Two servers on one machine: each end leaves the other alone and nothing behind."""
    before = everything()
    killed, orphan = start(), start(by_a_parent=True)
    killed.wait_until_ready()
    orphan.wait_until_ready()
    assert killed.url != orphan.url and killed.folder != orphan.folder
    assert not set(killed.tree) & set(orphan.tree)
    assert len(str(killed.folder)) < 30 and killed.folder.stat().st_mode & 0o077 == 0
    assert len(killed.tree) > 5  # raylet, GCS, controller, proxy, replica: the tree was really looked at
    assert killed.answers() and orphan.answers()

    killed.process.kill()
    killed.started.wait()
    killed.is_gone()
    assert orphan.answers()

    orphan.started.kill()  # the parent, without a word
    orphan.started.wait()
    orphan.is_gone()
    assert everything() <= before


@pytest.mark.needs("linux")
def test_sigterm_while_ray_is_starting(start: Callable[..., Server]) -> None:
    before = everything()
    server = start()
    until(lambda: "raylet" in [child.name() for child in server.process.children()], READY_S)
    server.look()
    server.process.terminate()
    assert server.started.wait(90) == 0
    server.is_gone()
    assert server.out.read_text() == ""
    assert everything() <= before


def refused(command: list[str]) -> str:
    """The one line in which ``labkit serve`` says why it does not."""
    folders = set(Path("/tmp").glob("lk-*"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("labkit: ") and done.stderr.count("\n") == 1
    assert set(Path("/tmp").glob("lk-*")) == folders
    return done.stderr


def test_a_port_in_use_is_said_before_ray_starts() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused([*LABKIT, "serve", "--checkpoint", "tiny", "--port", str(port)])
        assert f"port {port} of 127.0.0.1 cannot be used" in said


def test_a_missing_checkpoint_is_said_before_ray_starts(tmp_path: Path) -> None:
    assert "is not a folder" in refused([*LABKIT, "serve", "--checkpoint", str(tmp_path / "none")])


def test_a_ray_that_does_not_start_is_said_in_a_line() -> None:
    said = refused([sys.executable, "-c", BUSY])
    assert "Ray did not start" in said and "timed out during startup" in said
