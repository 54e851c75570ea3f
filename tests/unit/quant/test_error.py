"""The three errors, against numbers worked by hand and against the outputs they speak of."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from labkit.quant import QuantSpec, Stats, hessian_error, mse, rounding_and_clipping, rtn, sqnr_db


def test_by_hand():
    x, q = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.5]])
    assert mse(x, q) == 0.125  # (0 + 0.25) / 2
    assert sqnr_db(x, q) == pytest.approx(20.0)  # 25 / 0.25 = 100
    hessian = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    # error (0, -0.5): 0.25 * 1; weight (3, 4): 9*2 + 2*12*1 + 16*1 = 58
    assert hessian_error(x, q, hessian) == pytest.approx(0.25 / 58)


def test_hessian_error_is_the_relative_error_of_the_outputs():
    g = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(6, 20, generator=g), torch.randn(50, 20, generator=g).cumsum(dim=1)
    found = rtn(weight, QuantSpec.parse("int4 channel"))
    before, after = (inputs.double() @ w.double().T for w in (weight, found.dequantize()))
    expected = float((before - after).square().sum() / before.square().sum())
    for stats in (Stats.of(inputs), Stats(inputs.T @ inputs, 50)):
        assert hessian_error(weight, found, stats.hessian) == pytest.approx(expected, rel=1e-5)


def test_rounding_and_clipping_by_hand():
    # step 1, codes -8 to 7: 0.25 rounds to 0, 2.5 to 2 (half a step is rounding), 10 is clipped to 7
    x, q = torch.tensor([[0.25, 2.5, 10.0, -8.0]]), torch.tensor([[0.0, 2.0, 7.0, -8.0]])
    assert rounding_and_clipping(x, q, 1.0) == ((0.0625 + 0.25) / 4, 9 / 4)
    rows = torch.tensor(
        [[1.0], [8.0]]
    )  # a step per row: 3 off is clipping in one and rounding in the other
    assert rounding_and_clipping(torch.tensor([[3.0], [3.0]]), torch.zeros(2, 1), rows) == (4.5, 4.5)


def test_half_a_step_in_float32_is_rounding():
    scale = torch.tensor(0.1)
    x = (torch.arange(-8, 7) + 0.5) * scale  # computed in float32: half a step, give or take a last bit
    rounding, clipping = rounding_and_clipping(x, torch.arange(-8, 7) * scale, scale)
    assert clipping == 0 and rounding == pytest.approx(0.05**2, rel=1e-5)


def test_one_more_bit_is_worth_6_db():
    x = torch.rand(1, 100_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    levels = [sqnr_db(x, rtn(x, QuantSpec.parse(f"int{bits} tensor scale=fp32"))) for bits in range(4, 9)]
    for fewer, more in pairwise(levels):
        assert more - fewer == pytest.approx(20 * math.log10(2), abs=0.3)


def test_sums_do_not_lose_small_errors():
    x = torch.ones(10_000_000)
    q = x.clone()
    q[0] = 1 + 2**-12
    assert mse(x, q) == pytest.approx(2**-24 / 1e7, rel=1e-12)
    assert sqnr_db(x, q) == pytest.approx(10 * math.log10(1e7 * 2**24), abs=1e-9)


def test_exact_and_hopeless():
    x, zero = torch.ones(2, 3), torch.zeros(2, 3)
    assert (mse(x, x), sqnr_db(x, x), hessian_error(x, x, torch.eye(3))) == (0.0, math.inf, 0.0)
    assert sqnr_db(zero, x) == -math.inf
    assert hessian_error(zero, x, torch.eye(3)) == math.inf
    assert hessian_error(zero, zero, torch.zeros(3, 3)) == 0.0


def test_bad_input():
    x = torch.ones(2, 3)
    for error in (mse, sqnr_db):
        with pytest.raises(ValueError, match=r"\(2, 3\) and \(1, 3\)"):
            error(x, x[:1])
    with pytest.raises(ValueError, match=r"found \(2, 3\) and \(2, 2\)"):
        hessian_error(x, x, torch.eye(2))
    with pytest.raises(ValueError, match="found none"):
        mse(x[:0], x[:0])
