"""Ray on this machine: one place that starts it, serves on it, and leaves nothing behind."""

from __future__ import annotations

import io
import json
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from types import TracebackType
from typing import Any

from labkit.cluster.watch import MARKER, end
from labkit.serving.deployment import APP_NAME, Deployment, distinct_names

HOST = "127.0.0.1"
SOCKET_PATH_LIMIT = 103  # bytes; macOS allows 104 with the closing zero, Linux 108
INNER = "/r"  # Ray opens its folder to everybody; the one around it is entered by its owner alone
# What Ray puts behind its folder: session_<date>_<time>_<microseconds>_<pid>/sockets/plasma_store, pid up
# to 7 digits.
SOCKET_SUFFIX = len(INNER + "/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store.1")
OBJECT_STORE_MB = 256  # of /dev/shm; Ray spills to its folder beyond that, and refuses less than 75
START_ATTEMPTS = 3
WATCHER_TIMEOUT_S = 60.0
READY_TIMEOUT_S = 120.0
# One secret for each process: Ray remembers it for as long as the process lives.
_TOKEN = secrets.token_hex(32)

RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # On two busy cores the HTTP proxy takes longer than the 5 s that Serve gives it.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # Ray listens on the machine's address, not on loopback alone: without a secret, anybody who reaches
    # it can run code as this user. ray.init asks for one by itself (RAY_AUTH_MODE=token); given here,
    # none is written to the home folder.
    "RAY_AUTH_TOKEN": _TOKEN,
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def inside_ray() -> bool:
    """True in a Ray job, task or actor, and in a pod that KubeRay started."""
    return any(name in os.environ for name in ("RAY_JOB_CONFIG_JSON_ENV_VAR", "KUBERAY_GEN_RAY_START_CMD"))


@contextmanager
def ray_session(*, cores: int | None = None, object_store_mb: int = OBJECT_STORE_MB) -> Iterator[None]:
    """Ray for the length of a ``with`` block. The only place in the lab that calls ``ray.init``.

    Inside a Ray job or pod it joins that cluster, and where this process is connected already it uses
    that; both are left as they were. Everywhere else it starts a Ray of its own (``address="local"``: one
    that runs on the machine already may be somebody else's), with no dashboard and a private short
    temporary folder, and ends it afterwards, also when this process is killed: a small watcher process
    sees to that.

    cores            logical cores of the new Ray; None = the machine's
    object_store_mb  its shared memory, in MB
    """
    import ray

    if ray.is_initialized():
        yield
        return
    if inside_ray():
        ray.init(address=os.environ.get("RAY_ADDRESS") or "auto", log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
        return

    before = {name: os.environ.get(name) for name in (*RAY_ENVIRONMENT, "RAY_AUTH_MODE", MARKER)}
    with ExitStack() as stack:
        stack.callback(_restore, before)
        folder = _short_folder()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        os.environ.update({name: os.environ.get(name) or value for name, value in RAY_ENVIRONMENT.items()})
        stack.callback(_end, _watcher(folder))
        stack.callback(ray.shutdown)
        _start_ray(folder, cores or os.cpu_count() or 1, object_store_mb)
        yield


def _start_ray(folder: str, cores: int, object_store_mb: int) -> None:
    """``ray.init``, again where a busy machine did not get its raylet up in the 30 s that Ray gives it."""
    import ray

    os.environ[MARKER] = folder  # inherited by Ray's processes, and by nothing that is started later
    try:
        for attempt in range(1, START_ATTEMPTS + 1):
            try:
                with _silent_file_descriptor_2():
                    ray.init(
                        address="local",
                        num_cpus=cores,
                        include_dashboard=False,
                        object_store_memory=object_store_mb * 2**20,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                        _temp_dir=folder + INNER,
                    )
                return
            except Exception as error:  # Ray raises bare Exception
                ray.shutdown()
                end(folder, grace=0)
                if attempt == START_ATTEMPTS:
                    raise RuntimeError(f"Ray did not start, in {attempt} attempts: {error}") from error
    finally:
        del os.environ[MARKER]


@contextmanager
def _silent_file_descriptor_2() -> Iterator[None]:
    """Drop what the C++ part of Ray writes past ``sys.stderr``: without a network it remarks on that.

    What goes wrong is raised, and Ray's own log files keep all of it.
    """
    sys.stderr.flush()
    kept, other = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(other, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(other)


class Endpoint:
    """Models that answer at a URL. Close it, or use it in a ``with`` block.

    url     base URL for an OpenAI client, ``http://127.0.0.1:PORT/v1``
    models  the names that requests may use
    """

    def __init__(self, url: str, models: list[str], stack: ExitStack) -> None:
        self.url, self.models = url, models
        self._stack = stack

    def health(self) -> dict[str, Any]:
        """What ``/healthz`` says: for each model, what each of its replicas is doing."""
        with _open_directly().open(self.url.removesuffix("/v1") + "/healthz", timeout=30) as response:
            return dict(json.load(response))

    def close(self) -> None:
        """Stop serving, and end Ray where ``serve`` started it. May be called more than once."""
        # Serve's controller is killed at the end, as always, and Ray prints that as if it were an error.
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            self._stack.close()

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, models={self.models})"


def serve(*deployments: Deployment, port: int | None = None) -> Endpoint:
    """Serve the deployments behind one URL on 127.0.0.1 and return once a real request to each has been
    answered.

    port: None = a free one. Starts a ``ray_session`` of its own where there is none.
    Raises ValueError (nothing to serve, equal names, more cores than this Ray has), FileNotFoundError (no
    such checkpoint), OSError (the port is in use), all before Ray starts; RuntimeError when a model does
    not come up or when this Ray serves already.
    """
    if not deployments:
        raise ValueError("nothing to serve: give at least one Deployment")
    for deployment in deployments:
        deployment.check()
    deployments = tuple(_with_threads(deployment, deployments) for deployment in deployments)
    names = distinct_names(deployment.name for deployment in deployments)
    port, lock = reserve(port)

    with ExitStack() as stack:
        stack.enter_context(lock)
        import ray

        need = sum(deployment.replicas * (deployment.threads or 1) for deployment in deployments)
        stack.enter_context(ray_session(cores=max(need, os.cpu_count() or 1)))
        have = int(ray.cluster_resources().get("CPU", 0))
        if need > have and not inside_ray():
            raise ValueError(
                f"{need} cores asked for (replicas x threads), and this Ray has {have}; ask for fewer"
            )
        _start(deployments, port, stack)
        url = f"http://{HOST}:{port}/v1"
        for name in names:
            _wait_until_it_answers(url, name)
        return Endpoint(url, names, stack.pop_all())


def _start(deployments: tuple[Deployment, ...], port: int, stack: ExitStack) -> None:
    from ray import serve as ray_serve

    from labkit.serving.app import build

    if ray_serve.status().applications:
        raise RuntimeError(
            "this Ray serves already: close that endpoint, or give all deployments to one serve()"
        )
    stack.callback(ray_serve.shutdown)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    with _hushed("ray.serve"):
        ray_serve.start(
            proxy_location="HeadOnly", http_options={"host": HOST, "port": port}, logging_config=quiet
        )
        fields = [deployment.model_dump() for deployment in deployments]
        try:
            ray_serve.run(build({"deployments": fields}), name=APP_NAME, route_prefix="/")
        except RuntimeError as error:
            raise RuntimeError(
                f"{', '.join(d.checkpoint for d in deployments)} did not come up: {_cause() or error}"
            ) from error


def _cause() -> str:
    """The last words of the replicas that failed: the error itself, under Serve's account of it."""
    from ray import serve as ray_serve

    application = ray_serve.status().applications.get(APP_NAME)
    messages = [state.message for state in application.deployments.values()] if application else []
    return "; ".join(message.strip().splitlines()[-1] for message in messages if message.strip())


def reserve(port: int | None = None) -> tuple[int, socket.socket]:
    """A port of 127.0.0.1 that nobody listens on, and a socket that keeps other ``serve`` calls off it
    until closed.

    port: None = any free one. Raises OSError where it is in use or may not be used.
    """
    # Serve listens with SO_REUSEPORT: a second one of the same user would get half of the first one's
    # requests, without an error. The UDP port of the same number is the lock that prevents this, from
    # before Ray starts.
    lock = socket.socket(type=socket.SOCK_DGRAM)
    try:
        lock.bind((HOST, port or 0))
        found = int(lock.getsockname()[1])
        with socket.socket() as probe:
            # The last server's connections may linger.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, found))
            probe.listen()
    except (OSError, OverflowError) as error:
        lock.close()
        if port is None:
            return reserve()
        raise OSError(
            f"port {port} of {HOST} cannot be used ({error}); choose another, or leave it out for a "
            "free one"
        ) from error
    return found, lock


def _with_threads(deployment: Deployment, all_of_them: tuple[Deployment, ...]) -> Deployment:
    if deployment.threads is not None:
        return deployment
    share = (os.cpu_count() or 1) // sum(other.replicas for other in all_of_them)
    return deployment.model_copy(update={"threads": max(1, share)})


def _open_directly() -> urllib.request.OpenerDirector:
    """For 127.0.0.1, never by way of a proxy that the environment names."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _wait_until_it_answers(url: str, name: str) -> None:
    """Ask for one token, as a client would. Serve says "running" a moment before its proxy knows the
    route.
    """
    body = json.dumps({"model": name, "prompt": "a", "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{url}/completions", body, {"Content-Type": "application/json"})
    direct = _open_directly()
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        try:
            with direct.open(request, timeout=READY_TIMEOUT_S):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                why = error.read().decode() if isinstance(error, urllib.error.HTTPError) else str(error)
                raise RuntimeError(
                    f"model {name!r} was loaded but does not answer at {url}: {why}"
                ) from error
            time.sleep(0.1)


def _short_folder() -> str:
    """A new folder that only this user can enter, short enough for the sockets that Ray makes in it."""
    base = "/tmp" if os.access("/tmp", os.W_OK | os.X_OK) else tempfile.gettempdir()
    folder = os.path.realpath(tempfile.mkdtemp(prefix="lk-", dir=base))
    if len(os.fsencode(folder)) + SOCKET_SUFFIX > SOCKET_PATH_LIMIT:
        os.rmdir(folder)
        raise ValueError(
            f"{base} is too long a path for Ray's sockets; set TMPDIR to a shorter one, such as /tmp"
        )
    return folder


def _watcher(folder: str) -> subprocess.Popen[bytes]:
    """Start the watcher in a session of its own, so that a Ctrl-C in the terminal is not meant for it."""
    return subprocess.Popen(
        [sys.executable, "-m", "labkit.cluster.watch", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _end(watcher: subprocess.Popen[bytes]) -> None:
    """Let the watcher do its work now, and wait for it."""
    assert watcher.stdin is not None
    watcher.stdin.close()
    try:
        watcher.wait(WATCHER_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        watcher.kill()


@contextmanager
def _hushed(logger: str) -> Iterator[None]:
    """Keep a logger's remarks, warnings excepted, off the screen, whatever level it is set to meanwhile."""

    def keep(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING

    logging.getLogger(logger).addFilter(keep)
    try:
        yield
    finally:
        logging.getLogger(logger).removeFilter(keep)


def _restore(environment: dict[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
