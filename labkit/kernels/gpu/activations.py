"""Activations onto int8 or fp8, each row with a scale of its own, found as the row comes by.

The codes are those of ``labkit.quant.encode`` to the last bit. fp8 is rounded by integer arithmetic, because
instructions for it begin with sm_89; the time goes into memory either way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit.quant import QuantizedTensor, QuantSpec

ROUND = {"BLOCK": 4096, "num_warps": 8}
LARGEST = 448.0  # of fp8_e4m3


def quantize_rows(x: Tensor, format: str = "int8", narrow: bool = False) -> QuantizedTensor:
    """x (rows, columns) on the grid "int8 channel scale=fp32", "int8 channel narrow scale=fp32" or "fp8_e4m3 channel
    scale=fp32": codes (rows, columns), int8 or uint8 bit patterns, and scales (rows, 1).

    Unlike ``fit`` it does not look for NaN and infinity, which would make the CPU wait for the GPU. A row that
    holds one has no meaning afterwards; the others are as they should be. Raises ValueError for other formats.
    """
    if format not in ("int8", "fp8_e4m3") or x.dim() != 2:
        raise ValueError(f"expected a matrix and int8 or fp8_e4m3, found {tuple(x.shape)} and {format!r}")
    spec = QuantSpec(format, (1, None), scale="fp32", narrow=narrow)
    rows, columns = x.shape
    codes = torch.empty(
        rows, columns, dtype=torch.int8 if spec.is_integer else torch.uint8, device=x.device
    )
    scale = torch.empty(rows, 1, device=x.device)
    if codes.numel():
        steps = LARGEST if not spec.is_integer else 127.0 if narrow else 127.5
        _round_rows[(rows,)](
            x.contiguous(),
            codes,
            scale,
            columns,
            STEPS=steps,
            LOW=spec.code_range[0],
            FP8=not spec.is_integer,
            **ROUND,
        )
    return QuantizedTensor(codes, scale, spec)


@triton.jit
def _nearest(x: tl.tensor) -> tl.tensor:
    """Whole numbers, halves to even, for |x| < 2**22: adding 1.5 * 2**23 leaves float32 no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _e4m3(x: tl.tensor) -> tl.tensor:
    """The bit patterns of the nearest fp8_e4m3 numbers, halves to even, at most 448: int32."""
    bits = tl.minimum(tl.abs(x), 448.0).to(tl.int32, bitcast=True)
    kept = bits + 0x7FFFF + ((bits >> 20) & 1)  # 20 of the 23 bits of the fraction go
    normal = (kept >> 20) - (120 << 3)  # the exponent counts from 7 and no longer from 127
    small = _nearest(tl.minimum(tl.abs(x), 1.0) * 512.0).to(tl.int32)  # below 2**-6 steps are of 2**-9
    code = tl.where(bits < (121 << 23), small, normal)
    return code | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)


@triton.jit
def _round_rows(
    x: tl.tensor, codes: tl.tensor, scale: tl.tensor, columns: int,
    STEPS: tl.constexpr, LOW: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    lowest = tl.full((BLOCK,), float("inf"), tl.float32)
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, columns, BLOCK):
        k = start + tl.arange(0, BLOCK)
        numbers = tl.load(x + row * columns + k, mask=k < columns, other=0.0).to(tl.float32)
        lowest = tl.minimum(lowest, tl.where(k < columns, numbers, float("inf")))
        highest = tl.maximum(highest, tl.where(k < columns, numbers, float("-inf")))
    low, high = tl.min(lowest, axis=0), tl.max(highest, axis=0)
    largest = tl.maximum(tl.abs(low), tl.abs(high))
    step = tl.div_rn(largest, tl.full((), STEPS, tl.float32))
    smallest = tl.full((), 1, tl.int32).to(tl.float32, bitcast=True)  # 2**-149: with 0 the row is lost
    step = tl.where(largest > 0, tl.maximum(step, smallest), 0.0)
    step = tl.where(low == high, largest, step)  # as fit does it: one step is the constant itself
    tl.store(scale + row, step)
    divisor = tl.zeros((BLOCK,), tl.float32) + tl.where(step == 0, 1.0, step)
    for start in range(0, columns, BLOCK):
        k = start + tl.arange(0, BLOCK)
        numbers = tl.load(x + row * columns + k, mask=k < columns, other=0.0).to(tl.float32)
        scaled = tl.div_rn(numbers, divisor)
        rounded = _e4m3(scaled) if FP8 else tl.minimum(tl.maximum(_nearest(scaled), LOW), 127).to(tl.int32)
        tl.store(codes + row * columns + k, rounded.to(codes.dtype.element_ty), mask=k < columns)
