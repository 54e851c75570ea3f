"""The short benchmarks run to their end and print their ratios; how large these are is never judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("command", "works"),
    [("kernels --size 1024", 5), ("model --model tiny", 7), ("serve --model tiny", 2), ("quantize --model tiny", 3)],
)
def test_every_work_beside_its_peers(tmp_path: Path, command: str, works: int) -> None:
    """On a small weight and a small model, whose figures say nothing: only that everything runs that is here."""
    out, page = tmp_path / "rows.json", tmp_path / "page.html"
    words = ["bench", *command.split(), "--rounds", "1", "--json", str(out), "--page", str(page)]
    done = subprocess.run([sys.executable, "-m", "labkit.cli", *words], capture_output=True, text=True)
    print(f"\n{done.stdout}{done.stderr}")
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert len({row["work"] for row in rows}) == works
    assert all(row["ours"] > 0 for row in rows)
    assert all(row["peer"] > 0 and row["ratio"] > 0 for row in rows if not row["why"])
    assert all("run `make" in row["why"] for row in rows if row["why"]), (
        "only what is not here is not measured"
    )
    assert page.read_text().count("<tr>") == 1 + len(rows)
