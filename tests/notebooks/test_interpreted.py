"""What a learner's kernel does wrong is named, and does not happen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from labkit.course.check import Wrong
from labkit.course.interpreted import launch, tl, triton, written
from labkit.course.sandbox import Finding, examine

pytestmark = pytest.mark.needs("triton")


@triton.jit
def shifted(x, y, n, by, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i + by, mask=i < n), mask=i < n)


@triton.jit
def first_half(x, y, n, by, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n // 2), mask=i < n // 2)


@triton.jit
def always_the_first_place(x, y, n, by, BLOCK: tl.constexpr):
    tl.store(y, tl.load(x))


@triton.jit
def misspelt(x, y, n, by, BLOCK: tl.constexpr):
    tl.store(y, tl.laod(x))


@triton.jit
def without_end(x, y, n, by, BLOCK: tl.constexpr):
    while True:
        pass


@triton.jit
def not_written_yet(x, y, n, by, BLOCK: tl.constexpr):
    raise NotImplementedError


def plain(x, y, n, by, BLOCK):
    pass


def run(kernel: Any, by: int = 0, n: int = 10) -> torch.Tensor:
    x, y = torch.arange(float(n)), torch.zeros(n)
    launch(kernel, (3,), ("y",), x, y, n, by, BLOCK=4)
    return y


def test_results_come_back_with_the_program_that_wrote_them() -> None:
    y = run(shifted)
    assert y.tolist() == list(range(10))
    assert y.programs.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("kernel", "by", "words"),
    [
        (shifted, -1, r"program \(0\) reads x\[-1\]"),
        (shifted, 1, r"program \(2\) reads x\[10\]"),
        (shifted, 10**9, "lie outside"),
        (always_the_first_place, 0, r"program \(1\) writes y\[0\].*program \(0\) wrote already"),
        (plain, 0, "@triton.jit"),
    ],
)
def test_what_must_not_happen_is_named(kernel: Any, by: int, words: str) -> None:
    with pytest.raises(Wrong, match=words):
        run(kernel, by)


def test_an_input_is_not_written() -> None:
    x, y = torch.zeros(4), torch.zeros(4)
    with pytest.raises(Wrong, match="writes into y, which is an input"):
        launch(shifted, (1,), (), x, y, 4, 0, BLOCK=4)


def test_elements_that_no_program_wrote_are_counted() -> None:
    y = torch.zeros(10)
    launch(first_half, (1,), ("y",), torch.ones(10), y, 10, 0, BLOCK=16)
    with pytest.raises(Wrong, match=r"no program wrote y\[5\]: 5 of 10"):
        written(y, "y")


def found(kernel: Any, seconds: float = 20) -> Finding:
    def check(fn: Callable[..., Any]) -> None:
        fn(0)

    return examine(check, kernel, seconds=seconds, launch=run)


def test_a_kernel_fails_as_any_answer_does() -> None:
    assert found(shifted).state == "right"
    assert found(not_written_yet).state == "not attempted"
    assert "in the line `tl.store(y, tl.laod(x))`" in found(misspelt).message
    assert "not finished after 0.5 seconds" in found(without_end, 0.5).message
