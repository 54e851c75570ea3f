"""Bit patterns against struct, torch's float8 dtypes and numpy's neighbours."""

import math
import struct

import numpy as np
import pytest
import torch

from labkit.quant.patterns import NAMES, fields, largest, neighbours, number_of, widths


def test_fields_of_one_and_of_minus_six() -> None:
    assert fields(0x3F800000, "fp32") == (0, 127, 0)
    assert fields(0b1_11_1, "fp4_e2m1") == (1, 3, 1)
    assert fields(0b1100_0000, "int8") == (1, 0, 64)


@pytest.mark.parametrize("pattern", [0, 1, 0x3C00, 0x7BFF, 0x8001, 0xC500, 0x03FF])
def test_fp16_is_structs_half(pattern: int) -> None:
    assert number_of(pattern, "fp16") == struct.unpack("<e", struct.pack("<H", pattern))[0]


@pytest.mark.parametrize("pattern", [0, 1, 0x3F800000, 0x7F7FFFFF, 0x80000001, 0xC0490FDB])
def test_fp32_is_structs_float_and_bf16_its_first_half(pattern: int) -> None:
    assert number_of(pattern, "fp32") == struct.unpack("<f", struct.pack("<I", pattern))[0]
    first = pattern >> 16
    assert number_of(first, "bf16") == struct.unpack("<f", struct.pack("<I", first << 16))[0]


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)]
)
def test_fp8_is_torchs(name: str, dtype: torch.dtype) -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(dtype).float().tolist()
    ours = [number_of(pattern, name) for pattern in range(256)]
    assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(ours, theirs, strict=True))


def test_int4_is_twos_complement() -> None:
    assert [number_of(p, "int4") for p in range(16)] == [*range(8), *range(-8, 0)]


def test_neighbours_of_fp16_are_numpys() -> None:
    for value in (1.0, -1.0, 0.0, 6e-8, -2048.0):
        x = np.float16(value)
        below, above = neighbours(int(x.view(np.uint16)), "fp16")
        for ours, end in ((below, -np.inf), (above, np.inf)):
            assert ours == float(np.nextafter(x, np.float16(end)))
    assert neighbours(0x7BFF, "fp16") == (65472.0, None)


@pytest.mark.parametrize("name", [name for name in NAMES if sum(widths(name)) <= 8])
def test_neighbours_are_those_in_the_sorted_list(name: str) -> None:
    values = {p: number_of(p, name) for p in range(2 ** sum(widths(name)))}
    ordered = sorted({v for v in values.values() if math.isfinite(v)})
    for pattern, value in values.items():
        if not math.isfinite(value):
            assert neighbours(pattern, name) == (None, None)
            continue
        at = ordered.index(value)
        below = ordered[at - 1] if at else None
        above = ordered[at + 1] if at + 1 < len(ordered) else None
        assert neighbours(pattern, name) == (below, above)


@pytest.mark.parametrize(("name", "value"), [("fp16", 65504.0), ("fp8_e4m3", 448.0), ("int4", 7.0)])
def test_the_largest_number_has_none_above(name: str, value: float) -> None:
    assert largest(name) == value
    last = next(p for p in range(2 ** sum(widths(name))) if number_of(p, name) == value)
    assert neighbours(last, name)[1] is None


def test_what_is_not_a_pattern_is_refused() -> None:
    with pytest.raises(ValueError, match="0 to 15; found 16"):
        number_of(16, "fp4_e2m1")
    with pytest.raises(ValueError, match="fp5"):
        widths("fp5")
