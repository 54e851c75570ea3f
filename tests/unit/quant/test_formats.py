"""Value tables and rounding, against the tables of the OCP specifications and a search over every value."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.quant import round_to_format, values_of
from labkit.quant.formats import FLOATS, float_codes

# OCP Microscaling Formats 1.0, tables 4 and 5; OCP 8-bit Floating Point 1.0, table 1:
# largest, smallest normal, smallest subnormal.
OCP = {
    "fp4_e2m1": (6.0, 1.0, 0.5),
    "fp6_e2m3": (7.5, 1.0, 0.125),
    "fp6_e3m2": (28.0, 0.25, 0.0625),
    "fp8_e4m3": (448.0, 2.0**-6, 2.0**-9),
    "fp8_e5m2": (57344.0, 2.0**-14, 2.0**-16),
}


def test_every_value_of_fp4() -> None:
    half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert values_of("fp4_e2m1").tolist() == half + [-value for value in half]


@pytest.mark.parametrize("name", OCP)
def test_the_landmarks_of_the_specification(name: str) -> None:
    largest, normal, subnormal = OCP[name]
    values = values_of(name)
    finite = values[values.isfinite()]
    assert finite.max() == largest
    assert finite[finite > 0].min() == subnormal
    code = 2 ** FLOATS[name].mantissa  # exponent field 1, mantissa 0
    assert values[code] == normal


def test_the_special_patterns_of_fp8() -> None:
    e4m3, e5m2 = values_of("fp8_e4m3"), values_of("fp8_e5m2")
    assert e4m3.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF] and not e4m3.isinf().any()
    assert e5m2[0x7C] == math.inf and e5m2[0xFC] == -math.inf
    assert int(e5m2.isnan().sum()) == 6


def test_e8m0_is_powers_of_two() -> None:
    values = values_of("e8m0")
    assert values[127] == 1 and values[0] == 2.0**-127 and values[254] == 2.0**127 and values[255].isnan()


def nearest_even(x: float, name: str) -> float:
    """The nearest finite value by search; of two equally near, the one with the even pattern."""
    values = values_of(name).tolist()
    half = [(code, v) for code, v in enumerate(values[: len(values) // 2]) if math.isfinite(v)]
    best = min(half, key=lambda pair: (abs(abs(x) - pair[1]), pair[0] % 2))[1]
    return math.copysign(best, x)


@pytest.mark.parametrize("name", FLOATS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_rounding_finds_the_nearest_value_and_ties_to_even(name: str, data: st.DataObject) -> None:
    top = FLOATS[name].largest * 1.25
    x = data.draw(st.floats(-top, top, width=32) | st.floats(-4, 4, width=16))
    assert round_to_format(torch.tensor([x]), name).item() == nearest_even(x, name)


@pytest.mark.parametrize("name", FLOATS)
def test_every_midpoint_goes_to_the_even_pattern(name: str) -> None:
    values = values_of(name)[: 2 ** (FLOATS[name].bits - 1)]
    values = values[values.isfinite()]
    middles = (values[:-1] + values[1:]) / 2
    expected = torch.where(torch.arange(len(middles)) % 2 == 0, values[:-1], values[1:])
    assert torch.equal(round_to_format(middles, name), expected)
    assert torch.equal(round_to_format(-middles, name), -expected)


@pytest.mark.parametrize("name", FLOATS)
def test_every_value_has_its_own_pattern(name: str) -> None:
    values = values_of(name)
    codes = torch.arange(len(values), dtype=torch.uint8)[values.isfinite()]
    assert torch.equal(float_codes(values[values.isfinite()], name), codes)


def test_beyond_the_largest_it_saturates_and_nan_stays() -> None:
    x = torch.tensor([1e30, -1e30, math.inf, math.nan])
    assert round_to_format(x, "fp6_e2m3").tolist()[:3] == [7.5, -7.5, 7.5]
    assert round_to_format(x, "fp6_e2m3")[3].isnan() and round_to_format(x, "nf4")[3].isnan()


def test_nf4_takes_the_nearest_quantile() -> None:
    table = values_of("nf4")
    x = torch.linspace(-1.2, 1.2, 1001)
    nearest = table[(x[:, None] - table).abs().argmin(dim=1)]
    assert torch.equal(round_to_format(x, "nf4"), nearest)


def test_nf4_is_the_papers_construction() -> None:
    """QLoRA, appendix E: quantiles of N(0, 1) at even probabilities, 8 above 0 and 7 below."""
    offset = 0.9677083
    normal = torch.distributions.Normal(0.0, 1.0)
    up = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    down = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    built = torch.cat([down, torch.zeros(1, dtype=torch.float64), up.flip(0)])
    assert torch.allclose(values_of("nf4").double(), built / built.abs().max(), atol=1e-6)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="fp5"):
        round_to_format(torch.zeros(1), "fp5")
    with pytest.raises(ValueError, match="int4"):
        values_of("int4")
