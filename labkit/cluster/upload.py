"""A checkpoint's way from a folder of this machine into the claim that all Ray pods see at /checkpoints."""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labkit.cluster.pods import CHECKPOINTS, CLAIM, CONTAINER_SECURITY, Manifest, metadata, pod
from labkit.cluster.profiles import Profile

if TYPE_CHECKING:
    from labkit.cluster.kuberay import KubeRay

KNOWN = "checkpoint.labkit"  # annotations of the claim: what was written to it, and when
WHOLE_S = 1800
STDIN, BLOCK = 0, 256 * 1024


def place(folder: Path) -> str:
    """Where a checkpoint will stand in the pods: by name and content, so that another content is another path, and a
    server that has the old one open is not disturbed.
    """
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", folder.resolve().name).strip("-.")[:40] or "checkpoint"
    return f"{CHECKPOINTS}/{name}-{digest.hexdigest()[:10]}"


def is_there(ray: KubeRay, path: str) -> bool:
    """Whether the claim has it, by its annotations."""
    known = ray.get("PersistentVolumeClaim", "checkpoints")["metadata"].get("annotations") or {}
    return f"{KNOWN}/{Path(path).name}" in known


def upload(
    ray: KubeRay, folder: Path, profile: Profile, say: Callable[[str], None], timeout: float = 300
) -> str:
    """Write a checkpoint into the claim, whole or not at all, and return its path in pods.

    A pod of the server's image unpacks it and ends. Raises KubeRayError, TimeoutError.
    """
    path = place(folder)
    name = f"upload-{path.rpartition('-')[2]}"
    if ray.exists("Pod", name):
        ray.delete("Pod", name)
    ray.create(_pod(name, profile, ray.namespace))
    try:
        ray.wait("Pod", name, timeout=timeout, progress=lambda state: say(f"pod for the upload: {state}"))
        _send(ray, name, folder, path, say)
    finally:
        ray.delete("Pod", name, wait=False)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    ray.patch(
        "PersistentVolumeClaim",
        "checkpoints",
        {"metadata": {"annotations": {f"{KNOWN}/{Path(path).name}": now}}},
    )
    return path


def _pod(name: str, profile: Profile, namespace: str) -> Manifest:
    container = {
        "name": "upload",
        "image": profile.image,
        "imagePullPolicy": profile.pull,
        "command": ["sleep", str(WHOLE_S)],
        "resources": profile.sidecar.resources(),
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [{"name": CLAIM["name"], "mountPath": CHECKPOINTS}],
    }
    ends = {"restartPolicy": "Never", "activeDeadlineSeconds": WHOLE_S, "terminationGracePeriodSeconds": 0}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata("Pod", name, namespace),
        "spec": {**pod(container, CLAIM), **ends},
    }


def _send(ray: KubeRay, name: str, folder: Path, path: str, say: Callable[[str], None]) -> None:
    from kubernetes.client import CoreV1Api
    from kubernetes.stream import stream

    from labkit.cluster.kuberay import KubeRayError

    part = f"{CHECKPOINTS}/.{Path(path).name}.part"
    # The paths are of our own making (see place), so no quoting is needed.
    script = f"rm -rf {part} && mkdir {part} && tar -xf - -C {part} && rm -rf {path} && mv {part} {path}"
    with ray.errors("Pod", name):
        # A client of its own: stream() exchanges a method of the one it is given.
        remote = stream(
            CoreV1Api(ray.context.client()).connect_get_namespaced_pod_exec, name, ray.namespace,
            command=["sh", "-c", script], stdin=True, stdout=True, stderr=True, tty=False, binary=True,
            _preload_content=False,
        )  # fmt: skip
        total = sum(file.stat().st_size for file in _files(folder))
        pipe: Any = _Pipe(remote, total, say)
        with tarfile.open(fileobj=pipe, mode="w|", bufsize=BLOCK) as archive:
            for file in _files(folder):
                archive.add(file, str(file.relative_to(folder)), recursive=False, filter=_plain)
        remote.close_channel(STDIN)
        remote.run_forever(timeout=120)
        said = (remote.read_channel(2) or b"").decode(errors="replace").strip()
        code = remote.returncode
    if code != 0:
        raise KubeRayError(
            f"unpacking in the pod ended with {code}: {said}",
            kind="Pod",
            name=name,
            namespace=ray.namespace,
        )


class _Pipe:
    """A file to write to whose other end is the pod's standard input."""

    def __init__(self, remote: Any, total: int, say: Callable[[str], None]) -> None:
        self._remote, self._total, self._say = remote, total, say
        self._sent = 0

    def write(self, data: bytes) -> int:
        self._remote.update(timeout=0)
        if not self._remote.is_open():
            raise ConnectionError("the pod stopped reading")
        self._remote.write_stdin(bytes(data))
        self._sent += len(data)
        self._say(f"{min(self._sent, self._total) / 1e6:.0f} of {self._total / 1e6:.0f} MB sent")
        return len(data)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o644
    return entry
