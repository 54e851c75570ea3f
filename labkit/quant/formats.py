"""The number formats: which values a few bits can stand for, and how a number is rounded to them.

Every format is a table of values in units of the scale. Integers are evenly spaced; floats are a sign, an
exponent and a mantissa; ``nf4`` is sixteen quantiles of the normal distribution; ``dynamic8`` trades bits
of its fraction for decades of range. Sources: IEEE 754 (fp16), OCP 8-bit Floating Point Specification 1.0
(fp8_e4m3, fp8_e5m2), OCP Microscaling Formats 1.0 (fp6, fp4, e8m0), QLoRA (arXiv 2305.14314, nf4),
Dettmers 2015 (arXiv 1511.04561, dynamic8).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# bitsandbytes' table: quantiles of N(0, 1), eight below zero, seven above, scaled to [-1, 1].
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class FloatFormat:
    """A float: a sign bit, ``exponent`` bits, ``mantissa`` bits; ``largest`` is its largest value.

    ``ieee``: the highest exponent means infinity (fraction 0) or NaN. The others have no infinity; of them
    only fp8_e4m3 has a NaN.
    """

    exponent: int
    mantissa: int
    largest: float
    ieee: bool = False

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    @property
    def smallest_exponent(self) -> int:
        """The exponent of the smallest normal number; subnormals share it."""
        return 1 - self.bias


FLOATS = {
    "fp8_e4m3": FloatFormat(4, 3, 448.0),
    "fp8_e5m2": FloatFormat(5, 2, 57344.0, ieee=True),
    "fp6_e2m3": FloatFormat(2, 3, 7.5),
    "fp6_e3m2": FloatFormat(3, 2, 28.0),
    "fp4_e2m1": FloatFormat(2, 1, 6.0),
}
# What weights come in: to round to, not to make codes of.
HALVES = {
    "fp16": FloatFormat(5, 10, 65504.0, ieee=True),
    "bf16": FloatFormat(8, 7, torch.finfo(torch.bfloat16).max, ieee=True),
}
INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))
LEARNED = ("table2", "table3", "table4")  # a learned codebook of 2 to 4 bits: Params carries its values
TABLES = ("nf4", "dynamic8", *LEARNED)
FORMATS = (*INTEGERS, *FLOATS, *TABLES)

# What a scale may be stored as. e8m0 is a bare power of two, 2^-127 to 2^127; Grid.scale_for says which one
# each of its three names takes.
SCALE_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "e8m0": torch.float8_e8m0fnu,
    "e8m0-ceil": torch.float8_e8m0fnu,
    "e8m0-even": torch.float8_e8m0fnu,
}


def bits_of(name: str) -> int:
    """Bits of one code of the format ``name``. Raises ValueError for an unknown name."""
    if name in INTEGERS:
        return int(name[3:])
    if name in FLOATS:
        return FLOATS[name].bits
    if name in TABLES:
        return int(name[-1])
    raise ValueError(f"format must be one of {', '.join(FORMATS)}, found {name!r}")


@cache
def _values(name: str) -> tuple[float, ...]:
    if name == "nf4":
        return NF4
    if name == "dynamic8":
        return _dynamic8()
    if name == "e8m0":
        return (*(2.0 ** (code - 127) for code in range(255)), math.nan)
    fmt = _float(name, "nf4", "dynamic8", "e8m0")
    values = []
    for code in range(2**fmt.bits):
        sign = -1.0 if code >> (fmt.bits - 1) else 1.0
        exponent = (code >> fmt.mantissa) & (2**fmt.exponent - 1)
        fraction = (code & (2**fmt.mantissa - 1)) / 2**fmt.mantissa
        normal = (1 + fraction) * 2.0 ** (exponent - fmt.bias)
        value = normal if exponent else fraction * 2.0**fmt.smallest_exponent
        if value > fmt.largest:  # the patterns that mean infinity or NaN
            value = math.inf if fmt.ieee and fraction == 0 else math.nan
        values.append(sign * value)
    return tuple(values)


def _dynamic8() -> tuple[float, ...]:
    """The table of bitsandbytes' 8-bit blockwise quantization, in its float32 arithmetic: 0, 1, and the
    middles of 1, 2, 4, ... 64 equal parts of [0.1, 1] times 1e-6, 1e-5, ... 1, with both signs.
    """
    positive: list[float] = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        positive += (10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    return (*(-value for value in reversed(positive)), 0.0, *positive, 1.0)


def _float(name: str, *others: str) -> FloatFormat:
    floats = FLOATS | HALVES
    if name not in floats:
        raise ValueError(f"name must be one of {', '.join((*others, *floats))}, found {name!r}")
    return floats[name]


def values_of(name: str) -> Tensor:
    """The value of every code of a float format, ``nf4``, ``dynamic8`` or ``e8m0``: float32, shape (2**bits,).

    Element ``i`` is what the bit pattern ``i`` stands for: ``values_of("fp4_e2m1")[0b0111]`` is 6.
    """
    return torch.tensor(_values(name), dtype=torch.float32)


def largest_of(name: str) -> float:
    """The largest value of the format: 6.0 for fp4_e2m1, 127 for int8, 1.0 for tables."""
    if name in INTEGERS:
        return float(2 ** (bits_of(name) - 1) - 1)
    return FLOATS[name].largest if name in FLOATS else 1.0


def round_to_format(x: Tensor, name: str) -> Tensor:
    """The nearest value of the format for every element of ``x``, same shape; ties go to the even code.

    Beyond the largest value it saturates, infinity too, as the OCP conversions do; NaN stays NaN. ``name`` is
    a float format, fp16 and bf16 among them, ``nf4`` or ``dynamic8`` (ties go to the lower value, as in
    bitsandbytes), or ``e8m0`` (in the log domain; 0 goes to the smallest, a negative number to NaN).
    Computes in float32, or float64 where ``x`` is float64.
    """
    x = x if x.dtype == torch.float64 else x.float()
    if name == "e8m0":
        return torch.exp2(torch.log2(x).round().clamp(-127, 127))
    if name in ("nf4", "dynamic8"):
        table = values_of(name).to(x)
        return torch.where(x.isnan(), x, table[nearest(x, table)])
    fmt = _float(name, "nf4", "dynamic8", "e8m0")
    _, exponent = torch.frexp(x)  # x = m * 2**exponent with 0.5 <= |m| < 1
    step = torch.exp2((exponent - 1).clamp(min=fmt.smallest_exponent).to(x.dtype) - fmt.mantissa)
    return (torch.round(x / step) * step).clamp(-fmt.largest, fmt.largest)


def float_codes(values: Tensor, name: str) -> Tensor:
    """The bit patterns (uint8, same shape) of ``values`` that already lie on the float format's grid."""
    sign_bit = 1 << (FLOATS[name].bits - 1)
    positive = values_of(name)[:sign_bit]
    positive = positive[positive <= FLOATS[name].largest].to(values)  # ascending: the pattern is the rank
    magnitude = torch.searchsorted(positive, values.abs().contiguous()).to(torch.uint8)
    return magnitude | (torch.signbit(values).to(torch.uint8) * sign_bit)


def nearest(x: Tensor, table: Tensor) -> Tensor:
    """Index (int64, shape of ``x``) of the nearest entry of an ascending table; ties go to the lower.

    ``table`` is (levels,), or (rows, levels): one for each row of ``x``, (rows, columns).
    """
    middles = (table[..., :-1] + table[..., 1:]) / 2
    if table.dim() == 1:
        return torch.bucketize(x, middles)
    return torch.searchsorted(middles, x.contiguous())
