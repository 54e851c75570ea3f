"""Build the images with buildah, without a registry, and leave them where the test node takes them from.

    python cluster/images/build.py [--torch-backend cpu] [--base IMAGE] [--without-model]

``make image`` calls it. The base is debootstrap's Debian unless another is named. What this machine's
network needs (indexes, proxies, certificates) goes into the build as secrets, never into a layer.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from labkit.models import fetch
from labkit.settings import DEFAULT_MODEL, settings

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
UV = ROOT / ".venv" / "uv" / "bin" / "uv"
RELEASE = "bookworm"
MIRROR = "http://deb.debian.org"
BASE = f"localhost/bits-to-pods/base:{RELEASE}"
IMAGES = ("server", "redis")
TOOLS = ("buildah", "debootstrap", "skopeo")
# What tells pip, uv and what they start how to reach an index.
NETWORK = (
    "UV_DEFAULT_INDEX", "UV_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
)  # fmt: skip
CACHE_IN_BUILD = "/run/uv-cache"


class Stop(RuntimeError):
    """An image could not be built; the text says what to do."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="", help="an image with Debian and Python; default: made here")
    parser.add_argument("--torch-backend", default="", help="handed on to uv, for example cpu")
    parser.add_argument("--without-model", action="store_true", help="checkpoints come from a volume")
    options = parser.parse_args()
    layout = settings().node / "images" / "oci"
    layout.parent.mkdir(parents=True, exist_ok=True)
    try:
        check_tools()
        with FileLock(layout.parent / "build.lock"):
            build(options.base, options.torch_backend, not options.without_model)
            export(layout)
    except Stop as stop:
        print(f"make image: {stop}", file=sys.stderr)
        return 1
    return 0


def check_tools() -> None:
    absent = [name for name in TOOLS if shutil.which(name) is None]
    if absent:
        raise Stop(f"{', '.join(absent)} not found: run `make system-packages`")
    if os.geteuid() != 0:
        raise Stop(
            "expected root, for debootstrap and chroot; elsewhere: docker build, cluster/images/README.md"
        )


def build(base: str, torch_backend: str, with_model: bool) -> None:
    """Make both images; what is there already and still right is not made again."""
    if not base and run("buildah", "images", "--quiet", BASE, check=False).returncode != 0:
        with stage("base"):
            make_base()
    base = base or BASE
    with tempfile.TemporaryDirectory(prefix="labkit-image-") as folder:
        secrets = secret_options(os.environ, Path(folder))
        cache = Path(run(str(UV), "cache", "dir").stdout.strip())
        model = "scratch"
        if with_model:
            model = "localhost/bits-to-pods/model:dev"
            fetch.fetch()
            with stage("model"):
                bud("model", settings().cache, {"NAME": DEFAULT_MODEL}, [])
        with stage("server"):
            arguments = {
                "BASE": base, "MODEL": model, "TORCH_BACKEND": torch_backend,
                "VERSION": metadata.version("labkit"), "REVISION": revision(),
            }  # fmt: skip
            bud("server", ROOT, arguments, [*secrets, f"--volume={cache}:{CACHE_IN_BUILD}"])
        with stage("redis"):
            bud("redis", HERE, {"BASE": base}, [])


def make_base() -> None:
    """Debian with Python as an image, and nothing in it of the machine that made it."""
    with tempfile.TemporaryDirectory(prefix="labkit-base-") as folder:
        root = Path(folder, "root")
        packages = "--include=ca-certificates,python3,python3-venv"
        run("debootstrap", "--variant=minbase", packages, RELEASE, str(root), f"{MIRROR}/debian")
        clean(root)
        container = run("buildah", "from", "scratch").stdout.strip()
        run("buildah", "add", "--quiet", container, str(root), "/")
        run("buildah", "config", "--cmd", "bash", "--created-by", f"debootstrap {RELEASE}", container)
        run("buildah", "commit", "--quiet", "--rm", container, BASE)


def clean(root: Path) -> None:
    """Remove what debootstrap copied from this machine, and what apt fetches anew."""
    for name in ("hostname", "resolv.conf"):
        (root / "etc" / name).unlink(missing_ok=True)
    for pattern in ("var/log/*.log", "var/log/apt", "var/cache/apt/*", "var/lib/apt/lists/*"):
        for path in root.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    suites = (("debian", ""), ("debian", "-updates"), ("debian-security", "-security"))
    sources = [f"deb {MIRROR}/{archive} {RELEASE}{suite} main" for archive, suite in suites]
    (root / "etc" / "apt" / "sources.list").write_text("\n".join([*sources, ""]))


def bud(name: str, context: Path, arguments: Mapping[str, str], options: list[str]) -> None:
    """One ``buildah bud``. Its words are kept, and shown where it fails. The image that had the name goes, with the
    layers that nothing else has.
    """
    tag = f"localhost/bits-to-pods/{name}:dev"
    old = run("buildah", "images", "--quiet", "--no-trunc", tag, check=False).stdout.strip()
    file = HERE / ("Containerfile" if name == "server" else f"{name}.Containerfile")
    done = run(
        "buildah", "bud", "--isolation=chroot", "--layers", "--force-rm", "--format=docker",
        f"--file={file}", f"--tag={tag}",
        *([f"--ignorefile={HERE / 'Containerfile.dockerignore'}"] if name == "server" else []),
        *(f"--build-arg={key}={value}" for key, value in arguments.items()),
        *options, str(context),
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        words = (done.stdout + done.stderr).strip()[-4000:]
        raise Stop(f"`buildah bud` of {file.name} ended with status {done.returncode}:\n{words}")
    if old and old != run("buildah", "images", "--quiet", "--no-trunc", tag).stdout.strip():
        run("buildah", "rmi", old, check=False)  # a container may still stand on it


def secret_options(environment: Mapping[str, str], folder: Path) -> list[str]:
    """buildah's options for the two secrets of the Containerfile, whose files are written to ``folder``."""
    network = folder / "network"
    network.touch(mode=0o600)
    network.write_text("\n".join([*network_lines(environment), ""]))
    options = [f"--secret=id=network,src={network}"]
    if bundle := environment.get("SSL_CERT_FILE"):
        options.append(f"--secret=id=ca,src={bundle}")
    return options


def network_lines(environment: Mapping[str, str]) -> list[str]:
    """Assignments for a shell: this machine's way to an index, and uv's cache as the build sees it."""
    found = {name: value for name, value in environment.items() if name.upper() in NETWORK}
    found["UV_CACHE_DIR"] = CACHE_IN_BUILD
    if environment.get("SSL_CERT_FILE"):
        found |= dict.fromkeys(("SSL_CERT_FILE", "PIP_CERT"), "/run/secrets/ca")
    return [f"{name}={shlex.quote(value)}" for name, value in found.items()]


def revision() -> str:
    """The commit that is built, with a plus where files differ from it; empty outside a clone."""
    commit = run("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD", check=False)
    changed = run("git", "-C", str(ROOT), "status", "--porcelain", "labkit", "data", check=False)
    return "" if commit.returncode else commit.stdout.strip() + "+" * bool(changed.stdout)


def export(layout: Path) -> None:
    """Copy both images to one folder in OCI's layout, uncompressed. A layer that is there is not copied."""
    with stage("export"):
        for name in IMAGES:
            source = f"containers-storage:localhost/bits-to-pods/{name}:dev"
            target = f"oci:{layout}:docker.io/bits-to-pods/{name}:dev"
            run(
                "skopeo",
                "copy",
                "--quiet",
                "--insecure-policy",
                "--dest-oci-accept-uncompressed-layers",
                source,
                target,
            )
        for path in unused(layout):
            path.unlink()


def unused(layout: Path) -> list[Path]:
    """The blobs of a layout that no image in its index needs any more."""
    blobs = layout / "blobs" / "sha256"
    wanted = {entry["digest"] for entry in json.loads((layout / "index.json").read_text())["manifests"]}
    for digest in list(wanted):
        manifest = json.loads((blobs / digest.removeprefix("sha256:")).read_text())
        wanted |= {part["digest"] for part in (manifest["config"], *manifest["layers"])}
    return sorted(path for path in blobs.iterdir() if f"sha256:{path.name}" not in wanted)


@contextmanager
def stage(name: str) -> Iterator[None]:
    print(f"{name:8}", end="", flush=True)
    began = time.monotonic()
    try:
        yield
    finally:
        print(f"{time.monotonic() - began:6.1f} s", flush=True)


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode != 0:
        raise Stop(
            f"`{' '.join(command[:3])} …` ended with status {done.returncode}: {done.stderr.strip()[-2000:]}"
        )
    return done


if __name__ == "__main__":
    sys.exit(main())
