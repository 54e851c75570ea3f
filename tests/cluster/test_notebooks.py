"""Notebooks 20 and 21 with the image and the cluster that they are about; the notebooks' own tier runs them without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from node import Node

ROOT = Path(__file__).resolve().parents[2]
CELL_TIMEOUT = 400  # seconds
LIMIT_S = 600


@pytest.mark.parametrize("name", ["20_model_container", "21_ray_on_kubernetes"])
def test_live(name: str, node: Node, image: str, tmp_path: Path) -> None:
    """Each compared cell prints what is stored, and each step really runs."""
    environment = {**os.environ, "LABKIT_LIVE": "1", "LABKIT_WORK": str(tmp_path)}
    environment.pop("LABKIT_RECORD", None)
    nbval = ["--nbval", "--nbval-current-env", f"--nbval-cell-timeout={CELL_TIMEOUT}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *nbval, f"notebooks/{name}.ipynb"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stdout[-6000:]
