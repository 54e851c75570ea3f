"""Codes times rows on the GPU: every format, odd shapes, extremes, splits, the same bits twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import DEVICE, DTYPES, INTERPRETED, exact, of_programs, off, quantized, randn, there

from labkit.kernels import backends, prepare
from labkit.kernels.gpu import product
from labkit.kernels.gpu.product import PROGRAMS, split
from labkit.kernels.triton_gpu import TritonGpu
from labkit.quant import QuantizedTensor, QuantSpec

pytestmark = pytest.mark.gpu

FORMATS = [
    *(f"int4 {width}{zero}" for width in ("g32", "g64", "g128", "channel") for zero in ("", " asym")),
    "int4 g32 narrow",
    "int4 tensor",
    "int4 32x64 asym",
    "int4 g16 asym-float scale=bf16",
    "int4 g64 asym scale=(int8 b256 asym scale=fp32)",
    "int2 g32",
    "int3 g64 asym",
    "int8 channel",
    "int8 g64 asym",
    "nf4 g64",
    "mxfp4",
    "nvfp4",
]  # fmt: skip
shapes = given(
    text=st.sampled_from(FORMATS),
    out=st.integers(1, 140),
    inputs=st.integers(1, 200) | st.integers(201, 1300),
    rows=st.integers(1, 40),
    programs=st.sampled_from([1, 6, 256]),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 9),
)


@contextmanager
def cut_in_two(kernel: TritonGpu, x: torch.Tensor) -> Iterator[None]:
    """Columns in two splits, of several steps where there are as many blocks."""
    words = kernel._words
    assert words is not None and len(words.words) > 1
    config = product._config(len(x), x.dtype, words)
    with of_programs(2 * -(-kernel.shape[0] // config["OUT"]) * -(-len(x) // config["ROWS"])):
        yield


@pytest.mark.parametrize("text", FORMATS)
def test_every_format(text: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = quantized(text, 75, 1300)
    kernel = TritonGpu(weight)
    for rows in (1, 5, 19):
        x = randn(rows, 1300, dtype=dtype)
        with cut_in_two(kernel, x):
            y, again = kernel(x), kernel(x)
        assert y.dtype == dtype and y.shape == (rows, 75)
        assert off(y, x, exact(weight)) < DTYPES[dtype], rows
        assert torch.equal(y, again), "the same input must give the same bits"


@settings(max_examples=30)
@shapes
def test_odd_shapes_and_ragged_groups(
    text: str, out: int, inputs: int, rows: int, programs: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, x = quantized(text, out, inputs), randn(rows, inputs, dtype=dtype)
    with of_programs(programs):
        assert off(TritonGpu(weight)(x), x, exact(weight)) < DTYPES[dtype]


@pytest.mark.parametrize("text", ["int4 g32 asym", "int4 g32", "int8 g32 asym", "int8 g32"])
def test_the_ends_of_codes_and_zero_points(text: str, programs: int) -> None:
    spec = QuantSpec.parse(text)
    low, high = spec.code_range
    ends = torch.tensor([low, high, 0 if low < 0 else (low + high) // 2])
    codes = ends[torch.arange(40 * 1344).view(40, 1344) % 3].to(torch.int8 if low < 0 else torch.uint8)
    scale = torch.tensor([0.0, 1e-7, 60000.0]).half().repeat(40, 14)
    zero = torch.tensor([low, high, 7]).to(torch.uint8).repeat(40, 14) if spec.zero == "int" else None
    weight = there(QuantizedTensor(codes, scale, spec, zero))
    for x in (torch.zeros(3, 1344), torch.full((3, 1344), 1e27), torch.randn(3, 1344) * 1e-30):
        for rows in (x.to(DEVICE), x[:1].to(DEVICE)):
            y = TritonGpu(weight)(rows)
            assert bool(y.isfinite().all()) and off(y, rows, exact(weight)) < 5e-6


@pytest.mark.parametrize("row", [0, 1])
def test_what_is_no_number_in_x_reaches_its_own_row_only(row: int) -> None:
    weight, x = quantized("int4 g16", 20, 30), torch.ones(3, 30, device=DEVICE)
    x[row, 29] = torch.nan
    y = TritonGpu(weight)(x)
    others = [i for i in range(3) if i != row]
    assert bool(y[row].isnan().all()) and bool(y[others].isfinite().all())
    assert bool(TritonGpu(weight)(x[row]).isnan().all())


def test_a_block_of_zeros_and_a_weight_of_zeros(programs: int) -> None:
    torch.manual_seed(0)
    for text in ("int4 g32", "int4 g32 asym", "nf4 g32"):
        weight = quantized(text, 33, 1344)
        scale = weight.scale.clone()
        scale[:, 1] = 0
        some = replace(weight, scale=scale)
        x = randn(2, 1344)
        assert off(TritonGpu(some)(x), x, exact(some)) < 5e-6
        assert not TritonGpu(replace(weight, scale=torch.zeros_like(scale)))(x).any()


def test_act_order_bias_leading_axes_and_no_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = quantized("int4 g32 asym", 40, 1280)
    weight = replace(weight, g_idx=torch.randperm(1280).int().to(DEVICE) // 32)
    kernel, x, bias = TritonGpu(weight), randn(2, 3, 1280, dtype=dtype), 100 * randn(40, dtype=dtype)
    with cut_in_two(kernel, x.view(6, 1280)):
        y = kernel(x, bias)
    with cut_in_two(kernel, x[0, :1]):
        row = kernel(x[0, 0], bias)
    assert y.shape == (2, 3, 40) and y.dtype == dtype
    ones = torch.ones(6, 1, device=DEVICE)
    wide = torch.cat([exact(weight), bias.double()[:, None]], dim=1)
    assert off(y.view(6, 40), torch.cat([x.view(6, 1280), ones.to(dtype)], dim=1), wide) < DTYPES[dtype]
    assert row.shape == (40,) and bool((row - y[0, 0]).abs().max() < 300 * DTYPES[dtype])
    assert kernel(x[:0]).shape == (0, 3, 40)
    strided = randn(6, 2560, dtype=dtype)
    assert torch.equal(kernel(strided[::2, ::2]), kernel(strided[::2, ::2].contiguous()))


def test_the_counters_of_a_split_are_zeros_again(monkeypatch: pytest.MonkeyPatch) -> None:
    counters = torch.zeros(8, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(product, "_counters", lambda device, tiles: counters)
    kernel, x = TritonGpu(quantized("int4 g32", 130, 1300)), randn(3, 1300)
    with cut_in_two(kernel, x):
        y = kernel(x)
        assert not counters.any() and torch.equal(kernel(x), y)


@pytest.mark.parametrize(("other", "loses"), [(torch.float64, 5e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_other_dtypes_are_given_back(other: torch.dtype, loses: float) -> None:
    weight, x = quantized("int4 g32", 8, 64), randn(2, 64).to(other)
    y = TritonGpu(weight)(x)
    assert y.dtype == other and off(y, x, exact(weight)) < loses


@given(tiles=st.integers(1, 600), steps=st.integers(1, 400))
def test_splits_cover_all_steps_in_as_many_programs_as_there_may_be(tiles: int, steps: int) -> None:
    span, splits = split(tiles, steps)
    assert (splits - 1) * span < steps <= splits * span
    assert splits == 1 or tiles * splits <= PROGRAMS
    assert span == 1 or tiles * -(-steps // (span - 1)) > PROGRAMS, "shorter ones would still fit"


def test_the_dispatch_takes_it_on_a_gpu_and_the_interpreter_where_it_is_named() -> None:
    weight, x = quantized("int4 g32", 16, 256), randn(3, 256)
    named = prepare(weight, "triton_gpu")
    assert named.backend == "triton_gpu" and off(named(x), x, exact(weight)) < 5e-6
    assert (prepare(weight).backend == "triton_gpu") == (not INTERPRETED)
    assert named.nbytes == 16 * 256 // 2 + 16 * 8 * 2
    assert prepare(quantized("int4 g32", 16, 132), "triton_gpu").nbytes == 16 * 256 // 2 + 16 * 5 * 2, "whole blocks"


@pytest.mark.parametrize(
    ("text", "inputs", "reason"),
    [
        ("int4 g24", 96, "multiple of 16, found 24"),
        ("int4 b64", 100, "cross rows"),
        ("fp8_e4m3 channel", 64, "for integers, found fp8_e4m3"),
        ("nf4 b64 mean", 64, "mean"),
    ],
)
def test_the_reason_why_not_is_named(text: str, inputs: int, reason: str) -> None:
    assert reason in str(backends(quantized(text, 4, inputs))["triton_gpu"])


def test_what_it_does_not_know_is_refused() -> None:
    weight = quantized("int4 g32", 8, 64)
    outliers = torch.tensor([3], device=DEVICE), torch.tensor([50.0], device=DEVICE)
    assert "outliers" in str(TritonGpu.why_not(replace(weight, outliers=outliers)))
    assert "not empty" in str(TritonGpu.why_not(replace(weight, codes=weight.codes[:0])))
    uneven = replace(weight, g_idx=torch.zeros(64, dtype=torch.int32, device=DEVICE))
    assert "32 columns each" in str(TritonGpu.why_not(uneven))
    table = torch.arange(16.0, device=DEVICE).repeat(8, 1)
    spec = QuantSpec.parse("table4 g32")
    own = QuantizedTensor(weight.codes.byte() % 16, weight.scale, spec, table=table)
    assert "table of its own" in str(TritonGpu.why_not(own))
    shared = replace(own, table=table[0])
    x = randn(2, 64)
    assert TritonGpu.why_not(shared) is None and off(TritonGpu(shared)(x), x, exact(shared)) < 5e-6
    read, inlaid = TritonGpu(shared)._words, TritonGpu(quantized("nf4 g32", 8, 64))._words
    assert read is not None and inlaid is not None
    assert read.values == () and len(inlaid.values) == 16, "a learned table would make a kernel of its own"
    with pytest.raises(ValueError, match="64 input features"):
        TritonGpu(weight)(randn(2, 32))
    with pytest.raises(ValueError, match="no gradients"):
        TritonGpu(weight)(randn(2, 64).requires_grad_())
