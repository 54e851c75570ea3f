"""Round to nearest: no other point of the grid lies closer."""

from __future__ import annotations

import pytest
import torch

from labkit.quant import QuantSpec, Stats, fit, rtn
from labkit.quant.observers import percentile


@pytest.mark.parametrize(
    "text",
    [
        "int4 g8",
        "int3 g8 asym",
        "int8 channel narrow",
        "int2 4x8",
        "int5 tensor asym",
        "int3 3x7 asym",  # blocks that divide neither axis
        "int4 g8 asym-float",
        "int2 5x9 asym-float scale=bf16",
        "int4 g8 scale=bf16",
        "int4 g8 asym scale=fp8_e4m3",
        "int6 4x4 narrow scale=fp8_e5m2",
        "int3 *x5 asym scale=e8m0",
        "int4 g8 scale=(int8 b256 asym scale=fp32)",
        "int4 2x4 asym scale=(fp8_e4m3 tensor scale=fp32)",
        "int4 g4 asym-float scale=(int6 channel asym scale=fp16)",
    ],
)
def test_no_code_lies_closer(text: str):
    spec = QuantSpec.parse(text)
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = rtn(weight, spec)
    rows, columns = (torch.arange(n) for n in weight.shape)
    height, width = (size or n for size, n in zip(spec.block, weight.shape, strict=True))
    where = (rows // height)[:, None], (columns // width)[None, :]
    scale = found.params.dense(torch.float64)[0][where]
    zero = 0 if found.zero is None else found.zero.double()[where]
    lowest, highest = spec.code_range
    points = (torch.arange(lowest, highest + 1)[:, None, None] - zero) * scale  # (codes, out, in)
    nearest = (points - weight).abs().amin(dim=0)
    torch.testing.assert_close((found.dequantize(torch.float64) - weight).abs(), nearest)


STORED = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("kind", ["", "asym", "asym-float"])
def test_scales_are_torchs_casts_of_the_exact_ones(dtype: str, kind: str):
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    exact = rtn(weight, QuantSpec.parse(f"int4 4x8 {kind} scale=fp32"))
    found = rtn(weight, QuantSpec.parse(f"int4 4x8 {kind} scale={dtype}"))
    assert found.scale.dtype == STORED[dtype] and found.scale.shape == (4, 4)
    assert torch.equal(found.scale.float(), exact.scale.to(STORED[dtype]).float())
    if kind == "asym-float":
        # The zero point belongs to the scale as it is stored: lo / scale, in bf16 with bf16, else in fp16.
        lo = weight.reshape(4, 4, 4, 8).amin(dim=(1, 3))
        wanted = (-lo.double() / found.scale.double()).to(
            torch.bfloat16 if dtype == "bf16" else torch.float16
        )
        assert torch.equal(found.zero, wanted)


def test_scales_quantized_twice_by_hand():
    # absmax over 7.5: scales 2, 4.5, 8, 1; inner int4 affine over them: range 0 to 8, step 8/15.
    weight = torch.tensor([[15.0, 1.0, 33.75, 1.0, -60.0, 1.0, 7.5, 7.4]])
    found = rtn(weight, QuantSpec.parse("int4 g2 scale=(int4 tensor asym scale=fp32)"))
    assert found.scale.codes.tolist() == [[4, 8, 15, 2]]  # 3.75, 8.4, 15 and 1.875 steps
    assert found.scale.dequantize().tolist()[0] == pytest.approx([32 / 15, 64 / 15, 8, 16 / 15])
    assert found.codes.tolist() == [[7, 0, 7, 0, -8, 0, 7, 7]]


def test_scale_first_or_codes_first():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(2))
    nested = QuantSpec.parse("int3 g8 asym scale=(int3 b32 scale=fp32)")
    plain = rtn(weight, QuantSpec.parse("int3 g8 asym scale=fp32"))
    late = rtn(weight, nested, scale_first=False)
    assert torch.equal(late.codes, plain.codes) and torch.equal(late.zero, plain.zero)
    assert torch.equal(late.scale.codes, rtn(plain.scale, nested.scale).codes)
    first = rtn(weight, nested)
    assert late.spec == first.spec == nested and not torch.equal(first.codes, late.codes)
    assert float((first.dequantize() - weight).norm()) < float((late.dequantize() - weight).norm())


def test_hand_worked():
    # absmax 7 over 3.5 steps of int3: scale 2, codes -4 to 3
    weight = torch.tensor([[7.0, -7.0, 1.0, 3.0, 2.9, -0.4]])
    found = rtn(weight, QuantSpec.parse("int3 channel"))
    assert found.scale.tolist() == [[2.0]]
    assert found.codes.tolist() == [
        [3, -4, 0, 2, 1, 0]
    ]  # 3.5, 0.5 and 1.5 go to the even code, if there is one
    assert found.dequantize().tolist() == [[6, -8, 0, 4, 2, 0]]


def test_the_observer_is_used_and_the_stats_are_not():
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec.parse("int4 channel")
    found = rtn(weight, spec, Stats.empty(512), observer="percentile")
    assert torch.equal(found.scale, fit(weight, spec, percentile).scale)
    assert (found.scale < rtn(weight, spec).scale).all()
