"""The short benchmarks run to their end and print their ratios; how large these are is never judged."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_int4_cpu() -> None:
    command = [sys.executable, str(HERE / "int4_cpu.py"), "--rounds", "11"]
    done = subprocess.run(command, capture_output=True, text=True)
    print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"\d\.\d", done.stdout)) >= 4
