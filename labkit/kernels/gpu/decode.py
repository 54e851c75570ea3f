"""Codes in words to numbers in registers, on the way into a tensor core's operand.

A word of 16 bits holds codes of numbers that lie apart, so a shift takes the same code out of every word of a tile and
nothing has to move between threads. A tile's words lie in registers by twos, and what is done here is done to two at
once, in PTX. Triton's interpreter, which knows none, computes in float32 and does it by ordinary operations.
"""

from __future__ import annotations

import triton
import triton.language as tl

WORD = 16  # bits


@triton.jit
def lifted(words: tl.tensor, like: tl.tensor, s: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """The codes at bit ``s * BITS`` of int16 ``words`` and ``lift`` above them, of the dtype of ``like``, exactly."""
    if like.dtype == tl.float32:
        codes = (words >> (BITS * s)) & (2**BITS - 1)  # the mask also cuts off the copies of the sign that >> lets in
        numbers = codes.to(tl.float32)
    else:
        numbers = tl.inline_asm_elementwise(
            two_codes(BITS * s, BITS, like.dtype), "=r,r", [words], dtype=like.dtype, is_pure=True, pack=2
        )
    return numbers


@triton.jit
def looked_up(words: tl.tensor, like: tl.tensor, s: tl.constexpr, BITS: tl.constexpr, TABLE: tl.constexpr) -> tl.tensor:
    """What the codes at bit ``s * BITS`` of int16 ``words`` stand for, of float16 or bfloat16 as ``like`` is.

    TABLE  the bit patterns of 16 numbers of that dtype, four hexadecimal digits each
    """
    return tl.inline_asm_elementwise(
        four_numbers(BITS * s, BITS, TABLE), "=r,=r,r,r", [words], dtype=like.dtype, is_pure=True, pack=4
    )


@triton.constexpr_function
def lift(bits, dtype):  # type: ignore[no-untyped-def]
    """How much above a code the number is that ``lifted`` gives; int8 in bfloat16, too short for it, is centred."""
    if dtype == tl.float32:
        return 0
    if dtype == tl.bfloat16:
        return 128 if bits <= 4 else -128
    return 1024


@triton.constexpr_function
def two_codes(shift, bits, dtype):  # type: ignore[no-untyped-def]
    """PTX from two words in a register, $1, to two floats, $0.

    Set as the last bits of 1024 in float16, or of 128 in bfloat16, a code adds itself to that number (Kim et al. 2022,
    Who says elephants can't run, arXiv 2211.10017; Frantar et al. 2024, MARLIN, arXiv 2408.11743). Seven bits are all
    that bfloat16 has for it: of eight, the highest chooses what is taken off, 128 or 256.
    """
    leading = 0x4300 if dtype == tl.bfloat16 else 0x6400
    if dtype == tl.bfloat16 and bits == 8:
        return (
            f"{{ .reg .b32 t, u, one; shr.u32 t, $1, {shift}; mov.b32 one, {_twice(0x3F80)}; "
            f"lop3.b32 u, t, {_twice(0x80)}, {_twice(0xC380)}, 0x6A; "  # (t & 0x80) ^ -256.0
            f"lop3.b32 t, t, {_twice(0x7F)}, {_twice(leading)}, 0xEA; fma.rn.bf16x2 $0, t, one, u; }}"
        )
    mask = _twice(2**bits - 1)
    return f"{{ .reg .b32 t; shr.u32 t, $1, {shift}; lop3.b32 $0, t, {mask}, {_twice(leading)}, 0xEA; }}"  # & and |


@triton.constexpr_function
def four_numbers(shift, bits, table):  # type: ignore[no-untyped-def]
    """PTX from twice two words, $2 and $3, to their numbers in ``table``, $0 and $1.

    prmt takes four bytes out of eight, so the low and the high bytes of the first and of the last eight numbers are
    looked up apart; the fourth bit of a code says which of the two it shall be.
    """
    numbers = [int(table[4 * i : 4 * i + 4], 16) for i in range(16)]
    bytes_of = [[(number >> place) & 0xFF for number in numbers] for place in (0, 8)]
    low, high = (
        [f"{sum(plane[4 * i + k] << (8 * k) for k in range(4)):#x}" for i in range(4)] for plane in bytes_of
    )
    codes = "".join(
        f"shr.u32 {name}, {word}, {shift}; and.b32 {name}, {name}, {_twice(2**bits - 1)}; "
        for name, word in (("t", "$2"), ("u", "$3"))
    )
    both = "".join(
        f"prmt.b32 {name}, {plane[0]}, {plane[1]}, t; prmt.b32 u, {plane[2]}, {plane[3]}, t; "
        f"lop3.b32 {name}, u, {name}, m, 0xE4; "  # (u & m) | (name & ~m)
        for name, plane in (("l", low), ("h", high))
    )
    return (
        f"{{ .reg .b32 t, u, m, l, h; {codes}"
        "shl.b32 u, u, 4; or.b32 t, t, u; shr.u32 u, t, 8; or.b32 t, t, u; "  # codes 0, 2, 1, 3 in four bits each
        "prmt.b32 m, 0x80808080, 0x80808080, t; shl.b32 m, m, 1; prmt.b32 m, m, 0, 0xBA98; "  # ff where one is above 7
        f"and.b32 t, t, 0x7777; {both}"
        "prmt.b32 $0, l, h, 0x6240; prmt.b32 $1, l, h, 0x7351; }"
    )


@triton.constexpr_function
def _twice(half):  # type: ignore[no-untyped-def]
    return f"{half * 0x10001:#x}"
