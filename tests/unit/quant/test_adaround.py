"""AdaRound against exhaustive search, and against rounding to nearest on inputs it has not seen."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor

from labkit.quant import FellBack, QuantSpec, Stats, adaround, fit, hessian_error, rtn


def problem(rows: int, columns: int, seed: int = 0, count: int = 256) -> tuple[Tensor, Stats, Tensor]:
    """A weight, the stats of correlated inputs, and other inputs of the same kind."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.3
    draw = lambda: torch.randn(count, columns, generator=generator) @ mix  # noqa: E731
    return torch.randn(rows, columns, generator=generator), Stats.of(draw()), draw()


def neighbours(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The grid points next to each weight, below and above (float64, one channel a row)."""
    params = fit(weight, spec, "mse")
    scale, zero = params.dense(torch.float64)
    zero = torch.zeros_like(scale) if zero is None else zero
    low, high = spec.code_range
    steps = weight.double() / scale
    below = torch.floor(steps + zero) if spec.zero == "float" else torch.floor(steps) + zero
    return (below.clamp(low, high) - zero) * scale, ((below + 1).clamp(low, high) - zero) * scale


@pytest.mark.parametrize("text", ["int2 channel", "int3 channel asym", "int3 channel asym-float"])
def test_close_to_the_best_of_all_roundings(text: str) -> None:
    """8 weights a row have 256 roundings: all are tried."""
    spec = QuantSpec.parse(text)
    found_sum = best_sum = nearest_sum = 0.0
    for seed in range(3):
        weight, stats, _ = problem(6, 8, seed)
        H = stats.hessian.double()
        below, above = neighbours(weight, spec)
        made = adaround(weight, spec, stats).dequantize(torch.float64)
        assert torch.minimum((made - below).abs(), (made - above).abs()).max() < 1e-6
        nearest = rtn(weight, spec, observer="mse").dequantize(torch.float64)
        up = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8)), dtype=torch.float64)
        for row in range(6):
            every = below[row] + up * (above[row] - below[row])  # (256, 8)
            dw = weight[row].double() - every
            best_sum += ((dw @ H) * dw).sum(dim=1).min().item()
            dw = weight[row].double() - made[row]
            found_sum += (dw @ H @ dw).item()
            dw = weight[row].double() - nearest[row]
            nearest_sum += (dw @ H @ dw).item()
    assert best_sum <= found_sum * (1 + 1e-6)  # brute force is a bound
    # Most of what there is to win: AdaRound is no exhaustive search.
    assert found_sum - best_sum < 0.3 * (nearest_sum - best_sum)


@pytest.mark.parametrize("text", ["int3 g16 asym", "int4 g16", "int3 channel asym-float", "int4 b20 asym"])
def test_better_than_rounding_to_nearest_on_inputs_it_has_not_seen(text: str) -> None:
    spec = QuantSpec.parse(text)
    weight, stats, others = problem(16, 48, count=512)
    H = others.T @ others
    found = hessian_error(weight, adaround(weight, spec, stats), H)
    assert found < 0.6 * hessian_error(weight, rtn(weight, spec, observer="mse"), H)


def test_the_scales_are_those_of_the_observer() -> None:
    spec = QuantSpec.parse("int3 g16 asym")
    weight, stats, _ = problem(4, 32)
    for observer in ("mse", "minmax"):
        found, params = (
            adaround(weight, spec, stats, observer=observer, steps=50),
            fit(weight, spec, observer),
        )
        assert torch.equal(found.scale, params.scale) and torch.equal(found.zero, params.zero)


def test_a_factor_on_the_hessian_changes_nothing() -> None:
    spec = QuantSpec.parse("int3 g16")
    weight, stats, _ = problem(4, 32)
    codes = adaround(weight, spec, stats).codes
    again = adaround(weight, spec, Stats(stats.hessian * 2.0**12, stats.samples)).codes
    assert torch.equal(codes, again)


def test_works_where_gradients_are_switched_off() -> None:
    spec = QuantSpec.parse("int3 g16")
    weight, stats, _ = problem(4, 32)
    with torch.no_grad():
        codes = adaround(weight, spec, stats, steps=50).codes
    assert torch.equal(codes, adaround(weight, spec, stats, steps=50).codes)
    assert not torch.equal(codes, rtn(weight, spec, observer="mse").codes)
    assert not weight.requires_grad


def test_with_uncorrelated_inputs_nearest_is_the_best_and_is_returned_with_a_word() -> None:
    """With H = I the objective is the squared error of each weight, and no rounding beats the nearest."""
    spec = QuantSpec.parse("int4 g16")
    weight, _, _ = problem(4, 32)
    with pytest.warns(FellBack, match="no better"):
        found = adaround(weight, spec, Stats(torch.eye(32), 1), steps=30)
    assert torch.equal(found.codes, rtn(weight, spec, observer="mse").codes)


def test_weights_on_the_grid_stay_and_nothing_is_said() -> None:
    weight = torch.tensor([[7.0, -3, 0, 2], [1, -7, 5, -6]])  # int4 narrow: a scale of 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = adaround(
            weight, QuantSpec.parse("int4 channel narrow"), Stats(torch.eye(4), 1), observer="minmax"
        )
    assert found.codes.tolist() == weight.tolist() and found.scale.tolist() == [[1], [1]]


def test_zero_blocks_and_empty_weights() -> None:
    spec = QuantSpec.parse("int3 g16 asym")
    weight, stats, _ = problem(4, 32)
    weight[:, :16] = 0
    found = adaround(weight, spec, stats, steps=50)
    assert (found.dequantize()[:, :16] == 0).all()
    assert adaround(torch.zeros(0, 32), spec, stats).shape == (0, 32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w, s: (w, QuantSpec.parse("nf4 b64"), s), "AdaRound rounds down or up between integers"),
        (lambda w, s: (w, QuantSpec.parse("int3 g16"), None), "needs stats"),
        (lambda w, s: (w, QuantSpec.parse("int3 g16"), Stats.empty(32)), "calibration is empty"),
        (lambda w, s: (w, QuantSpec.parse("int3 g16"), Stats.empty(31)), r"found \(4, 32\) and \(31, 31\)"),
        (lambda w, s: (w * torch.nan, QuantSpec.parse("int3 g16"), s), "128 NaN"),
        (
            lambda w, s: (w, QuantSpec.parse("int3 g16"), Stats(s.hessian * torch.inf, 1)),
            "hessian holds NaN or infinity",
        ),
    ],
)
def test_bad_input_is_named(change, says: str) -> None:  # type: ignore[no-untyped-def]
    weight, stats, _ = problem(4, 32)
    weight, spec, stats = change(weight, stats)
    with pytest.raises(ValueError, match=says):
        adaround(weight, spec, stats)
