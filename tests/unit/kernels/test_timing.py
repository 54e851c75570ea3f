"""What is timed and in which order; not how long it takes."""

import time
from pathlib import Path

import pytest

from labkit.kernels.timing import cache_bytes, streamed


def test_copies_and_names_take_turns() -> None:
    seen: list[tuple[str, int]] = []
    streamed({"a": [0, 1, 2], "b": [7, 8]}, lambda name, copy: seen.append((name, copy)), rounds=2)
    assert seen == [("a", 0), ("b", 7), ("a", 1), ("b", 8), ("a", 2), ("b", 7), ("a", 0), ("b", 8)]


def test_the_least_time_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.1, 0.0, 0.2, 0.0, 3.0, 0.0, 50.0, 0.0, 2.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert streamed({"a": [0]}, lambda name, copy: None, rounds=3) == {"a": 2.0}


@pytest.mark.skipif(
    not Path("/sys/devices/system/cpu/cpu0/cache/index0/size").exists(),
    reason="the kernel tells no cache size",
)
def test_the_last_cache_is_the_largest_that_linux_tells() -> None:
    told = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    assert f"{(cache_bytes() or 0) // 1024}K" in told
    assert all(int(size[:-1]) * 1024 <= (cache_bytes() or 0) for size in told)
