"""Bit patterns: which fields a code has, which number it stands for, and which numbers lie beside it.

For looking at formats, also those of ordinary tensors (fp32, bf16, fp16). Quantizing works on whole tables:
see ``formats``. Floats are IEEE 754's (fp32, fp16), the first half of fp32 (bf16) and those of the OCP
specifications; integers are two's complement.
"""

from __future__ import annotations

import torch

from labkit.quant import formats

# name: (dtype, integers of the same width, exponent bits, mantissa bits)
DTYPES = {
    "fp32": (torch.float32, torch.int32, 8, 23),
    "bf16": (torch.bfloat16, torch.int16, 8, 7),
    "fp16": (torch.float16, torch.int16, 5, 10),
}
NAMES = (*DTYPES, *formats.FLOATS, *formats.INTEGERS)


def widths(name: str) -> tuple[int, int, int]:
    """Bits of sign, exponent (0 for an integer) and mantissa. Raises ValueError for an unknown name."""
    if name in DTYPES:
        return 1, *DTYPES[name][2:]
    if name in formats.FLOATS:
        return 1, formats.FLOATS[name].exponent, formats.FLOATS[name].mantissa
    if name in formats.INTEGERS:
        return 1, 0, formats.bits_of(name) - 1
    raise ValueError(f"name must be one of {', '.join(NAMES)}, found {name!r}")


def fields(pattern: int, name: str) -> tuple[int, int, int]:
    """Sign, exponent and mantissa of a bit pattern, as whole numbers."""
    _, exponent, mantissa = widths(name)
    _check(pattern, name)
    return (
        pattern >> (exponent + mantissa),
        pattern >> mantissa & 2**exponent - 1,
        pattern & 2**mantissa - 1,
    )


def number_of(pattern: int, name: str) -> float:
    """The number that a bit pattern stands for; infinite or NaN where the format has such."""
    _check(pattern, name)
    bits = sum(widths(name))
    if name in formats.INTEGERS:
        return float(pattern - 2**bits if pattern >> (bits - 1) else pattern)
    if name in formats.FLOATS:
        return formats.values_of(name)[pattern].item()
    dtype, integers, *_ = DTYPES[name]
    signed = pattern - 2**bits if pattern >> (bits - 1) else pattern
    return torch.tensor(signed, dtype=integers).view(dtype).item()


def largest(name: str) -> float:
    """The largest finite number of the format."""
    return torch.finfo(DTYPES[name][0]).max if name in DTYPES else formats.largest_of(name)


def neighbours(pattern: int, name: str) -> tuple[float | None, float | None]:
    """The next number below and above; None beyond the last one, and for a pattern that is no finite number."""
    half = 2 ** (sum(widths(name)) - 1)
    here = number_of(pattern, name)
    if here in (float("inf"), float("-inf")) or here != here:
        return None, None
    integer = name in formats.INTEGERS
    # A float counts its magnitude, so a negative one goes down where the pattern goes up.
    rank = pattern if pattern < half else pattern - 2 * half if integer else half - pattern
    found: list[float | None] = []
    for other in (rank - 1, rank + 1):
        inside = -half <= other < half if integer else abs(other) < half
        code = other if other >= 0 else other + 2 * half if integer else half - other
        value = number_of(code, name) if inside else float("nan")
        found.append(value if abs(value) < float("inf") else None)
    return found[0], found[1]


def _check(pattern: int, name: str) -> None:
    bits = sum(widths(name))
    if not 0 <= pattern < 2**bits:
        raise ValueError(f"a pattern of {name} is {bits} bits, 0 to {2**bits - 1}; found {pattern}")
