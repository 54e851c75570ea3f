"""How long a product takes when its weight comes from memory and not from a cache."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def cache_bytes() -> int | None:
    """Bytes of the machine's last-level cache as the operating system tells them, or None where it does not."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"(\d+)K", path.read_text().strip()):
            sizes.append(int(match[1]) * 1024)
    if sys.platform == "darwin":
        for name in ("hw.perflevel0.l2cachesize", "hw.l2cachesize", "hw.l3cachesize"):
            told = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True).stdout.strip()
            sizes.append(int(told) if told.isdigit() else 0)
    if max(sizes) == 0 and hasattr(os, "sysconf") and "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names:
        sizes.append(max(0, os.sysconf("SC_LEVEL3_CACHE_SIZE")))
    return max(sizes) or None


def streamed(
    copies: Mapping[str, Sequence[Any]], run: Callable[[str, Any], object], *, rounds: int = 20
) -> dict[str, float]:
    """Least seconds of ``run(name, copy)`` for each name: what else the machine does only adds time.

    ``copies`` holds copies of one weight under each name. A round runs one of each, so all the others are
    read before one comes round again: together they should be larger than the last-level cache. The first
    two rounds warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in copies}
    with torch.inference_mode():
        for i in range(rounds + 2):
            for name, held in copies.items():
                copy = held[i % len(held)]
                start = time.perf_counter()
                run(name, copy)
                times[name].append(time.perf_counter() - start)
    return {name: min(taken[2:]) for name, taken in times.items()}
