"""A notebook's live steps: run where there is something to run on, else read as they were kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from labkit.course import recorded
from labkit.course.recorded import Steps
from labkit.files import data_path


class Cluster:
    calls = 0


def connected() -> Cluster:
    return Cluster()


def alone() -> Cluster:
    raise RuntimeError("no cluster\n was named")


def count(cluster: Cluster) -> dict[str, Any]:
    Cluster.calls += 1
    return {"pods": (1, 2), "calls": Cluster.calls}


@pytest.fixture
def steps(
    tmp_path: Path, clean_environment: pytest.MonkeyPatch
) -> Callable[[Callable[[], Cluster]], Steps[Cluster]]:
    """Makes the steps of a notebook whose data lies in ``tmp_path``."""
    (tmp_path / "recorded").mkdir()
    clean_environment.setattr(recorded, "data_path", lambda name: tmp_path / name)
    Cluster.calls = 0
    return lambda connect: Steps("98", connect, lambda cluster: {"Kubernetes": "1.2"})


def test_a_run_is_kept_and_shown_elsewhere(
    steps: Any, clean_environment: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean_environment.setenv("LABKIT_RECORD", "1")
    live = steps(connected)
    result = live.step(count)
    assert live.live and result == {"pods": [1, 2], "calls": 1}, "as JSON gives it back, also when it runs"
    live.close()
    clean_environment.delenv("LABKIT_RECORD")
    kept = json.loads((tmp_path / "recorded" / "98.json").read_text())
    assert kept["versions"]["Kubernetes"] == "1.2" and kept["date"] and "labkit" in kept["versions"]

    elsewhere = steps(alone)
    assert not elsewhere.live and elsewhere.step(count) == result
    assert Cluster.calls == 1, "what is recorded is not run"
    assert elsewhere.seconds["count"] == kept["steps"]["count"]["seconds"]
    elsewhere.close()


def test_a_run_is_not_kept_unasked(steps: Any, tmp_path: Path) -> None:
    live = steps(connected)
    live.step(count)
    live.close()
    assert not (tmp_path / "recorded" / "98.json").exists()


def test_the_line_says_which_it_is(steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(recorded, "display", lambda bundle, raw: said.append(bundle["text/markdown"]))
    (tmp_path / "recorded" / "98.json").write_text(
        json.dumps({"date": "2026-01-02", "versions": {"Kubernetes": "1.1"}, "steps": {}})
    )
    steps(connected)
    steps(alone)
    assert said[0].startswith("**Live**") and "Kubernetes 1.2" in said[0]
    assert said[1].startswith("**Recorded on 2026-01-02** with Kubernetes 1.1")
    assert said[1].endswith("no cluster was named.")


@pytest.mark.parametrize("name", ["LABKIT_LIVE", "LABKIT_RECORD"])
def test_a_real_run_may_be_insisted_on(
    steps: Any, clean_environment: pytest.MonkeyPatch, name: str
) -> None:
    clean_environment.setenv(name, "1")
    with pytest.raises(RuntimeError, match="no cluster"):
        steps(alone)


def test_a_recorded_run_may_be_insisted_on(
    steps: Any, clean_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "recorded" / "98.json").write_text('{"date": "d", "versions": {}, "steps": {}}')
    clean_environment.setenv("LABKIT_LIVE", "0")
    found = steps(connected)
    assert not found.live
    with pytest.raises(RuntimeError, match="recorded"):
        _ = found.target
    with pytest.raises(KeyError, match="no step 'count'"):
        found.step(count)


@pytest.mark.parametrize("path", sorted(data_path("recorded").glob("*.json")), ids=lambda path: path.stem)
def test_what_ships_names_its_source(path: Path) -> None:
    kept = json.loads(path.read_text(encoding="utf-8"))
    assert kept["date"] and kept["versions"] and "LABKIT_RECORD=1" in kept["command"]
    assert all(set(entry) == {"seconds", "result"} for entry in kept["steps"].values())
    assert "/root/" not in path.read_text(encoding="utf-8") and "/tmp/" not in path.read_text(
        encoding="utf-8"
    )
