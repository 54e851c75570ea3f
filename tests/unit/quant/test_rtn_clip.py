"""RTN with AWQ's clip search: no range on its list serves the layer's inputs better."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from labkit.quant import QuantSpec, Stats, encode, hessian_error, params_for, rtn, rtn_clip


def correlated(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A float64 weight with heavy tails, and inputs that are correlated and of unequal size."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g, dtype=torch.float64) ** 3
    inputs = torch.randn(256, columns, generator=g, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=g, dtype=torch.float64) / columns**0.5
    return weight, (inputs + inputs @ mix) * torch.logspace(-0.5, 0.5, columns, dtype=torch.float64)


def brute_force(W: Tensor, spec: QuantSpec, inputs: Tensor, group: int, ratios: list[float]) -> Tensor:
    """Row by row, group by group: clip the weights, round them, and multiply by the inputs themselves."""
    out = W.clone()
    for row in range(len(W)):
        for start in range(0, W.shape[1], group):
            w, x = W[row, start : start + group], inputs[:, start : start + group]
            best, least = w, torch.inf
            for ratio in ratios:
                clipped = w.clamp(-ratio * w.abs().max(), ratio * w.abs().max())
                cut = QuantSpec(spec.format, (1, None), spec.zero, spec.scale)
                params = params_for(clipped.min().reshape(1, 1), clipped.max().reshape(1, 1), cut)
                q = encode(w[None], cut, params).dequantize(torch.float64)[0]
                error = float((x @ (q - w)).square().mean())
                if error < least - 1e-12:
                    best, least = q, error
            out[row, start : start + group] = best
    return out


@pytest.mark.parametrize(
    ("text", "group"),
    [("int3 g8 asym", 8), ("int3 g8", 8), ("int4 channel asym", 24), ("int2 g10 asym-float", 10)],
)
def test_equals_a_brute_force_over_the_same_ranges(text: str, group: int) -> None:
    weight, inputs = correlated(6, 24, seed=1)
    found = rtn_clip(weight, QuantSpec.parse(text), Stats.of(inputs), steps=10, smallest=0.3)
    ratios = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    expected = brute_force(weight, QuantSpec.parse(text), inputs, group, ratios)
    torch.testing.assert_close(found.dequantize(torch.float64), expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(found.codes, rtn(weight, QuantSpec.parse(text)).codes)


def test_the_default_tries_what_awq_tries() -> None:
    weight, inputs = correlated(6, 32, seed=2)
    spec = QuantSpec.parse("int3 g16 asym")
    ratios = [1 - i / 20 for i in range(10)]  # the authors' n_grid=20, max_shrink=0.5
    expected = brute_force(weight, spec, inputs, 16, ratios)
    found = rtn_clip(weight, spec, Stats.of(inputs))
    torch.testing.assert_close(found.dequantize(torch.float64), expected, rtol=1e-6, atol=1e-6)


def test_the_narrowest_range_by_hand() -> None:
    # An outlier of 8 that meets no input may be clipped at will. Ranges of r 8 have steps of r 8 / 3.5.
    inputs = torch.eye(8, dtype=torch.float64)[1:]
    for narrowest, tried in ((0.55, True), (0.5, False)):
        step = narrowest * 8 / 3.5  # one and three of these are exact in that range and in no wider one
        weight = torch.tensor([[8, *[step, 3 * step] * 3, step]], dtype=torch.float64)
        found = rtn_clip(weight, QuantSpec.parse("int3 g8 scale=fp32"), Stats.of(inputs))
        assert (abs(float(found.scale) - step) < 1e-6) == tried
        assert float(found.scale) > 0.54 * 8 / 3.5


def test_beats_rtn_on_the_layers_own_output_and_only_whole_ranges_are_rtn() -> None:
    weight, inputs = correlated(32, 64, seed=3)
    spec, stats = QuantSpec.parse("int3 g16 asym"), Stats.of(inputs)
    errors = [
        hessian_error(weight, q, stats.hessian) for q in (rtn_clip(weight, spec, stats), rtn(weight, spec))
    ]
    assert errors[0] < 0.95 * errors[1]
    assert torch.equal(rtn_clip(weight, spec, stats, steps=1).codes, rtn(weight, spec).codes)


def test_a_factor_on_the_hessian_has_no_effect_and_nothing_is_changed() -> None:
    weight, inputs = correlated(8, 16, seed=4)
    stats, spec = Stats.of(inputs), QuantSpec.parse("int3 g8 asym")
    kept = weight.clone(), stats.hessian.clone()
    more = Stats(stats.hessian * 64, stats.samples)
    assert torch.equal(rtn_clip(weight, spec, stats).codes, rtn_clip(weight, spec, more).codes)
    assert torch.equal(weight, kept[0]) and torch.equal(stats.hessian, kept[1])
    assert rtn_clip(weight.float(), spec, Stats.of(inputs.double())).shape == (8, 16)  # H in another dtype


def test_silent_inputs_are_rounded_to_nearest() -> None:
    weight, spec = (
        torch.randn(4, 16, generator=torch.Generator().manual_seed(0)),
        QuantSpec.parse("int3 g8"),
    )
    found = rtn_clip(weight, spec, Stats.of(torch.zeros(3, 16)))
    assert torch.equal(found.codes, rtn(weight, spec).codes)


@pytest.mark.parametrize("shape", [(0, 16), (4, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    assert rtn_clip(torch.zeros(shape), QuantSpec.parse("int4 g8"), Stats.empty(shape[1])).shape == shape


def test_bad_input() -> None:
    weight, stats, spec = torch.ones(4, 16), Stats.of(torch.ones(2, 16)), QuantSpec.parse("int4 g8")
    with pytest.raises(ValueError, match="rtn_clip needs stats"):
        rtn_clip(weight, spec)
    with pytest.raises(ValueError, match=r"found \(4, 16\) and \(8, 8\)"):
        rtn_clip(weight, spec, Stats.of(torch.ones(2, 8)))
    with pytest.raises(ValueError, match="1 NaN"):
        rtn_clip(torch.where(torch.arange(16) == 3, torch.nan, weight[:1]), spec, stats)
    for text in ("nf4 b64", "int4 2x8", "int4 tensor", "int4 g8 scale=(fp8_e4m3 tensor scale=fp32)"):
        with pytest.raises(ValueError, match="groups within a row and plain scales"):
            rtn_clip(weight, QuantSpec.parse(text), stats)
    for options in ({"steps": 0}, {"smallest": 1.0}, {"smallest": -0.1}):
        with pytest.raises(ValueError, match="steps >= 1 and 0 <= smallest < 1"):
            rtn_clip(weight, spec, stats, **options)
