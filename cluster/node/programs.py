"""Build the node's programs from their Go modules, once, and what is made of them: images and files.

A program is built again when its go.mod, go.sum or main.go changes, and only then; an interrupted build
goes on with the next program that is missing.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import images
import yaml

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "programs"
GO_VERSION = (1, 26)
ROOT_USER, NOBODY = 0, 10002


@dataclass(frozen=True)
class Program:
    """A folder of ``programs/``: the packages to build there and the binaries that come out.

    cpu_minutes  what a first build takes, about
    """

    folder: str
    packages: tuple[str, ...]
    binaries: tuple[str, ...]
    cpu_minutes: float


KUBERNETES = (
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubelet",
    "kubectl",
)
CONTAINERD = ("containerd", "containerd-shim-runc-v2", "ctr")
PROGRAMS = (
    Program("kubernetes", tuple(f"k8s.io/kubernetes/cmd/{name}" for name in KUBERNETES), KUBERNETES, 15),
    Program("etcd", ("go.etcd.io/etcd/server/v3",), ("etcd",), 1),
    Program(
        "containerd",
        tuple(f"github.com/containerd/containerd/v2/cmd/{name}" for name in CONTAINERD),
        CONTAINERD,
        1.5,
    ),
    Program("coredns", (".",), ("coredns",), 2),
    Program("metrics-server", ("sigs.k8s.io/metrics-server/cmd/metrics-server",), ("metrics-server",), 3.5),
    Program("kuberay-operator", ("github.com/ray-project/kuberay/ray-operator",), ("kuberay-operator",), 3),
    Program("pause", (".",), ("pause",), 0.1),
)
# image name: (binary, where it stands in the image, user)
IMAGES = {
    "pause": ("pause", "pause", ROOT_USER),
    "coredns": ("coredns", "coredns", ROOT_USER),
    "metrics-server": ("metrics-server", "metrics-server", NOBODY),
    "kuberay-operator": ("kuberay-operator", "manager", NOBODY),
}


def build(node: Path, say: Callable[[str], None] = print, *, keep: bool = False) -> None:
    """Make ``node/bin``, ``node/images`` and ``node/share`` whole; done already, it takes no time.

    keep  leave Go's modules and caches in ``node/go``, for who changes a version: the next build is short

    A second call waits for the first. Raises RuntimeError where Go is missing or too old, or a build fails.
    """
    node.mkdir(parents=True, exist_ok=True)
    with (node / "building").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _build_all(node, say)
        if not keep:
            _remove_caches(node)


def _build_all(node: Path, say: Callable[[str], None]) -> None:
    missing = [program for program in PROGRAMS if not _is_built(node, program)]
    complete = node / "share" / "complete"
    if missing:
        go = _go()
        complete.unlink(missing_ok=True)
        minutes = sum(program.cpu_minutes for program in missing)
        say(
            f"Building {len(missing)} of {len(PROGRAMS)} programs: about {minutes:.0f} CPU-minutes and 12 GB, once"
        )
        (node / "bin").mkdir(parents=True, exist_ok=True)
        for number, program in enumerate(missing, 1):
            began = time.monotonic()
            say(f"[{number}/{len(missing)}] {program.folder}: {', '.join(program.binaries)}")
            _build(go, node, program)
            say(f"[{number}/{len(missing)}] {program.folder}: {time.monotonic() - began:.0f} s")
    if not complete.exists():
        _share(_go(), node)
        for image, (binary, inside, user) in IMAGES.items():
            write_image(
                node / "images" / f"{image}.tar",
                f"bits-to-pods/{image}:1",
                node / "bin" / binary,
                inside,
                user,
            )
        complete.touch()


def _remove_caches(node: Path) -> None:
    """11 GB that nothing needs any more."""
    if (node / "go").exists():
        subprocess.run([_go(), "clean", "-modcache"], env=_environment(node), check=True)
        shutil.rmtree(node / "go")


def is_built(node: Path) -> bool:
    return all(_is_built(node, program) for program in PROGRAMS) and (node / "share" / "complete").exists()


def key(program: Program) -> str:
    """A hash of everything that decides what is built."""
    digest = hashlib.sha256()
    for path in sorted((SOURCES / program.folder).iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def version(program: str, module: str) -> str:
    """The version of a module that a program's go.mod requires, ``v1.37.2``."""
    text = (SOURCES / program / "go.mod").read_text()
    found = re.search(rf"^(?:require|\t)\s*{re.escape(module)} (v\S+)", text, re.MULTILINE)
    if not found:
        raise ValueError(f"{program}/go.mod does not require {module}")
    return found[1]


def write_image(path: Path, name: str, binary: Path, inside: str, user: int) -> None:
    """An image without a registry: a docker-archive whose single layer holds one static binary."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        for folder in ("tmp", "etc"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if folder == "tmp" else 0o755
            archive.addfile(entry)
        entry = tarfile.TarInfo(inside)
        entry.size, entry.mode = binary.stat().st_size, 0o755
        with binary.open("rb") as file:
            archive.addfile(entry, file)
    content = layer.getvalue()
    config = json.dumps(
        {
            "architecture": "amd64" if os.uname().machine == "x86_64" else "arm64",
            "os": "linux",
            "config": {"Entrypoint": [f"/{inside}"], "User": str(user)},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(content).hexdigest()}"]},
        }
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = json.dumps([{"Config": config_name, "RepoTags": [name], "Layers": ["layer.tar"]}]).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w") as archive:
        for file_name, data in ((config_name, config), ("layer.tar", content), ("manifest.json", manifest)):
            images.add(archive, file_name, data)
    partial.rename(path)


def _is_built(node: Path, program: Program) -> bool:
    stamp = node / "bin" / f".{program.folder}"
    return stamp.exists() and stamp.read_text() == key(program)


def _build(go: str, node: Path, program: Program) -> None:
    flags = ["-s", "-w"]
    if program.folder == "kubernetes":
        flags += _kubernetes_version()
    target = node / "bin" if len(program.binaries) > 1 else node / "bin" / program.binaries[0]
    # No debugger's tables: a twelfth of the time.
    command = [go, "build", "-trimpath", "-buildvcs=false", "-gcflags=all=-dwarf=false"]
    command += ["-ldflags", " ".join(flags), "-o", str(target)]
    built = subprocess.run(
        [*command, *program.packages], cwd=SOURCES / program.folder, env=_environment(node), text=True,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    if built.returncode != 0:
        last = "\n".join(built.stderr.strip().splitlines()[-5:])
        raise RuntimeError(
            f"building {program.folder} failed; run `make node` again, it goes on from here:\n{last}"
        )
    (node / "bin" / f".{program.folder}").write_text(key(program))


def _kubernetes_version() -> list[str]:
    """Kubernetes knows its version from the linker alone, and talks to nobody without one."""
    found = version("kubernetes", "k8s.io/kubernetes")
    major, minor, _ = found.removeprefix("v").split(".")
    values = {
        "gitVersion": found,
        "gitMajor": major,
        "gitMinor": minor,
        "gitCommit": "0" * 40,
        "gitTreeState": "clean",
        "buildDate": "2026-01-01T00:00:00Z",
    }
    packages = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    return [f"-X {package}.{name}={value}" for package in packages for name, value in values.items()]


def _environment(node: Path) -> dict[str, str]:
    return {
        **os.environ,
        "CGO_ENABLED": "0",
        "GOFLAGS": "-mod=readonly",
        "GOMODCACHE": str(node / "go" / "mod"),
        "GOCACHE": str(node / "go" / "build"),
        "GOPATH": str(node / "go" / "path"),
    }


def _go() -> str:
    found = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    wanted = ".".join(map(str, GO_VERSION))
    if not found:
        raise RuntimeError(
            f"Go {wanted} or newer builds the node, and no `go` was found: https://go.dev/dl"
        )
    text = subprocess.run([found, "env", "GOVERSION"], capture_output=True, text=True, check=True).stdout
    numbers = re.match(r"go(\d+)\.(\d+)", text)
    if not numbers or (int(numbers[1]), int(numbers[2])) < GO_VERSION:
        raise RuntimeError(f"Go {wanted} or newer builds the node, found {text.strip()}: https://go.dev/dl")
    return found


def _share(go: str, node: Path) -> None:
    """What the cluster and the tests read out of the modules: KubeRay's manifests and samples, Kubernetes'
    API description.
    """
    share = node / "share"
    shutil.rmtree(share, ignore_errors=True)
    kuberay = (
        _module(go, node, "kuberay-operator", "github.com/ray-project/kuberay/ray-operator") / "config"
    )
    for folder in ("crd", "rbac", "manager", "default", "samples"):
        _copy(kuberay / folder, share / "kuberay" / folder)
    kubernetes = _module(go, node, "kubernetes", "k8s.io/kubernetes")
    (share / "kubernetes").mkdir(parents=True)
    shutil.copyfile(
        kubernetes / "api" / "openapi-spec" / "swagger.json", share / "kubernetes" / "swagger.json"
    )
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kuberay-system"}}
    (share / "kuberay" / "namespace.yaml").write_text(yaml.safe_dump(namespace))


def _module(go: str, node: Path, program: str, module: str) -> Path:
    """The folder of a module that a program requires, fetched where it is not there."""
    found = subprocess.run(
        [go, "mod", "download", "-json", f"{module}@{version(program, module)}"],
        cwd=SOURCES / program, env=_environment(node), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return Path(json.loads(found.stdout)["Dir"])


def _copy(source: Path, target: Path) -> None:
    """Copy a folder of the read-only module cache so that it can be removed again."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
