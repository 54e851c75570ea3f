"""How long a product takes when its weight comes from memory and not from a cache."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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


def read_rate(x: Tensor, rounds: int = 5) -> float:
    """Bytes per second at which torch reads all of ``x`` once (a sum): the best of ``rounds``."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        x.sum()
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best


def streamed(
    copies: Mapping[str, Sequence[Any]], run: Callable[[str, Any], object], *, rounds: int = 15
) -> dict[str, float]:
    """Median seconds of ``run(name, copy)`` for each name.

    ``copies`` holds equal copies of one weight under each name, together larger than the last-level cache:
    they are taken in turn, so that none is still in a cache when it comes round again. Names take turns too,
    so that a slow moment of the machine hits all alike. The first two rounds warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in copies}
    with torch.inference_mode():
        for i in range(rounds + 2):
            for name, held in copies.items():
                copy = held[i % len(held)]
                start = time.perf_counter()
                run(name, copy)
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken[2:]) for name, taken in times.items()}
