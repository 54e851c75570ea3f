"""A pod's log: in whole lines, and what happens when the kubelet removes the container meanwhile."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from labkit.cluster import logs
from labkit.cluster.objects import KubeRayError

REMOVED = b"unable to retrieve container logs for containerd://ed01bfca"


def ray(*answers: list[bytes]) -> Any:
    """A client whose log requests are answered so, one after another."""
    left = iter(answers)

    def call(*_: Any, **__: Any) -> Any:
        chunks = next(left)
        return SimpleNamespace(status=200, response=SimpleNamespace(stream=lambda **_: iter(chunks)))

    client = SimpleNamespace(param_serialize=lambda *_, **__: (), call_api=call)
    return SimpleNamespace(namespace="lab", client=client, errors=lambda *_: nullcontext())


def read(client: Any) -> list[str]:
    return list(logs.pod_output(client, "pod", follow=True, container=None, tail=None, previous=True))


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "POLL_S", 0.0)


def test_pieces_are_whole_lines_and_the_last_may_lack_its_end() -> None:
    chunks = [b"one\ntw", b"o\nthr\xc3", b"\xa9e\n", b"four"]
    assert read(ray(chunks)) == ["one\n", "two\n", "thr\u00e9e\n", "four"]
    assert "".join(read(ray([]))) == ""


def test_a_container_that_was_removed_meanwhile_is_asked_for_again() -> None:
    assert read(ray([REMOVED], [REMOVED], [b"why it ended\n"])) == ["why it ended\n"]
    with pytest.raises(
        KubeRayError, match=r"Pod pod in namespace lab: its container was removed.*ask again"
    ):
        read(ray([REMOVED], [REMOVED], [REMOVED]))
