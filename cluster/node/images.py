"""Images as they lie in a folder in OCI's layout, on their way to containerd: without the blobs that it has."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Container
from pathlib import Path
from typing import IO

REFERENCE = "org.opencontainers.image.ref.name"
NAME = "io.containerd.image.name"  # what containerd goes by; else it puts a prefix before the reference


def pack(layout: Path, have: Container[str], out: IO[bytes]) -> None:
    """Write the layout as a tar stream that ``ctr images import`` reads.

    have  digests, such as ``sha256:…``, of the blobs to leave out
    """
    index = json.loads((layout / "index.json").read_text())
    # What lost its name to a newer image lies there until the builder removes it.
    index["manifests"] = [e for e in index["manifests"] if REFERENCE in e.get("annotations", {})]
    for entry in index["manifests"]:
        entry["annotations"][NAME] = entry["annotations"][REFERENCE]
    with tarfile.open(fileobj=out, mode="w|", bufsize=1 << 20) as tar:
        add(tar, "oci-layout", (layout / "oci-layout").read_bytes())
        for blob in sorted((layout / "blobs" / "sha256").iterdir()):
            if f"sha256:{blob.name}" not in have:
                tar.add(blob, str(blob.relative_to(layout)))
        add(tar, "index.json", json.dumps(index).encode())


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """One more file, from memory."""
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
