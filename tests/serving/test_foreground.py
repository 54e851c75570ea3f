"""How the foreground ends, with an endpoint that is none: signals, a parent that dies, tidying up that
hangs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from server import Started, alive, until

SERVE = """
import sys, time
from labkit.cluster import foreground

class Endpoint:
    url = "http://127.0.0.1:1/v1"
    def __enter__(self):
        return self
    def __exit__(self, *error):
        print("tidying", flush=True)
        time.sleep({seconds})
        print("tidy", flush=True)

def serve(*deployments, port):
    print("chatter", flush=True)
    {before}
    time.sleep({start_s})
    return Endpoint()

foreground.serve, foreground.STOP_S = serve, {stop_s}
foreground.serve_until_stopped()
"""
READY = "ready http://127.0.0.1:1/v1\n"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def make(
        seconds: float = 0,
        stop_s: int = 60,
        start_s: int = 0,
        *,
        before: str = "",
        by_a_parent: bool = False,
    ) -> Started:
        script = SERVE.format(seconds=seconds, stop_s=stop_s, start_s=start_s, before=before)
        started.append(
            Started(tmp_path / "output", [sys.executable, "-c", script], by_a_parent=by_a_parent)
        )
        if not start_s:
            started[-1].wait_until_ready()
        return started[-1]

    yield make
    for one in started:
        one.clean_up()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_tidily(start: Callable[..., Started], how: signal.Signals) -> None:
    server = start()
    server.started.send_signal(how)
    assert server.started.wait(20) == 0
    assert server.out.read_text() == READY
    assert server.err.read_text().split() == ["chatter", "tidying", "tidy", "stopped"]


def test_a_second_ctrl_c_does_not_interrupt_the_tidying(start: Callable[..., Started]) -> None:
    server = start(seconds=1)
    server.started.send_signal(signal.SIGINT)
    until(lambda: "tidying" in server.err.read_text(), 20)
    server.started.send_signal(signal.SIGINT)
    assert server.started.wait(20) == 0
    assert "tidy\nstopped" in server.err.read_text()


def test_a_signal_that_another_thread_is_given_ends_it_too(start: Callable[..., Started]) -> None:
    """The kernel may give a signal to any thread, and that wakes no other."""
    server = start(
        start_s=20,
        before="import signal, threading; time.sleep(1); "
        "signal.pthread_kill(threading.get_ident(), signal.SIGTERM)",
    )
    assert server.started.wait(10) == 0
    assert server.out.read_text() == ""


def test_it_ends_with_its_parent(start: Callable[..., Started]) -> None:
    server = start(by_a_parent=True)
    process = server.process
    os.kill(server.started.pid, signal.SIGKILL)
    server.started.wait()
    until(lambda: not alive(process), 20)
    assert "tidy\nstopped" in server.err.read_text()


def test_tidying_up_that_hangs_is_cut_off(start: Callable[..., Started]) -> None:
    server = start(seconds=600, stop_s=1)
    server.started.send_signal(signal.SIGTERM)
    assert server.started.wait(20) == 1
    assert server.err.read_text().split() == ["chatter", "tidying", "stopped"]


def test_it_does_not_wait_for_a_start(start: Callable[..., Started]) -> None:
    server = start(start_s=600)
    until(lambda: "chatter" in server.err.read_text(), 20)
    server.started.send_signal(signal.SIGTERM)
    assert server.started.wait(20) == 0
    assert (server.out.read_text(), server.err.read_text().split()) == ("", ["chatter", "stopped"])
