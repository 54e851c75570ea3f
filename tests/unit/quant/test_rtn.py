"""Round to nearest: no other point of the grid lies closer."""

from __future__ import annotations

import pytest
import torch

from labkit.quant import QuantSpec, Stats, fit, rtn
from labkit.quant.observers import percentile


@pytest.mark.parametrize(
    "text", ["int4 g8", "int3 g8 asym", "int8 channel narrow", "int2 4x8", "int5 tensor asym"]
)
def test_no_code_lies_closer(text: str):
    spec = QuantSpec.parse(text)
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = rtn(weight, spec)
    rows, columns = (torch.arange(n) for n in weight.shape)
    height, width = (size or n for size, n in zip(spec.block, weight.shape, strict=True))
    where = (rows // height)[:, None], (columns // width)[None, :]
    scale = found.scale.double()[where]
    zero = 0 if found.zero is None else found.zero.double()[where]
    lowest, highest = spec.code_range
    points = (torch.arange(lowest, highest + 1)[:, None, None] - zero) * scale  # (codes, out, in)
    nearest = (points - weight).abs().amin(dim=0)
    torch.testing.assert_close((found.dequantize(torch.float64) - weight).abs(), nearest)


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
