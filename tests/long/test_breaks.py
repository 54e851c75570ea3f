"""Break the quantizers on purpose: the notebook that teaches the thing and a unit test must both turn red.

Each break is one substitution in a copy of the package; one that no longer finds its text fails too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Break:
    file: str
    text: str
    becomes: str
    notebook: str
    unit: str


BREAKS = {
    "a scale 1 % too large": Break(
        "quant/grid.py",
        "        lo, hi = lo.double(), hi.double()\n",
        "        lo, hi = lo.double() * 1.01, hi.double() * 1.01\n",
        "02_scale_and_zero_point",
        "test_integers.py",
    ),
    "half rounded up, not to even": Break(
        "quant/grid.py",
        "nearest = torch.round(x.detach())",
        "nearest = torch.floor(x.detach() + 0.5)",
        "02_scale_and_zero_point",
        "test_integers.py",
    ),
    "a zero point off by one": Break(
        "quant/grid.py",
        "torch.round(steps).clamp(self.lowest, self.highest)",
        "(torch.round(steps) + 1).clamp(self.lowest, self.highest)",
        "02_scale_and_zero_point",
        "test_integers.py",
    ),
    "a dropped clamp": Break(
        "quant/grid.py",
        "return steps.clamp(self.lowest, self.highest)",
        "return steps",
        "02_scale_and_zero_point",
        "test_integers.py",
    ),
    "groups of rows in place of groups of columns": Break(
        "quant/blocks.py",
        "min(self.block[0] or max(rows, 1), max(rows, 1)), min(\n"
        "            self.block[1] or max(columns, 1), max(columns, 1)\n",
        "min(self.block[1] or max(rows, 1), max(rows, 1)), min(\n"
        "            self.block[0] or max(columns, 1), max(columns, 1)\n",
        "06_gptq",
        "test_blocks.py",
    ),
}


@pytest.fixture(params=list(BREAKS), ids=[name.replace(" ", "-") for name in BREAKS])
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Break, dict[str, str]]:
    """One break, and an environment in which Python imports the broken copy."""
    found = BREAKS[request.param]
    shutil.copytree(ROOT / "labkit", tmp_path / "labkit", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").symlink_to(ROOT / "data")
    target = tmp_path / "labkit" / found.file
    source = target.read_text()
    assert source.count(found.text) == 1, (
        f"{found.file} holds the text to break {source.count(found.text)} times"
    )
    target.write_text(source.replace(found.text, found.becomes))
    return found, {**os.environ, "PYTHONPATH": str(tmp_path), "LABKIT_WORK": str(tmp_path / "work")}


def status(environment: dict[str, str], *arguments: str) -> int:
    # -P: the working directory must not come before the broken copy.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout[-2000:])
    return done.returncode


def test_the_unit_tests_turn_red(broken: tuple[Break, dict[str, str]]) -> None:
    found, environment = broken
    assert status(environment, f"tests/unit/quant/{found.unit}") == 1


def test_the_notebook_turns_red(broken: tuple[Break, dict[str, str]]) -> None:
    found, environment = broken
    notebook = f"notebooks/{found.notebook}.ipynb"
    assert status(environment, "--nbval", "--nbval-current-env", "--nbval-cell-timeout=180", notebook) == 1
