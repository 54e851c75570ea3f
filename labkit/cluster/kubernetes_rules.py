"""What Kubernetes checks in code and its schemas do not say, as far as the lab's own manifests need it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from labkit.cluster import names
from labkit.cluster.structural import Violation


def metadata(manifest: dict[str, Any]) -> Iterator[Violation]:
    """Names, labels and annotations, which every kind has. ``manifest`` may be of any shape."""
    found = manifest.get("metadata")
    if not isinstance(found, dict):
        if "metadata" not in manifest:
            yield ("metadata", "name"), "is missing, and is required here"
        return
    name = found.get("name")
    if name is None and "generateName" not in found:
        yield ("metadata", "name"), "is missing, and is required here"
    for key in ("labels", "annotations"):
        entries = found.get(key)
        if not isinstance(entries, dict):
            continue
        for entry, value in entries.items():
            wrong = names.label_key(entry if key == "labels" else entry.lower())
            if key == "labels" and isinstance(value, str):
                wrong = wrong or names.label_value(value)
            if wrong:
                yield ("metadata", key, entry), wrong


def violations(api_version: str, kind: str, manifest: dict[str, Any]) -> Iterator[Violation]:
    """What else the API server refuses in one of its own kinds. ``manifest`` has passed its schema."""
    name = manifest["metadata"].get("name")
    rbac = api_version.startswith("rbac.authorization.k8s.io/")  # there, colons and capitals are allowed
    if name is not None and not rbac and (wrong := names.dns_subdomain(name)):
        yield ("metadata", "name"), wrong
