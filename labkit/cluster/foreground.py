"""``labkit serve``: an endpoint for as long as somebody wants it."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from contextlib import redirect_stdout

from labkit.cluster.local import serve
from labkit.serving.deployment import Deployment

LOOK_S = 0.5
STOP_S = 90  # for tidying up; then the process ends as it is, and ray_session's watcher does the rest
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def serve_until_stopped(*deployments: Deployment, port: int | None = None) -> None:
    """Serve, print ``ready URL`` as the only line on stdout, and stop at Ctrl-C, SIGTERM, SIGHUP, or when
    the parent process ends.

    Whoever stops it before it is ready does not wait: this process ends at once, and the watcher ends the
    half-started Ray within seconds. Raises what ``serve`` raises. To be called from the main thread: it
    takes over the signals.
    """
    # Ray runs in a thread, and this one only listens: an exception that a handler raises in the middle of
    # Ray's code can get lost inside it.
    news: queue.SimpleQueue[str] = queue.SimpleQueue()  # a signal handler may write to it
    _listen(news)
    parent = os.getppid()
    ready, stop = threading.Event(), threading.Event()
    failed: list[BaseException] = []
    stdout = sys.stdout

    def run() -> None:
        try:
            # What Ray prints about itself goes to stderr: who reads stdout waits for one line.
            with redirect_stdout(sys.stderr), serve(*deployments, port=port) as endpoint:
                print(f"ready {endpoint.url}", file=stdout, flush=True)
                ready.set()
                news.put("ready")
                stop.wait()
        except BaseException as error:
            failed.append(error)
        news.put("ended")

    server = threading.Thread(target=run, name="labkit-serve", daemon=True)
    server.start()
    while (word := _next(news, parent)) == "ready":
        _listen(news)  # Ray has put a handler of its own for SIGTERM in place of ours, one that aborts
    if word == "stop":
        stop.set()
        if ready.is_set():
            server.join(STOP_S)
        print("stopped", file=sys.stderr, flush=True)
        if server.is_alive():
            os._exit(1 if ready.is_set() else 0)
    if failed:
        raise failed[0]


def _listen(news: queue.SimpleQueue[str]) -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: news.put("stop"))


def _next(news: queue.SimpleQueue[str], parent: int) -> str:
    """The next word, or ``stop`` when the process that started this one has ended.

    By looking, not by PR_SET_PDEATHSIG: Linux sends that when the *thread* that started us ends, and a
    server started from a worker thread should outlive the thread. Waking up now and then has a second
    use: a signal that the kernel gives to one of Ray's threads does not wake this one, and Python runs
    its handler here alone.
    """
    while os.getppid() == parent:
        try:
            return news.get(timeout=LOOK_S)
        except queue.Empty:
            continue
    return "stop"
