"""Rows on int8 and fp8 as ``encode`` puts them there, and int8 times int8."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import DEVICE, DTYPES, exact, off, quantized, randn

from labkit.kernels.gpu.activations import quantize_rows
from labkit.kernels.gpu.w8a8 import scaled_product
from labkit.kernels.triton_gpu import TritonGpu
from labkit.quant import QuantSpec, encode, fit

pytestmark = pytest.mark.gpu

GRIDS = [("int8", False), ("int8", True), ("fp8_e4m3", False)]
PER_TOKEN = QuantSpec("int8", (1, None), scale="fp32")


def same_as_encode(x: torch.Tensor, format: str, narrow: bool) -> bool:
    found = quantize_rows(x.to(DEVICE), format, narrow)
    wanted = encode(x, found.spec, fit(x, found.spec))
    assert isinstance(found.scale, torch.Tensor) and isinstance(wanted.scale, torch.Tensor)
    return torch.equal(found.codes.cpu(), wanted.codes) and torch.equal(found.scale.cpu(), wanted.scale)


@settings(max_examples=30)
@given(
    grid=st.sampled_from(GRIDS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    rows=st.integers(1, 8),
    columns=st.integers(1, 70),
    power=st.integers(-40, 30),
    seed=st.integers(0, 99),
)
def test_rows_are_those_of_encode_to_the_last_bit(
    grid: tuple[str, bool], dtype: torch.dtype, rows: int, columns: int, power: int, seed: int
) -> None:
    torch.manual_seed(seed)
    powers = torch.linspace(0, power if dtype == torch.float32 else 0, rows)[:, None]
    x = torch.randn(rows, columns) * 10.0**powers
    x[0, : columns // 2] = 0
    assert same_as_encode(x.to(dtype), *grid)


@pytest.mark.parametrize(("format", "narrow"), GRIDS)
def test_extremes(format: str, narrow: bool) -> None:
    x = torch.zeros(8, 1100)
    x[1], x[2, 1099], x[3, 1] = 3e38, -1e-45, 2.0**-126
    x[4] = torch.arange(1100) - 550
    x[5] = (torch.arange(1100) % 511 - 255) * 0.5  # halves of steps of 1, which go to the even one
    x[6, ::2] = torch.logspace(-12, 0, 550)
    x[7, 0], x[7, 1] = (
        670 * 2.0**-149,
        -670 * 2.0**-149,
    )  # its scale is rounded so far down that codes must be clamped
    assert same_as_encode(x, format, narrow)
    assert same_as_encode(x[:, :1], format, narrow)


def test_fp8_rounds_as_torch_does_where_two_numbers_are_equally_near() -> None:
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 to 448, ascending
    middles = (every[1:] + every[:-1]) / 2
    near = torch.cat([every, middles, middles * (1 + 2**-20), middles * (1 - 2**-20)])
    x = torch.cat([near, -near])[None]  # its largest is 448, so the scale is 1
    found = quantize_rows(x.to(DEVICE), "fp8_e4m3")
    assert torch.equal(found.codes.cpu(), x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_a_row_with_nan_leaves_the_others_alone() -> None:
    x = torch.randn(3, 40)
    clean = quantize_rows(x.to(DEVICE))
    x[1, 7] = torch.nan
    codes = quantize_rows(x.to(DEVICE)).codes
    assert torch.equal(codes[[0, 2]], clean.codes[[0, 2]])


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="int8 or fp8_e4m3"):
        quantize_rows(torch.zeros(2, 2, device=DEVICE), "int4")
    assert quantize_rows(torch.zeros(0, 4, device=DEVICE)).codes.shape == (0, 4)


@settings(max_examples=15)
@given(
    out=st.integers(1, 140),
    inputs=st.integers(1, 300),
    rows=st.integers(1, 40),
    narrow=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 9),
)
def test_int8_times_int8(
    out: int, inputs: int, rows: int, narrow: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, x = quantized("int8 channel", out, inputs), randn(rows, inputs, dtype=dtype)
    bias = randn(out, dtype=dtype)
    spec = QuantSpec("int8", (1, None), scale="fp32", narrow=narrow)
    rounded = encode(x, spec, fit(x, spec)).dequantize(torch.float64)
    wide = torch.cat([exact(weight), bias.double()[:, None]], dim=1)
    kernel = TritonGpu(weight, spec)
    y = kernel(x, bias)
    assert y.shape == (rows, out) and y.dtype == dtype
    ones = torch.ones(rows, 1, dtype=torch.float64, device=DEVICE)
    # The result's own rounding alone: integers are summed exactly.
    assert off(y, torch.cat([rounded, ones], dim=1), wide) < max(1e-6, torch.finfo(dtype).eps)
    assert torch.equal(y, kernel(x, bias))


def test_the_largest_sums_do_not_overflow() -> None:
    codes, ones = torch.full((3, 4096), -128, dtype=torch.int8, device=DEVICE), torch.ones(3, device=DEVICE)
    y = scaled_product(codes[:2], ones[:2], codes, ones, None, torch.float32)
    assert torch.equal(y.cpu(), torch.full((2, 3), 4096.0 * 128 * 128))


def test_which_pairs_of_grids_it_takes() -> None:
    assert TritonGpu.why_not(quantized("int8 channel", 4, 64), PER_TOKEN) is None
    assert "symmetric int8" in str(TritonGpu.why_not(quantized("int8 g32", 4, 64), PER_TOKEN))
    assert "symmetric int8" in str(TritonGpu.why_not(quantized("int8 channel asym", 4, 64), PER_TOKEN))
    assert "rounds activations" in str(
        TritonGpu.why_not(quantized("int8 channel", 4, 64), QuantSpec.parse("int8 channel"))
    )
