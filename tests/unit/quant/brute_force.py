"""The grids again, in plain Python numbers: no tensor operation, one element at a time."""

from __future__ import annotations

import math
import struct

from labkit.quant import QuantSpec

_CODE = {"fp32": "<f", "fp16": "<e"}


def as_float(x: float, dtype: str = "fp32") -> float:
    """``x`` rounded to fp32 or fp16, half to even, by the C library's rules."""
    return struct.unpack(_CODE[dtype], struct.pack(_CODE[dtype], x))[0]


def quantize_block(block: list[float], spec: QuantSpec) -> tuple[float, int, list[int]]:
    """(scale, zero, codes) of one block of float32 numbers on an integer grid, min-max range."""
    bits = spec.bits
    if len(set(block)) == 1:  # the constant is one step
        scale = abs(block[0])
    elif spec.zero == "int":
        scale = (max(*block, 0.0) - min(*block, 0.0)) / (2**bits - 1)
    elif spec.narrow:
        scale = max(map(abs, block)) / (2 ** (bits - 1) - 1)
    else:
        scale = max(map(abs, block)) / ((2**bits - 1) / 2)
    scale = as_float(scale, spec.scale)
    if scale == 0:
        return 0.0, 0, [0] * len(block)
    zero = 0
    lowest, highest = (0, 2**bits - 1) if spec.zero == "int" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    lowest += spec.narrow
    if spec.zero == "int":
        zero = min(max(round(-min(*block, 0.0) / scale), lowest), highest)
    codes = [min(max(round(as_float(x / scale)) + zero, lowest), highest) for x in block]
    return scale, zero, codes


def dequantize_block(scale: float, zero: int, codes: list[int]) -> list[float]:
    return [as_float((code - zero) * scale) for code in codes]


def pack_row(codes: list[int], bits: int) -> list[int]:
    """The bytes of one row: one big whole number, code i shifted by i * bits, its low byte first."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return list(number.to_bytes(math.ceil(len(codes) * bits / 8), "little"))
