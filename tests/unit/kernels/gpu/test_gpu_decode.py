"""The PTX that takes codes out of words, executed here one instruction after another on every word there is.

On a GPU it runs inside the kernels that the other tests try; without one this is what shows it right.
"""

from __future__ import annotations

import re

import pytest
import torch
import triton.language as tl
from torch import Tensor

from labkit.kernels.gpu import decode
from labkit.kernels.gpu.product import _inlaid
from labkit.quant import Grid, QuantSpec

pytestmark = pytest.mark.gpu

DTYPES = {tl.float16: torch.float16, tl.bfloat16: torch.bfloat16}
WORDS = torch.arange(2**16)


def run(ptx: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The registers after ``ptx``, each int64 that holds 32 bits, as the PTX manual has it (ISA 8.7)."""
    held = dict(inputs)

    def value(name: str) -> Tensor:
        return held[name] if name in held else torch.full_like(WORDS, int(name, 0))

    def prmt(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        made = torch.zeros_like(a)
        both = [(x >> (8 * i)) & 0xFF for x in (a, b) for i in range(4)]
        for i in range(4):
            chosen = (c >> (4 * i)) & 15
            byte = torch.stack(both)[chosen & 7, torch.arange(len(a))]
            made |= torch.where(chosen > 7, (byte >> 7) * 0xFF, byte) << (8 * i)
        return made

    def lop3(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
        made = torch.zeros_like(a)
        for i in range(8):
            x, y, z = ((v if i & bit else ~v) for v, bit in ((a, 4), (b, 2), (c, 1)))
            made |= torch.where((table >> i) & 1 > 0, x & y & z, 0)
        return made

    def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        x, y, z = (
            torch.stack([v & 0xFFFF, v >> 16]).to(torch.int32).to(torch.int16).view(torch.bfloat16) for v in (a, b, c)
        )
        low, high = (x.double() * y.double() + z.double()).bfloat16().view(torch.int16).long() & 0xFFFF
        return low | (high << 16)

    does = {
        "shr.u32": lambda a, b: a >> b, "shl.b32": lambda a, b: a << b, "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b, "mov.b32": lambda a: a, "prmt.b32": prmt, "lop3.b32": lop3,
        "fma.rn.bf16x2": fma,
    }  # fmt: skip
    for line in re.sub(r"[{}]", "", ptx).split(";"):
        if not line.strip() or ".reg" in line:
            continue
        name, rest = line.split(maxsplit=1)
        to, *parts = (part.strip() for part in rest.split(","))
        held[to] = does[name](*map(value, parts)) & 0xFFFFFFFF
    return held


def words_of(register: Tensor) -> list[Tensor]:
    return [(register >> place) & 0xFFFF for place in (0, 16)]


def floats(words: Tensor, dtype: torch.dtype) -> Tensor:
    return words.to(torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_two_codes_and_what_they_are_lifted_by(dtype: tl.dtype, bits: int) -> None:
    others = WORDS.flip(0)
    for shift in range(0, 16, bits):
        made = run(decode.two_codes(shift, bits, dtype), {"$1": WORDS | (others << 16)})["$0"]
        for words, found in zip((WORDS, others), words_of(made), strict=True):
            codes = (words >> shift) & (2**bits - 1)
            assert torch.equal(floats(found, DTYPES[dtype]).double(), codes + float(decode.lift(bits, dtype)))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("format", ["nf4 g64", "mxfp4"])
def test_four_numbers_of_a_table(dtype: torch.dtype, format: str) -> None:
    table = Grid(QuantSpec.parse(format)).dequantize(torch.arange(16), torch.ones(()))
    words = [WORDS, WORDS.flip(0), WORDS.roll(4321), WORDS.flip(0).roll(1234)]
    inputs = {"$2": words[0] | (words[1] << 16), "$3": words[2] | (words[3] << 16)}
    for shift in range(0, 16, 4):
        made = run(decode.four_numbers(shift, 4, _inlaid(tuple(table.tolist()), dtype)), inputs)
        for word, found in zip(words, [*words_of(made["$0"]), *words_of(made["$1"])], strict=True):
            assert torch.equal(floats(found, dtype), table[(word >> shift) & 15].to(dtype))


def test_four_numbers_of_a_table_of_two_bits() -> None:
    table = torch.tensor([-1.5, 0.25, 3.0, -0.0])
    ptx = [decode.four_numbers(shift, 2, _inlaid(tuple(table.tolist()), torch.float16)) for shift in range(0, 16, 2)]
    for shift, text in zip(range(0, 16, 2), ptx, strict=True):
        made = run(text, {"$2": WORDS, "$3": WORDS << 16})
        assert torch.equal(floats(words_of(made["$0"])[0], torch.float16).float(), table[(WORDS >> shift) & 3])
        assert torch.equal(floats(words_of(made["$1"])[1], torch.float16).float(), table[(WORDS >> shift) & 3])


def test_a_table_that_is_short_or_not_there() -> None:
    assert _inlaid((), torch.float16) == "" and _inlaid((1.0,) * 32, torch.float16) == ""
    assert _inlaid((1.0, 2.0), torch.float32) == "", "the kernel reads it"
    assert _inlaid((1.0, -2.0), torch.bfloat16) == "3f80c000" + 56 * "0"
