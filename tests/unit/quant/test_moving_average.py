"""The moving average against its recurrence by hand, its closed form, and PyTorch's observer."""

import numpy as np
import pytest
import torch
from torch.ao.quantization.observer import MovingAverageMinMaxObserver

from labkit.quant import MovingAverage, QuantSpec, fit, params_for


def test_by_hand() -> None:
    average = MovingAverage(QuantSpec.parse("int8 tensor asym scale=fp32"), constant=0.25)
    for lo, hi in ((-1.0, 3.0), (-5.0, 3.0), (-1.0, 7.0)):
        average.add(torch.tensor([[lo, 0.0, hi]]))
    # lo: -1; -1 - 4/4 = -2; -2 + 1/4 = -1.75.  hi: 3; 3; 3 + 4/4 = 4.
    assert average.lo.tolist() == [[-1.75]] and average.hi.tolist() == [[4.0]]
    assert average.params.scale.item() == pytest.approx(5.75 / 255)
    assert average.params.zero.item() == round(1.75 / 5.75 * 255)


@pytest.mark.parametrize("text", ["int8 tensor", "int4 *x1", "int4 2x3 asym", "int8 b7 asym-float"])
def test_the_closed_form(text: str) -> None:
    """Unrolled: the first batch weighs (1-c)^(n-1), batch i then c (1-c)^(n-1-i)."""
    spec, c, n = QuantSpec.parse(text), 0.3, 6
    torch.manual_seed(0)
    batches = [torch.randn(5, 8, dtype=torch.float64) * (1 + i) for i in range(n)]
    average = MovingAverage(spec, constant=c)
    singles = []
    for x in batches:
        average.add(x)
        alone = MovingAverage(spec)
        alone.add(x)
        singles.append(alone)
    share = np.array([c * (1 - c) ** (n - 1 - i) for i in range(n)])
    share[0] = (1 - c) ** (n - 1)
    for side in ("lo", "hi"):
        wanted = sum(s * getattr(one, side) for s, one in zip(share, singles, strict=True))
        torch.testing.assert_close(getattr(average, side), wanted)
    wanted = params_for(average.lo, average.hi, spec)
    assert torch.equal(average.params.scale, wanted.scale)


def test_the_range_is_pytorchs() -> None:
    theirs = MovingAverageMinMaxObserver(averaging_constant=0.01)
    ours = MovingAverage(QuantSpec.parse("int8 tensor asym scale=fp32"))
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randn(4, 10 + seed) + seed / 10
        theirs(x)
        ours.add(x)
    torch.testing.assert_close(ours.lo.flatten()[0], theirs.min_val, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.hi.flatten()[0], theirs.max_val, rtol=1e-6, atol=1e-6)


def test_one_batch_is_fit_with_any_observer() -> None:
    torch.manual_seed(1)
    x, spec = torch.randn(8, 300), QuantSpec.parse("int4 channel asym")
    for observer in ("minmax", "percentile", "mse"):
        average = MovingAverage(spec, observer=observer)
        average.add(x)
        wanted = fit(x, spec, observer)
        assert torch.equal(average.params.scale, wanted.scale)
        assert torch.equal(average.params.zero, wanted.zero)


def test_what_makes_no_sense_is_refused() -> None:
    spec = QuantSpec.parse("int8 channel")
    for constant in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match=f"found {constant}"):
            MovingAverage(spec, constant=constant)
    average = MovingAverage(spec)
    with pytest.raises(ValueError, match="no batch"):
        _ = average.params
    average.add(torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"first batch into \(3, 1\) blocks.*into \(2, 1\)"):
        average.add(torch.ones(2, 4))
    with pytest.raises(ValueError, match="1 NaN"):
        average.add(torch.tensor([[torch.nan]]))
