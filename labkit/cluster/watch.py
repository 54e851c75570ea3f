"""The last one out: waits until its owner has ended, however that happened, then ends what is left of the
owner's Ray and removes its folder. ``python -m labkit.cluster.watch FOLDER``, started by
``local.ray_session`` with a pipe as stdin.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import time

import psutil

MARKER = "LABKIT_RAY"  # in the environment of every process of one Ray: the folder that is its own
GRACE_S = 2.0  # for what ends by itself once its raylet is gone
GIVE_UP_S = 30.0


def processes(folder: str) -> list[psutil.Process]:
    """This user's processes that belong to the Ray whose folder this is, and what those have started.

    Ray's own carry the folder in their environment. Its agents overwrite theirs with a title,
    ``ray::...``; they are known by that title together with an open file in the folder.
    """
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if (
                process.pid != os.getpid()
                and process.uids().real == os.getuid()
                and _belongs(process, folder)
            ):
                for one in [process, *process.children(recursive=True)]:
                    found[one.pid] = one
        except psutil.Error:
            continue  # it has ended, or is not ours to look into
    return [process for process in found.values() if _alive(process)]


def _belongs(process: psutil.Process, folder: str) -> bool:
    if process.environ().get(MARKER) == folder:
        return True
    titled = "".join(process.cmdline()[:1]).startswith("ray::")
    return titled and any(file.path.startswith(folder + os.sep) for file in process.open_files())


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def end(folder: str, grace: float = GRACE_S) -> None:
    """End the processes of the Ray in this folder. Those that are ending get ``grace`` seconds to do so.

    Each is killed by its own id, and never one of another Ray.
    """
    start = time.monotonic()
    while (left := processes(folder)) and time.monotonic() - start < GIVE_UP_S:
        if time.monotonic() - start > grace:
            for process in left:
                try:
                    process.kill()  # psutil checks that the id has not been given to another since
                except psutil.Error:
                    continue
        time.sleep(0.1)


def main() -> None:
    """Wait for the owner: its end closes the pipe, and where something still holds that, makes us an
    orphan.
    """
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    owner = os.getppid()
    while os.getppid() == owner:
        readable, _, _ = select.select([sys.stdin], [], [], 0.5)
        if readable and not os.read(sys.stdin.fileno(), 1024):
            break
    end(sys.argv[1])
    shutil.rmtree(sys.argv[1], ignore_errors=True)


if __name__ == "__main__":
    main()
