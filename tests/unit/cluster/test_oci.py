"""Images are read as they are, and what is written is an image for others too."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest

from labkit.cluster.oci import archive, damaged, open_image

LAYERS = [
    {"etc/os": b"debian", "home/.netrc": b"secret", "src/a": b"a", "src/in/b": b"b", "srcs": b"s"},
    {"home/.wh..netrc": b"", ".wh.src": b"", "etc/os": b"trixie"},
    {"src/a": b"again"},
]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.tar"
    path.write_bytes(archive(LAYERS, made_by=["base", "clean", "code"]))
    return path


def test_layers_and_history(image: Path) -> None:
    found = open_image(image)
    assert [layer.made_by for layer in found.layers] == ["base", "clean", "code"]
    assert found.config["config"]["User"] == "10001:10001"
    assert [member.name for member in found.members(found.layers[2])] == ["src/a"]
    assert damaged(found) == []


def test_visible_by_hand(image: Path) -> None:
    seen = {path: number for path, (_, number) in open_image(image).visible().items()}
    assert seen == {"etc/os": 1, "srcs": 0, "src/a": 2}


def test_opaque_folder(tmp_path: Path) -> None:
    (tmp_path / "i.tar").write_bytes(
        archive([{"c/a": b"", "cd": b""}, {"c/.wh..wh..opq": b"", "c/n": b""}])
    )
    assert sorted(open_image(tmp_path / "i.tar").visible()) == ["c/n", "cd"]


def test_a_folder_and_compressed_layers_are_read_too(image: Path, tmp_path: Path) -> None:
    with tarfile.open(image) as tar:
        tar.extractall(tmp_path / "layout", filter="data")
    assert open_image(tmp_path / "layout").visible().keys() == open_image(image).visible().keys()


def test_a_changed_byte_is_noticed(image: Path, tmp_path: Path) -> None:
    folder = tmp_path / "layout"
    with tarfile.open(image) as tar:
        tar.extractall(folder, filter="data")
    first = open_image(folder).layers[0].digest
    blob = folder / "blobs" / first.replace(":", "/")
    blob.write_bytes(blob.read_bytes().replace(b"debian", b"Debian"))
    assert damaged(open_image(folder)) == [first]
    index = json.loads((folder / "index.json").read_text())
    manifest = folder / "blobs" / index["manifests"][0]["digest"].replace(":", "/")
    manifest.write_bytes(manifest.read_bytes() + b" ")
    with pytest.raises(ValueError, match="damaged"):
        open_image(folder)


def test_no_image_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="OCI layout"):
        open_image(tmp_path)
    with pytest.raises(FileNotFoundError, match="OCI layout"):
        open_image(tmp_path / "absent")
    (tmp_path / "i.tar").write_bytes(archive([{"a": b""}]))
    with pytest.raises(FileNotFoundError, match="no image 'other'"):
        open_image(tmp_path / "i.tar", "other")


def test_the_same_bytes_each_time() -> None:
    assert archive(LAYERS) == archive(LAYERS)


@pytest.mark.needs("skopeo")
def test_skopeo_reads_the_same(image: Path) -> None:
    done = subprocess.run(["skopeo", "inspect", f"oci-archive:{image}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    found = open_image(image)
    assert seen["Digest"] == found.digest
    assert seen["Layers"] == [layer.digest for layer in found.layers]
    raw = subprocess.run(
        ["skopeo", "inspect", "--config", f"oci-archive:{image}"], capture_output=True, check=True
    )
    assert json.load(io.BytesIO(raw.stdout))["history"] == [
        {"created_by": n} for n in ("base", "clean", "code")
    ]
