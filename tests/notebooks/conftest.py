"""Nothing a test does ends up in a person's own work/ folder."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _own_work_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_WORK", str(tmp_path_factory.mktemp("work")))
