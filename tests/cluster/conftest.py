"""The real cluster of these tests: the project's own node, started for them and stopped after them."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from labkit.cluster.kuberay import KubeRay
from labkit.settings import settings

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "cluster" / "node"))

from node import Node  # noqa: E402


@pytest.fixture(scope="session")
def node() -> Iterator[Node]:
    """The node, up. One that runs already is used as it is, and left running."""
    found = Node(settings().node)
    started = not found.answers()
    if started:
        found.up()
    os.environ.pop("LABKIT_KUBE_CONTEXT", None)  # these tests are about the node, whatever else is named
    yield found
    if started:
        found.down()


@pytest.fixture(scope="session")
def image(node: Node) -> str:
    """The model server's image, as it was built last, in the node."""
    node.load_image(node.folder / "images" / "oci")
    return "bits-to-pods/server:dev"


@contextmanager
def fresh_namespace(node: Node) -> Iterator[str]:
    """The lab's own label and the strictest pod security; on its way out afterwards, with all that is in it."""
    ray = KubeRay(namespace=f"test-{secrets.token_hex(3)}")
    node.free_volumes()
    ray.ensure_namespace()
    yield ray.namespace
    ray.delete_namespace(wait=False)  # ten seconds each, of which no test needs to see the end


@pytest.fixture
def namespace(node: Node) -> Iterator[str]:
    """A namespace of this test's own."""
    with fresh_namespace(node) as name:
        yield name


@pytest.fixture(scope="module")
def module_namespace(node: Node) -> Iterator[str]:
    """A namespace that the tests of one file share."""
    with fresh_namespace(node) as name:
        yield name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever asks for the node needs it built, and so does the image."""
    for item in items:
        for fixture, part in (("node", "test node"), ("image", "server image")):
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.needs(part))
