"""``labkit bench kernels --device cuda``: where there is no GPU it says so, and it tells how it is repeated.

That it runs to its end is shown by tests/unit/kernels/gpu, on a GPU or in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from typer.testing import CliRunner

from labkit.bench import gpu, suite
from labkit.bench.measure import Row, Setting
from labkit.cli import app


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["bench", "kernels", "--device", "cuda"])
    assert done.exit_code != 0 and "nothing was measured" in str(done.exception)


@pytest.mark.parametrize(
    ("size", "shapes", "command"),
    [
        (None, gpu.SHAPES, "labkit bench kernels --threads 2 --rounds 3 --device cuda"),
        (512, [(512, 512)], "labkit bench kernels --threads 2 --rounds 3 --size 512 --device cuda"),
    ],
)
def test_what_is_measured_and_how_it_is_repeated(
    monkeypatch: pytest.MonkeyPatch, size: int | None, shapes: list[tuple[int, int]], command: str
):
    def fake(
        setting: Setting, device: str, rounds: int, shapes: list[tuple[int, int]]
    ) -> Iterator[list[Row]]:
        told.append((setting.command, device, rounds, shapes))
        yield []

    told: list[tuple[str, str, int, list[tuple[int, int]]]] = []
    monkeypatch.setattr(gpu, "gpu", fake)
    assert list(suite.run(["kernels"], Setting(2, ""), rounds=3, size=size, device="cuda")) == [[]]
    assert told == [(command, "cuda", 3, shapes)]
