"""What the image's build does on its own: this machine's network as secrets, and what of a layout is still needed."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shlex
import stat
import subprocess
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from labkit.cluster.oci import archive, open_image

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = "docker.io/bits-to-pods/server:dev"


def module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


build = module("cluster/images/build.py")
images = module("cluster/node/images.py")


def as_a_shell_reads(lines: list[str]) -> dict[str, str]:
    script = "set -a; " + "; ".join(lines) + "; env -0"
    done = subprocess.run(["sh", "-c", script], env={}, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.split("\0") if line)


def test_the_build_gets_the_way_to_an_index_and_nothing_else() -> None:
    machine = {
        "UV_DEFAULT_INDEX": "https://me:p$w'd&x@index.example/simple?a=1 2",
        "https_proxy": "http://proxy.example:3128",
        "AWS_SECRET_ACCESS_KEY": "no",
        "PIP_FIND_LINKS": "/a/folder/of/this/machine",
        "HOME": "/root",
    }
    seen = as_a_shell_reads(build.network_lines(machine))
    assert seen["UV_DEFAULT_INDEX"] == machine["UV_DEFAULT_INDEX"]
    assert seen["https_proxy"] == machine["https_proxy"]
    assert not {"AWS_SECRET_ACCESS_KEY", "PIP_FIND_LINKS", "HOME", "SSL_CERT_FILE"} & set(seen)


def test_certificates_are_named_as_the_build_sees_them() -> None:
    seen = as_a_shell_reads(build.network_lines({"SSL_CERT_FILE": "/etc/ours.pem"}))
    assert (seen["SSL_CERT_FILE"], seen["PIP_CERT"]) == ("/run/secrets/ca", "/run/secrets/ca")


def test_secrets_are_files_that_others_cannot_read(tmp_path: Path) -> None:
    options = build.secret_options(
        {"SSL_CERT_FILE": "/etc/ours.pem", "PIP_INDEX_URL": "https://x"}, tmp_path
    )
    assert options == [f"--secret=id=network,src={tmp_path}/network", "--secret=id=ca,src=/etc/ours.pem"]
    assert stat.S_IMODE((tmp_path / "network").stat().st_mode) == 0o600
    assert "PIP_INDEX_URL=https://x" in (tmp_path / "network").read_text().splitlines()


def test_the_base_keeps_nothing_of_the_machine_that_made_it(tmp_path: Path) -> None:
    traces = ("etc/hostname", "etc/resolv.conf", "var/log/dpkg.log", "var/log/apt/history.log",
              "var/cache/apt/archives/x.deb", "var/lib/apt/lists/index")  # fmt: skip
    for name in (*traces, "etc/os-release", "etc/apt/sources.list"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("deb http://a.mirror.example/debian bookworm main\n")
    build.clean(tmp_path)
    assert not [name for name in traces if (tmp_path / name).exists()]
    assert (tmp_path / "etc" / "os-release").exists()
    lines = (tmp_path / "etc" / "apt" / "sources.list").read_text().splitlines()
    assert [shlex.split(line)[1:3] for line in lines] == [
        ["http://deb.debian.org/debian", "bookworm"],
        ["http://deb.debian.org/debian", "bookworm-updates"],
        ["http://deb.debian.org/debian-security", "bookworm-security"],
    ]


def test_image_and_environment_use_the_same_uv() -> None:
    (there,) = re.findall(
        r"^ARG UV_VERSION=(\S+)", (ROOT / "cluster/images/Containerfile").read_text(), re.M
    )
    (here,) = re.findall(r'^UV_VERSION = "(\S+)"', (ROOT / "tools/setup.py").read_text(), re.M)
    assert there == here


def layout_of(folder: Path, *layers: dict[str, bytes]) -> Path:
    """A layout as skopeo leaves one, made of labkit's own small archive."""
    with tarfile.open(fileobj=io.BytesIO(archive(layers))) as tar:
        tar.extractall(folder, filter="data")
    index = json.loads((folder / "index.json").read_text())
    index["manifests"][0]["annotations"] = {images.REFERENCE: REFERENCE}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_blobs_of_an_older_image_go_and_shared_ones_stay(tmp_path: Path) -> None:
    layout = layout_of(tmp_path, {"base": b"shared"}, {"labkit": b"old"})
    old = {path.name for path in (layout / "blobs" / "sha256").iterdir()}
    shared = open_image(layout).layers[0].digest.removeprefix("sha256:")
    assert build.unused(layout) == []
    layout_of(layout, {"base": b"shared"}, {"labkit": b"new"})
    assert {path.name for path in build.unused(layout)} == old - {shared}
    for path in build.unused(layout):
        path.unlink()
    assert open_image(layout).visible().keys() == {"base", "labkit"}


def packed(layout: Path, have: set[str]) -> tuple[list[str], dict[str, Any]]:
    stream = io.BytesIO()
    images.pack(layout, have, stream)
    with tarfile.open(fileobj=io.BytesIO(stream.getvalue())) as tar:
        index = tar.extractfile("index.json")
        assert index is not None
        return tar.getnames(), json.load(index)


def test_containerd_gets_the_blobs_it_lacks_under_the_name_that_pods_use(tmp_path: Path) -> None:
    layout = layout_of(tmp_path, {"base": b"big"}, {"labkit": b"small"})
    base, labkit = (layer.digest for layer in open_image(layout).layers)
    everything, _ = packed(layout, set())
    names, index = packed(layout, {base})
    assert set(everything) - set(names) == {f"blobs/sha256/{base[7:]}"}
    assert f"blobs/sha256/{labkit[7:]}" in names
    assert index["manifests"][0]["annotations"]["io.containerd.image.name"] == REFERENCE


def test_a_failed_build_says_what_and_shows_the_words(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 127, "STEP 3/14: RUN uv", "uv: not found")
    monkeypatch.setattr(build, "run", lambda *command, check: failed)
    with pytest.raises(build.Stop, match=r"(?s)redis\.Containerfile ended with status 127.*uv: not found"):
        build.bud("redis", Path("."), {}, [])


def test_a_missing_tool_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        build.Stop, match="buildah, debootstrap, skopeo not found: run `make system-packages`"
    ):
        build.check_tools()
