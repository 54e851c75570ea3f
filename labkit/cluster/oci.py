"""A container image without its tools: a folder or tar file in the layout of the Open Container Initiative.

    image = open_image("image.tar")
    image.config["config"]["User"], [layer.bytes for layer in image.layers]

Format: https://github.com/opencontainers/image-spec, image-layout.md, manifest.md, config.md and layer.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"
MEDIA = "application/vnd.oci.image"
NAME = "org.opencontainers.image.ref.name"


@dataclass(frozen=True)
class Layer:
    """One layer: what it adds to those below.

    digest   sha256 of the blob, as the manifest gives it
    bytes    of the blob, as it is stored and pulled
    made_by  the instruction that made it, from the image's history
    """

    digest: str
    bytes: int
    made_by: str


@dataclass(frozen=True)
class Image:
    """An image: ``config`` is its JSON, the lowest layer stands first."""

    path: Path
    digest: str
    config: dict[str, Any]
    layers: list[Layer]

    def members(self, layer: Layer) -> Iterator[tarfile.TarInfo]:
        """The entries of a layer, whiteouts among them, without reading what is in the files."""
        with _blob(self.path, layer.digest) as blob, tarfile.open(fileobj=blob) as tar:
            yield from tar

    def visible(self) -> dict[str, tuple[tarfile.TarInfo, int]]:
        """What a container sees: path to entry and the number of the layer that it comes from."""
        seen: dict[str, tuple[tarfile.TarInfo, int]] = {}
        for number, layer in enumerate(self.layers):
            members = list(self.members(layer))
            for member in members:
                folder, _, name = _plain(member.name).rpartition("/")
                if name == OPAQUE:
                    _forget(seen, f"{folder}/" if folder else "")
                elif name.startswith(WHITEOUT):
                    gone = f"{folder}/{name[len(WHITEOUT) :]}".lstrip("/")
                    seen.pop(gone, None)
                    _forget(seen, f"{gone}/")
            for member in members:
                if not Path(member.name).name.startswith(WHITEOUT):
                    seen[_plain(member.name)] = (member, number)
        return seen


def open_image(path: Path | str, name: str | None = None) -> Image:
    """The image in a layout; ``name`` chooses among several by the end of their reference.

    Raises FileNotFoundError where there is no layout or no such image in it, ValueError for a blob that is not what
    its digest says (layers are not read for that: ``damaged`` does).
    """
    path = Path(path)
    try:
        with _open(path, "index.json") as file:
            index = json.load(file)
    except (KeyError, FileNotFoundError, NotADirectoryError, tarfile.ReadError) as error:
        raise FileNotFoundError(f"{path} holds no image in OCI layout: {error}") from error
    names = [entry.get("annotations", {}).get(NAME, "") for entry in index["manifests"]]
    chosen = [i for i, each in enumerate(names) if name is None or each.endswith(name)]
    if not chosen:
        raise FileNotFoundError(f"{path} holds no image {name!r}; it has {', '.join(names)}")
    digest = index["manifests"][chosen[0]]["digest"]
    manifest = _json(path, digest)
    config = _json(path, manifest["config"]["digest"])
    made_by = [
        each.get("created_by", "") for each in config.get("history", []) if not each.get("empty_layer")
    ]
    made_by += [""] * (len(manifest["layers"]) - len(made_by))
    layers = [
        Layer(each["digest"], each["size"], how)
        for each, how in zip(manifest["layers"], made_by, strict=False)
    ]
    return Image(path, digest, config, layers)


def archive(layers: Sequence[Mapping[str, bytes]], *, made_by: Sequence[str] = ()) -> bytes:
    """A small image as a tar file: each layer is path to content. The same bytes each time.

    made_by  the history, one entry a layer; default: "layer 0", "layer 1", ...
    """
    made_by = made_by or [f"layer {number}" for number in range(len(layers))]
    tars = [_tar(layer) for layer in layers]
    config = _as_json(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"User": "10001:10001"},
            "rootfs": {"type": "layers", "diff_ids": [digest_of(tar) for tar in tars]},
            "history": [{"created_by": how} for how in made_by],
        }
    )
    manifest = _as_json(
        {
            "schemaVersion": 2,
            "mediaType": f"{MEDIA}.manifest.v1+json",
            "config": _descriptor("config.v1+json", config),
            "layers": [_descriptor("layer.v1.tar", tar) for tar in tars],
        }
    )
    index = {"schemaVersion": 2, "manifests": [_descriptor("manifest.v1+json", manifest)]}
    blobs = {f"blobs/sha256/{digest_of(blob)[7:]}": blob for blob in (*tars, config, manifest)}
    return _tar({"oci-layout": b'{"imageLayoutVersion":"1.0.0"}', "index.json": _as_json(index), **blobs})


def digest_of(blob: bytes) -> str:
    """The name of a blob: ``sha256:`` and 64 digits."""
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def damaged(image: Image) -> list[str]:
    """The digests of the layers whose bytes are not what the manifest says."""
    return [layer.digest for layer in image.layers if _digest(image.path, layer.digest) != layer.digest]


def _tar(files: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def _as_json(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()


def _descriptor(kind: str, blob: bytes) -> dict[str, Any]:
    return {"mediaType": f"{MEDIA}.{kind}", "digest": digest_of(blob), "size": len(blob)}


def _digest(path: Path, digest: str) -> str:
    found = hashlib.sha256()
    with _blob(path, digest) as blob:
        while piece := blob.read(1 << 20):
            found.update(piece)
    return f"sha256:{found.hexdigest()}"


def _json(path: Path, digest: str) -> dict[str, Any]:
    with _blob(path, digest) as blob:
        data = blob.read()
    if digest_of(data) != digest:
        raise ValueError(f"the blob {digest[:19]}… of {path} is damaged: its bytes have another digest")
    found: dict[str, Any] = json.loads(data)
    return found


@contextmanager
def _blob(path: Path, digest: str) -> Iterator[IO[bytes]]:
    with _open(path, f"blobs/{digest.replace(':', '/')}") as file:
        yield file


@contextmanager
def _open(path: Path, name: str) -> Iterator[IO[bytes]]:
    """A file of the layout, in a folder or in a tar archive."""
    if path.is_dir():
        with (path / name).open("rb") as file:
            yield file
        return
    with tarfile.open(path) as tar:
        held = tar.extractfile(name)
        if held is None:
            raise KeyError(f"{name} is no file")
        yield held


def _plain(name: str) -> str:
    return name.removeprefix("./").strip("/")


def _forget(seen: dict[str, Any], under: str) -> None:
    for path in [each for each in seen if each.startswith(under)]:
        del seen[path]
