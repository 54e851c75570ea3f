"""Whatever a learner's function does, the check ends with a sentence."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from labkit.course.check import Wrong, equal, number, tensor
from labkit.course.sandbox import MAX_PRINTED, Finding, examine

X = torch.tensor([1.0, 2.0])


def check(function: Callable[..., Any]) -> None:
    x = X.clone()
    equal(tensor(function(x), "your result", shape=(2,)), X * 2)
    assert torch.equal(x, X), "the check's own input was changed"


def find(function: Any, seconds: float = 5.0) -> Finding:
    return examine(check, function, seconds=seconds)


def test_a_right_answer_in_another_dtype_or_in_place_passes() -> None:
    assert find(lambda x: (x * 2).double()).state == "right"
    assert find(lambda x: x.mul_(2)).state == "right"
    assert find(lambda x: x.numpy() * 2).state == "right"
    assert find(lambda x: (x * 2).to(torch.int32)).state == "right"


def test_a_gradient_reaches_the_checks_own_tensor() -> None:
    def slope(function: Callable[..., Any]) -> None:
        x = X.clone().requires_grad_()
        [found] = torch.autograd.grad(function(x).sum(), x)
        equal(found, torch.full((2,), 2.0), "the gradient")
        assert torch.equal(x, X), "the check's own input was changed"

    assert examine(slope, lambda x: 2 * x, seconds=5).state == "right"
    assert examine(slope, lambda x: x.mul_(2), seconds=5).state == "right"
    assert "the gradient" in examine(slope, lambda x: 3 * x, seconds=5).message


def recurses(x: Any) -> Any:
    return recurses(x)


def exits(x: Any) -> None:
    sys.exit(0)


def raises_keyboard_interrupt(x: Any) -> None:
    raise KeyboardInterrupt


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def raises_unprintable(x: Any) -> None:
    raise Unprintable


def raises_base(x: Any) -> None:
    raise GeneratorExit("out")


def divides(x: Any) -> float:
    return 1 / 0


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: None, "is None"),
        (lambda x: "2, 4", "'2, 4'; expected a tensor"),
        (lambda x: [2.0, 4.0], "[2.0, 4.0]; expected a tensor"),
        (lambda x: x * 2 + 0j, "complex64"),
        (lambda x: (x * 2).to_sparse(), "plain real numbers"),
        (lambda x: x[:1] * 2, "shape (1,); expected (2,)"),
        (lambda x: x * float("nan"), "2 NaN, the first at [0]"),
        (lambda x: x / 0, "2 infinities"),
        (lambda x: x * 3, "is 3 at [0]; expected 2 (2 of 2 elements differ)"),
        (lambda x: (v for v in x), "a generator"),
        (lambda: X, "Keep the signature"),
        (lambda x, scale: x, "Keep the signature"),
        (divides, "ZeroDivisionError: division by zero in the line `return 1 / 0`"),
        (recurses, "called itself without end"),
        (exits, "SystemExit"),
        (raises_keyboard_interrupt, "interrupted"),
        (raises_unprintable, "raised Unprintable"),
        (raises_base, "GeneratorExit: out"),
        (lambda x: x.int().float().to(torch.int64) @ x, "raised RuntimeError"),
        (None, "expected the function itself"),
        (X * 2, "without parentheses"),
    ],
)
def test_a_wrong_answer_becomes_a_sentence(function: Any, words: str) -> None:
    finding = find(function)
    assert finding.state == "not yet"
    assert words in finding.message


def test_what_was_given_is_told() -> None:
    assert find(lambda x: None).given == "x = a float32 tensor of shape (2,) [1, 2]"


def test_only_the_starter_counts_as_not_attempted() -> None:
    def starter(x: Any) -> Any:
        raise NotImplementedError

    def torch_lacks_it(x: Any) -> Any:
        raise NotImplementedError("\"round_cpu\" not implemented for 'Bool'")

    assert find(starter).state == "not attempted"
    assert find(torch_lacks_it).state == "not yet"


def endless(x: Any) -> None:
    while True:
        pass


def endless_and_stubborn(x: Any) -> None:
    while True:
        try:  # noqa: SIM105
            time.sleep(0.01)
        except BaseException:
            pass


def endless_print(x: Any) -> None:
    while True:
        print("again", x)


@pytest.mark.parametrize("function", [endless, endless_and_stubborn, endless_print])
def test_an_endless_loop_ends(function: Any) -> None:
    before = signal.getsignal(signal.SIGALRM), sys.gettrace()
    finding = find(function, seconds=0.3)
    assert finding.state == "not yet"
    assert "had not finished after 0.3 seconds" in finding.message
    assert (signal.getsignal(signal.SIGALRM), sys.gettrace()) == before
    assert len(finding.printed) <= MAX_PRINTED


def test_off_the_main_thread_a_check_works_too() -> None:
    found: list[Finding] = []
    thread = threading.Thread(target=lambda: found.append(find(lambda x: x * 2)))
    thread.start()
    thread.join()
    assert found[0].state == "right"


def test_prints_are_kept_apart_and_the_world_is_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)

    def messy(x: Any) -> Any:
        print("seen", x)
        sys.stdout.close()
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        return x * 2

    finding = find(messy)
    assert finding.state == "right"
    assert finding.printed == "seen tensor([1., 2.])"
    assert capsys.readouterr().out == ""
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def test_a_check_that_stumbles_over_an_answer_says_so() -> None:
    def careless(function: Any) -> None:
        scale, _ = function(X)
        assert scale

    assert "could not be read" in examine(careless, lambda x: 3, seconds=5).message


def test_mistakes_are_named_before_they_are_described() -> None:
    with pytest.raises(Wrong, match="per tensor"):
        tensor(
            torch.ones(1), "your scale", shape=(2, 1), mistakes={"your scale is per tensor": torch.ones(1)}
        )
    with pytest.raises(Wrong, match="clamp"):
        equal(
            torch.tensor([19]),
            torch.tensor([15]),
            mistakes={"no": torch.tensor([3]), "clamp": torch.tensor([19])},
        )
    with pytest.raises(Wrong, match="NaN"):
        number(float("nan"))
    with pytest.raises(Wrong, match="whole numbers"):
        tensor(torch.tensor([0.5]), integral=True)
