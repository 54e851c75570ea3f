"""HQQ against its equations in plain numpy, a search for the proximal step, and the error it is made for."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from labkit.quant import QuantSpec, Stats, fit, hqq, rtn
from labkit.quant.hqq import _shrink


def heavy(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_t(3, size=(rows, columns)) * 0.05)


def by_the_equations(
    W: np.ndarray,
    s: np.ndarray,
    z: np.ndarray,
    top: int,
    p: float,
    beta: float,
    kappa: float,
    iterations: int,
) -> np.ndarray:
    """z of groups W (groups, size), with scale s and first z (groups, 1)."""
    least = np.inf
    for _ in range(iterations):
        W_q = np.clip(np.rint(W / s + z), 0, top)
        rest = W - s * (W_q - z)
        with np.errstate(divide="ignore"):
            W_e = np.sign(rest) * np.maximum(np.abs(rest) - np.abs(rest) ** (p - 1) / beta, 0)
        z = np.mean(W_q - (W - W_e) / s, axis=1, keepdims=True)
        if np.abs(rest).mean() >= least:
            break
        least, beta = np.abs(rest).mean(), beta * kappa
    return z


@pytest.mark.parametrize(
    "options", [{}, {"p": 1.0, "beta": 300.0}, {"p": 0.5, "beta": 50.0, "kappa": 1.3, "iterations": 4}]
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_are_those_of_the_equations(bits: int, options: dict) -> None:
    W = heavy(12, 96)
    spec = QuantSpec.parse(f"int{bits} g32 asym-float scale=fp32")
    first, found = fit(W, spec), hqq(W, spec, Stats.empty(96), **options)
    assert torch.equal(found.scale, first.scale)
    s, z = (part.double().numpy().reshape(-1, 1) for part in (first.scale, first.zero))
    wanted = by_the_equations(
        W.numpy().reshape(-1, 32), s, z, 2**bits - 1,
        **({"p": 0.7, "beta": 10.0, "kappa": 1.01, "iterations": 20} | options),
    )  # fmt: skip
    np.testing.assert_allclose(found.zero.numpy().reshape(-1, 1), wanted, rtol=1e-6, atol=1e-6)
    assert not np.allclose(z, wanted, atol=1e-3)
    steps = W.numpy().reshape(-1, 32) / s + found.zero.double().numpy().reshape(-1, 1)
    sure = np.abs(steps - np.floor(steps) - 0.5) > 1e-6
    codes = np.clip(np.rint(steps), 0, 2**bits - 1)
    assert np.array_equal(found.codes.numpy().reshape(-1, 32)[sure], codes[sure])


def test_shrinking_by_search() -> None:
    """For p = 1 it is the least of ``|e| + beta/2 (e - x)^2``; for p < 1 it forgives large errors whole."""
    x = torch.tensor([-2.0, -0.3, 0.0, 0.1, 0.19, 0.21, 1.0], dtype=torch.float64)
    candidates = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    cost = candidates.abs()[:, None] + 2.5 * (candidates[:, None] - x) ** 2
    torch.testing.assert_close(_shrink(x, 5.0, 1.0), candidates[cost.argmin(dim=0)], atol=1e-4, rtol=0)
    small, large = _shrink(torch.tensor([0.001, 10.0]), 10.0, 0.7).tolist()
    assert small == 0 and large == pytest.approx(10 - 10**-0.3 / 10)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_less_error_than_rounding_with_the_same_scales(bits: int) -> None:
    W = heavy(64, 256).float()
    spec = QuantSpec.parse(f"int{bits} g64 asym-float")
    before, after = ((W - method(W, spec).dequantize()).abs() for method in (rtn, hqq))
    assert float(after.mean()) < float(before.mean())
    assert float((after**0.7).mean()) < float((before**0.7).mean())


def test_ragged_groups_flat_runs_and_blocks_are_solved_apart() -> None:
    W = heavy(4, 40)
    ragged = hqq(W, QuantSpec.parse("int4 g32 asym-float scale=fp32"))
    left = hqq(W[:, :32], QuantSpec.parse("int4 g32 asym-float scale=fp32"))
    right = hqq(W[:, 32:], QuantSpec.parse("int4 channel asym-float scale=fp32"))
    both = torch.cat([left.dequantize(torch.float64), right.dequantize(torch.float64)], dim=1)
    assert torch.equal(ragged.dequantize(torch.float64), both)
    runs = hqq(W, QuantSpec.parse("int4 b40 asym-float scale=fp32"))
    rows = hqq(W, QuantSpec.parse("int4 channel asym-float scale=fp32"))
    assert torch.equal(runs.codes, rows.codes) and torch.equal(runs.zero, rows.zero.flatten())
    turned = hqq(W.T.contiguous(), QuantSpec.parse("int4 *x1 asym-float scale=fp32"))
    torch.testing.assert_close(turned.zero.T, rows.zero)


def test_zeros_constants_and_nothing() -> None:
    spec = QuantSpec.parse("int4 g4 asym-float scale=fp32")
    W = torch.zeros(3, 8)
    W[1], W[2, :4] = 0.3, torch.tensor([-1.0, 2.0, 0.0, 0.5])
    back = hqq(W, spec).dequantize()
    assert torch.equal(back[:2], W[:2]) and torch.equal(back[2, 4:], W[2, 4:])
    assert hqq(torch.zeros(0, 8), spec).shape == (0, 8)


def test_what_cannot_be_done_is_refused() -> None:
    W = torch.ones(2, 8)
    for text in ("int4 g4", "int4 g4 asym", "nf4 b4", "table4 g4"):
        with pytest.raises(ValueError, match=r"real numbers.*found " + text):
            hqq(W, QuantSpec.parse(text))
    spec = QuantSpec.parse("int4 g4 asym-float")
    with pytest.raises(ValueError, match="1 NaN"):
        hqq(torch.tensor([[1.0, torch.nan]]), spec)
    for bad in ({"p": 0.0}, {"p": 1.5}, {"beta": 0.0}, {"kappa": 0.9}, {"iterations": 0}):
        with pytest.raises(ValueError, match=f"found .*{next(iter(bad))}={next(iter(bad.values()))}"):
            hqq(W, spec, **bad)


def test_it_ends_when_the_error_no_longer_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[float] = []

    def counting(x: torch.Tensor, beta: float, p: float) -> torch.Tensor:
        steps.append(beta)
        return _shrink(x, beta, p)

    monkeypatch.setattr(sys.modules["labkit.quant.hqq"], "_shrink", counting)
    exact = torch.arange(16.0).repeat(2, 1)  # lies on the grid: the error is 0 at once, and falls no more
    hqq(exact, QuantSpec.parse("int4 channel asym-float scale=fp32"))
    assert steps == [10.0, 10.1]
    steps.clear()
    hqq(heavy(4, 64), QuantSpec.parse("int2 g64 asym-float scale=fp32"), iterations=3)
    assert len(steps) == 3
