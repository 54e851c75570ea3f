"""Nothing a test does ends up in a person's own work/ folder."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_work_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_WORK", str(tmp_path_factory.mktemp("work")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The exercises of notebook 13 are kernels in Triton."""
    for item in items:
        if "[13." in item.nodeid:
            item.add_marker(pytest.mark.needs("triton"))
