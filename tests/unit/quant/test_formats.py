"""Value tables and rounding, against the tables of the OCP specifications and a search over every value."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.quant import QuantSpec, fit, grid, round_to_format, values_of
from labkit.quant.formats import FLOATS, HALVES, SCALE_DTYPES, float_codes

# OCP Microscaling Formats 1.0, tables 4 and 5; OCP 8-bit Floating Point 1.0, table 1:
# largest, smallest normal, smallest subnormal.
OCP = {
    "fp4_e2m1": (6.0, 1.0, 0.5),
    "fp6_e2m3": (7.5, 1.0, 0.125),
    "fp6_e3m2": (28.0, 0.25, 0.0625),
    "fp8_e4m3": (448.0, 2.0**-6, 2.0**-9),
    "fp8_e5m2": (57344.0, 2.0**-14, 2.0**-16),
    # IEEE 754 binary16, and the first half of binary32.
    "fp16": (65504.0, 2.0**-14, 2.0**-24),
    "bf16": ((2 - 2.0**-7) * 2.0**127, 2.0**-126, 2.0**-133),
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
    code = 2 ** (FLOATS | HALVES)[name].mantissa  # exponent field 1, mantissa 0
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
@settings(max_examples=150)
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


@pytest.mark.parametrize("name", [*OCP, "nf4", "dynamic8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_beyond_the_largest_it_saturates_and_nan_stays(name: str, dtype: torch.dtype) -> None:
    largest = OCP[name][0] if name in OCP else 1.0
    lowest = values_of(name)[values_of(name).isfinite()].min().item()
    x = torch.tensor(
        [1.02 * largest, 3.4e38, math.inf, -1.02 * largest, -3.4e38, -math.inf, math.nan], dtype=dtype
    )
    found = round_to_format(x, name)
    assert found.tolist()[:6] == 3 * [largest] + 3 * [lowest] and found[6].isnan()
    assert found.dtype == dtype
    zeros = round_to_format(torch.tensor([0.0, -0.0], dtype=dtype), name)
    assert torch.equal(zeros, torch.zeros(2, dtype=dtype))


def test_e8m0_of_what_is_no_power_of_two() -> None:
    """In the log domain: 2^0.5 lies in the middle. Zero goes to the smallest, infinity to the largest."""
    x = torch.tensor([1.41, 1.42, 3.0, 0.75, 0.0, math.inf, -1.0, math.nan])
    found = round_to_format(x, "e8m0")
    assert found[:6].tolist() == [1.0, 2.0, 4.0, 1.0, 2.0**-127, 2.0**127]
    assert bool(found[6:].isnan().all())


E8M0 = ["e8m0", "e8m0-ceil", "e8m0-even"]
# largest value, its exponent, bits of mantissa, of the format that is scaled
SCALED = {
    "fp4_e2m1": (6, 2, 1),
    "fp6_e2m3": (7.5, 2, 3),
    "fp6_e3m2": (28, 4, 2),
    "fp8_e4m3": (448, 8, 3),
    "fp8_e5m2": (57344, 15, 2),
    "int8": (127, 6, 6),
}


def e8m0_by_definition(amax: float, rule: str, name: str) -> float:
    largest, exponent, mantissa = SCALED[name]
    if rule == "e8m0-ceil":
        return min(2.0**k for k in range(-60, 60) if 2.0**k * largest >= amax)
    if rule == "e8m0-even":  # the nearest number with that many bits of mantissa; of two, the larger
        step = 2.0 ** (math.floor(math.log2(amax)) - mantissa)
        amax = math.floor(amax / step + 0.5) * step
    return 2.0 ** (math.floor(math.log2(amax)) - exponent)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("rule", E8M0)
def test_the_three_roundings_of_a_shared_scale(rule: str, name: str) -> None:
    spec = QuantSpec(name, (1, 32), scale=rule, narrow=name == "int8")
    largest = SCALED[name][0]
    steps = torch.arange(1, 513) / 512 + 1  # every mantissa of nine bits, (1, 2]
    amax = torch.cat([steps, 1e-6 * steps, torch.tensor([largest, largest * (1 + 2**-20), 0.9999, 3e5])])
    x = torch.zeros(len(amax), 32)
    x[:, 3] = -amax
    x[:, 9] = amax / 3
    scale = fit(x, spec).scale
    assert scale.dtype == torch.float8_e8m0fnu
    wanted = [e8m0_by_definition(a, rule, name) for a in amax.tolist()]
    assert scale.float().flatten().tolist() == wanted
    if rule == "e8m0-ceil":
        assert bool((amax / scale.float().flatten() <= largest).all())


@pytest.mark.parametrize("rule", E8M0)
def test_shared_scales_at_their_limits(rule: str) -> None:
    spec = QuantSpec("fp4_e2m1", (1, 4), scale=rule)
    x = torch.tensor([[0.0, 0, 0, 0, 1e-45, 0, 0, 0, 3e38, 0, 0, 0]])
    assert fit(x, spec).scale.float().flatten()[:2].tolist() == [2.0**-127, 2.0**-127]
    assert fit(x, spec).scale.view(torch.uint8).flatten()[2] in (127 + 125, 127 + 126)


def test_e8m0_even_needs_a_mantissa() -> None:
    with pytest.raises(ValueError, match="mantissa, which nf4 lacks; use e8m0-ceil"):
        QuantSpec("nf4", (1, 32), scale="e8m0-even")
    assert set(E8M0) <= set(SCALE_DTYPES)


def test_dynamic8_by_its_construction() -> None:
    """A run of zeros is the decimal exponent, a one ends it, the bits left divide [0.1, 1] evenly."""
    found = values_of("dynamic8")
    assert (
        found.shape == (256,)
        and bool((found[1:] > found[:-1]).all())
        and found[127] == 0
        and found[255] == 1
    )
    for zeros in range(7):  # 7 bits beside the sign: `zeros` zeros, a one, 6 - zeros bits of fraction
        parts = 2 ** (6 - zeros)
        for fraction in range(parts):
            value = 10.0**-zeros * (0.1 + 0.9 * (fraction + 0.5) / parts)
            for sign in (-1, 1):
                assert float((found - sign * value).abs().min()) < 1e-6 * value


def test_a_mean_is_taken_off_and_put_back() -> None:
    spec = QuantSpec.parse("dynamic8 b4 mean scale=fp32")
    x = torch.tensor([[10.0, 12.0, 8.0, 10.0, 14.0, 6.0]])
    params = fit(x, spec)
    assert params.zero.tolist() == [10.0] and params.scale.tolist() == [2.0, 4.0]
    scale, table = torch.tensor([[2.0, 2, 2, 2, 4, 4]]), values_of("dynamic8")
    codes = grid(spec).quantize(x, scale, params.zero)
    assert table[codes.int()].tolist() == [[0.0, 1.0, table[0].item(), 0.0, 1.0, table[0].item()]]
    lowest = table[0].item()  # not quite -1
    back = torch.tensor([[10.0, 12.0, 10 + 2 * lowest, 10.0, 14.0, 10 + 4 * lowest]])
    torch.testing.assert_close(grid(spec).dequantize(codes, scale, params.zero), back)
    torch.testing.assert_close(grid(spec).round(x, scale, params.zero), back)


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
