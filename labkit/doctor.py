"""``labkit doctor``: look at the machine; say in a line each what is well and what to do about the rest.

Facts are gathered in one place (``gather``) and judged by functions of those facts alone, so that each
verdict can be tested on any machine.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from labkit.settings import DEFAULT_MODEL, settings

GIB = 2**30
NEEDED_MEMORY = 6.0  # GiB: a notebook's kernel with torch, JupyterLab, a browser, and Ray with one replica
NEEDED_DISK = 1.5  # GiB in the cache: the converted model and a few checkpoints
NEEDED_SHM = 0.5  # GiB: Ray's object store in the lessons
JUPYTER_PORT = 8888


@dataclass(frozen=True)
class Facts:
    """What was seen. Sizes in GiB; None where the machine does not have the thing."""

    system: str
    processor: str
    python: tuple[int, int]
    wsl: bool
    checkout: str
    cores: int
    memory: float | None
    shm: float | None
    cache: str
    cache_writable: bool
    shared_cache: str | None
    shared_cache_readable: bool
    disk: float
    model: bool
    offline: bool
    # name: (version in constraints.txt or None, version found or None, is it needed without any extra?)
    packages: dict[str, tuple[str | None, str | None, bool]]
    loopback: bool
    jupyter_port_free: bool
    gpus: tuple[str, ...]
    kernel: str | None  # the arithmetic of our own kernel for the CPU, or None
    kernel_error: str | None  # why it is not there
    context: str | None
    cluster: str | None  # the Kubernetes version, when the named cluster answers
    cluster_error: str | None
    kuberay: bool


@dataclass(frozen=True)
class Verdict:
    """One line. ``state``: ok, note (it works, and something hurts) or missing (it is needed)."""

    check: str
    state: str
    found: str
    remedy: str = ""


def judge(facts: Facts) -> list[Verdict]:
    """Every verdict on the facts, in the order in which one would mend things."""
    return [check(facts) for check in CHECKS]


def machine(facts: Facts) -> Verdict:
    found = f"{facts.system} on {facts.processor}, Python {facts.python[0]}.{facts.python[1]}"
    if facts.system == "Darwin" and facts.processor == "x86_64":
        return Verdict(
            "machine", "missing", found, "PyTorch no longer exists for Intel Macs; use Linux or a hub"
        )
    if facts.system == "Windows":
        return Verdict("machine", "missing", found, "clone the lab inside WSL, in your Linux home folder")
    if not (3, 11) <= facts.python <= (3, 13):
        return Verdict("machine", "missing", found, "use Python 3.11 to 3.13: `make lab PYTHON=python3.12`")
    return Verdict("machine", "ok", found)


def clone(facts: Facts) -> Verdict:
    if facts.wsl and re.match(r"/mnt/[a-z](/|$)", facts.checkout):
        remedy = "Windows' disk is slow from inside WSL; clone into your Linux home folder (`cd ~`)"
        return Verdict("folder", "note", facts.checkout, remedy)
    return Verdict("folder", "ok", facts.checkout)


def cores(facts: Facts) -> Verdict:
    found = f"{facts.cores} for this process"
    if facts.cores < 2:
        return Verdict("cores", "note", found, "the lessons' times are for two; expect about twice as long")
    return Verdict("cores", "ok", found)


def memory(facts: Facts) -> Verdict:
    if facts.memory is None:
        return Verdict("memory", "note", "unknown", f"the lessons want {NEEDED_MEMORY:.0f} GiB")
    found = f"{facts.memory:.1f} GiB for this process"
    if facts.memory < NEEDED_MEMORY:
        remedy = (
            f"under {NEEDED_MEMORY:.0f} GiB lessons with Ray may be killed: raise the container's or WSL's "
            "limit (memory= in .wslconfig), or close other kernels and set LABKIT_MODEL=tiny"
        )
        return Verdict("memory", "note", found, remedy)
    return Verdict("memory", "ok", found)


def shared_memory(facts: Facts) -> Verdict:
    if facts.shm is None:
        return Verdict("/dev/shm", "ok", "this system has none, and Ray needs none")
    found = f"{facts.shm:.2f} GiB free"
    if facts.shm < NEEDED_SHM:
        remedy = "Ray then keeps its objects on disk, slowly: start the container with --shm-size=2g"
        return Verdict("/dev/shm", "note", found, remedy)
    return Verdict("/dev/shm", "ok", found)


def disk(facts: Facts) -> Verdict:
    found = f"{facts.disk:.1f} GiB free for {facts.cache}"
    if facts.disk < NEEDED_DISK:
        remedy = f"free some ({NEEDED_DISK} GiB are needed), or point LABKIT_CACHE at another disk"
        return Verdict("disk", "note" if facts.model else "missing", found, remedy)
    return Verdict("disk", "ok", found)


def cache(facts: Facts) -> Verdict:
    found = facts.cache if facts.shared_cache is None else f"{facts.cache}, after {facts.shared_cache}"
    if not facts.cache_writable:
        return Verdict(
            "cache", "missing", f"{found}: not writable", "set LABKIT_CACHE to a folder that you may write"
        )
    if facts.shared_cache is not None and not facts.shared_cache_readable:
        remedy = "LABKIT_SHARED_CACHE names no readable folder; correct it or unset it"
        return Verdict("cache", "note", found, remedy)
    return Verdict("cache", "ok", found)


def model(facts: Facts) -> Verdict:
    if facts.model:
        return Verdict("model", "ok", f"{DEFAULT_MODEL} is there")
    remedy = "`labkit models fetch`"
    if facts.offline:
        remedy = (
            "LABKIT_OFFLINE=1 forbids it: unset it and run `labkit models fetch`, or copy a filled cache"
        )
    return Verdict("model", "missing", f"{DEFAULT_MODEL} is not in the cache", remedy)


def packages(facts: Facts) -> Verdict:
    absent = [name for name, (_, found, needed) in facts.packages.items() if needed and found is None]
    if absent:
        return Verdict("packages", "missing", f"not installed: {', '.join(absent)}", "`make setup`")
    other = [
        f"{name} {found} (tested with {wanted})"
        for name, (wanted, found, _) in facts.packages.items()
        if wanted is not None and found is not None and found.split("+")[0] != wanted
    ]
    if other:
        shown = ", ".join(other[:4]) + (f" and {len(other) - 4} more" if len(other) > 4 else "")
        return Verdict("packages", "note", shown, "`make setup` brings back the tested versions")
    there = sum(found is not None for _, found, _ in facts.packages.values())
    return Verdict("packages", "ok", f"{there} at the tested versions")


def ports(facts: Facts) -> Verdict:
    if not facts.loopback:
        remedy = "servers listen on 127.0.0.1: let this process open ports there (container or sandbox)"
        return Verdict("ports", "missing", "127.0.0.1 refuses", remedy)
    if not facts.jupyter_port_free:
        return Verdict("ports", "ok", f"{JUPYTER_PORT} is taken, JupyterLab takes the next free one")
    return Verdict("ports", "ok", "127.0.0.1 has free ones")


def gpu(facts: Facts) -> Verdict:
    return Verdict("GPU", "ok", ", ".join(facts.gpus) or "none, and no lesson needs one")


def kernels(facts: Facts) -> Verdict:
    if facts.kernel is None:
        remedy = "without it weights other than int4 are written out, in 4 to 8 times the memory; tokens come slower"
        return Verdict("kernels", "note", facts.kernel_error or "not built", remedy)
    return Verdict("kernels", "ok", f"built for {facts.kernel}")


def cluster(facts: Facts) -> Verdict:
    if facts.context is None:
        return Verdict("cluster", "ok", "none named (LABKIT_KUBE_CONTEXT); everything runs locally")
    if facts.cluster is None:
        remedy = f"check `kubectl --context {facts.context} version`, or unset LABKIT_KUBE_CONTEXT"
        return Verdict("cluster", "missing", f"{facts.context}: {facts.cluster_error}", remedy)
    found = f"{facts.context}: Kubernetes {facts.cluster}"
    if not facts.kuberay:
        return Verdict("cluster", "note", f"{found}, no KubeRay", "install the KubeRay operator into it")
    return Verdict("cluster", "ok", f"{found} with KubeRay")


CHECKS: tuple[Callable[[Facts], Verdict], ...] = (
    machine, clone, cores, memory, shared_memory, disk, packages, cache, model, ports, gpu, kernels,
    cluster,
)  # fmt: skip


def gather() -> Facts:
    """Look at this machine. Raises ValueError where one of the lab's settings cannot be read."""
    now = settings()
    roots = [now.cache] if now.shared_cache is None else [now.shared_cache, now.cache]
    context = os.environ.get("LABKIT_KUBE_CONTEXT") or None
    version, kuberay, error = _ask_cluster(context) if context else (None, False, None)
    standing = _existing(now.cache)
    kernel, kernel_error = _kernel()
    return Facts(
        system=platform.system(),
        processor=platform.machine(),
        python=sys.version_info[:2],
        wsl="microsoft" in platform.release().lower(),
        checkout=str(Path(__file__).resolve().parents[1]),
        cores=_cores(),
        memory=_memory(),
        shm=shutil.disk_usage("/dev/shm").free / GIB if os.path.isdir("/dev/shm") else None,
        cache=str(now.cache),
        cache_writable=os.access(standing, os.W_OK | os.X_OK) and standing.is_dir(),
        shared_cache=str(now.shared_cache) if now.shared_cache else None,
        shared_cache_readable=bool(now.shared_cache)
        and os.access(str(now.shared_cache), os.R_OK | os.X_OK),
        disk=shutil.disk_usage(standing).free / GIB,
        model=any((root / "models" / DEFAULT_MODEL).is_dir() for root in roots),
        offline=now.offline,
        packages=_packages(),
        loopback=_can_bind(0),
        jupyter_port_free=_can_bind(JUPYTER_PORT),
        gpus=_gpus(),
        kernel=kernel,
        kernel_error=kernel_error,
        context=context,
        cluster=version,
        cluster_error=error,
        kuberay=kuberay,
    )


def _existing(path: Path) -> Path:
    """The path itself, or the nearest parent that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _cores() -> int:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroups():
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.strip().isdigit():
            count = min(count, max(1, int(quota) // int(period)))
    return count


def _memory() -> float | None:
    """The machine's memory or the tightest cgroup limit around this process, in GiB."""
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (OSError, ValueError):
        return None
    words = [_read(folder / "memory.max") for folder in _cgroups()]
    words.append(_read(Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")))  # cgroup v1
    limits += [int(word) for word in words if word.isdigit()]
    return min(limits) / GIB


def _cgroups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """This process's cgroup (version 2) and the ones around it, which limit it too."""
    found = re.search(r"^0::/(.*)$", _read(own), flags=re.MULTILINE)
    folder = root / found.group(1) if found else root
    return [folder, *(parent for parent in folder.parents if parent == root or root in parent.parents)]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _packages() -> dict[str, tuple[str | None, str | None, bool]]:
    try:
        required = metadata.requires("labkit") or []
    except metadata.PackageNotFoundError:
        required = []
    needed = {_name(line) for line in required if "extra ==" not in line}
    wanted = _constraints(Path(__file__).resolve().parents[1] / "constraints.txt")
    return {
        name: (wanted.get(name), _installed(name), name in needed) for name in sorted(needed | set(wanted))
    }


def _constraints(path: Path) -> dict[str, str]:
    """Names and versions of a constraints file; a name with several versions is left out."""
    versions: dict[str, set[str]] = {}
    for line in _read(path).splitlines():
        found = re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", line)
        if found:
            versions.setdefault(_name(found.group(1)), set()).add(found.group(2))
    return {name: seen.pop() for name, seen in versions.items() if len(seen) == 1}


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    return re.sub(r"[-_.]+", "-", found.group(0)).lower() if found else requirement


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _can_bind(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _kernel() -> tuple[str | None, str | None]:
    """What the kernel for the CPU computes with, built if need be, and why it is not there."""
    try:
        from labkit.kernels import build  # torch, without which the rest is still worth saying
    except ImportError as error:
        return None, str(error)
    reason = build.why_not()
    return (None, reason) if reason else (build.library().labkit_arithmetic().decode(), None)


def _gpus() -> tuple[str, ...]:
    """Names and memory as the NVIDIA driver gives them."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(done.stdout.strip().splitlines()) if done.returncode == 0 else ()


def _ask_cluster(context: str) -> tuple[str | None, bool, str | None]:
    """Version, whether KubeRay is there, and what went wrong."""
    try:
        from kubernetes import client, config
    except ImportError:
        return None, False, 'the kubernetes package is not installed (pip install "labkit[cluster]")'
    try:
        api = config.new_client_from_config(context=context)
        version = client.VersionApi(api).get_code(_request_timeout=5).git_version
        groups = client.ApisApi(api).get_api_versions(_request_timeout=5).groups
    except (
        Exception
    ) as error:  # the client raises its own, urllib3's and yaml's errors; all mean the same here
        return None, False, " ".join(str(error).split())[:160]
    return version, any(group.name == "ray.io" for group in groups), None


def as_json(verdicts: list[Verdict]) -> dict[str, object]:
    """What ``labkit doctor --json`` prints."""
    return {
        "ok": not any(verdict.state == "missing" for verdict in verdicts),
        "checks": [asdict(v) for v in verdicts],
    }
