"""What a kept result is named by changes with whatever its codes depend on."""

from __future__ import annotations

from pathlib import Path

import pytest

from labkit.models.fingerprint import code

QUANTIZES = ["gptq.py", "grid.py", "quantize.py", "columns.py", "columns.h", "vectors.h", "build.py"]


@pytest.mark.parametrize("name", QUANTIZES)
def test_the_code_that_quantizes_counts(name: str, monkeypatch: pytest.MonkeyPatch):
    before, read = code(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b" " * (path.name == name))
    assert code() != before


@pytest.mark.parametrize("name", ["step.h", "engine.py", "cli.py"])
def test_other_code_does_not(name: str, monkeypatch: pytest.MonkeyPatch):
    before, read = code(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b" " * (path.name == name))
    assert code() == before
