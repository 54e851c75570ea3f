"""``labkit serve``: an endpoint for as long as somebody wants it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import redirect_stdout
from types import FrameType
from typing import NoReturn

from labkit.cluster.local import serve
from labkit.serving.deployment import Deployment

PARENT_CHECK_S = 0.5
STOP_S = 90  # for tidying up; then the process ends as it is, and ray_session's watcher does the rest
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop(BaseException):
    """Somebody wants this process to end: Ctrl-C, SIGTERM, a closed terminal, or a parent that is gone."""


def serve_until_stopped(*deployments: Deployment, port: int | None = None) -> None:
    """Serve, print ``ready URL`` as the only line on stdout, and stop when told to or when the parent
    process ends.

    Raises what ``serve`` raises. To be called from the main thread: it takes over the signals.
    """
    _end_with_parent()
    stdout = sys.stdout
    try:
        _listen()
        # What Ray prints about itself goes to stderr: who reads stdout waits for one line.
        with redirect_stdout(sys.stderr), serve(*deployments, port=port) as endpoint:
            _listen()  # ray.init has put a handler of its own there
            print(f"ready {endpoint.url}", file=stdout, flush=True)
            while True:
                time.sleep(3600)
    except (Stop, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    except SystemExit as exit:  # ray.init's handler for SIGTERM
        if exit.code != signal.SIGTERM:
            raise
        print("stopped", file=sys.stderr)


def _listen() -> None:
    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for name in STOP_SIGNALS:  # a second Ctrl-C must not interrupt the tidying up
            signal.signal(name, signal.SIG_IGN)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(STOP_S)
        raise Stop

    for name in STOP_SIGNALS:
        signal.signal(name, stop)


def _end_with_parent() -> None:
    """Send this process SIGTERM when the one that started it ends.

    By looking, not by PR_SET_PDEATHSIG: Linux sends that when the *thread* that started us ends, and a
    server started from a worker thread should outlive the thread.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STOP_S)
        os.kill(os.getpid(), signal.SIGKILL)  # it never came to handle the signal

    threading.Thread(target=watch, name="labkit-parent", daemon=True).start()
