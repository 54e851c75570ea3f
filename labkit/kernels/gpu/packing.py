"""Codes of 2, 4 or 8 bits in words of 32, and back: the bytes of ``labkit.quant.packing``, on the GPU. And in words of
16, as the kernels that multiply take them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.gpu.decode import WORD

PACK = {"WORDS": 256, "num_warps": 4}


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (rows, columns) below 2**bits to int32 words (rows, ceil(columns * bits / 32)), lowest bits first.

    Codes are not looked at: what is above 2**bits - 1 spoils its neighbour. Raises ValueError for other dtypes.
    """
    fits = codes.dtype == torch.uint8 and codes.dim() == 2
    _check(bits, fits, f"uint8 codes (rows, columns), found {codes.dtype} {tuple(codes.shape)}")
    rows, columns = codes.shape
    words = torch.empty(rows, words_of(columns, bits), dtype=torch.int32, device=codes.device)
    if words.numel():
        grid = (triton.cdiv(words.numel(), PACK["WORDS"]),)
        _pack[grid](codes.contiguous(), words, columns, words.shape[1], words.numel(), BITS=bits, **PACK)
    return words


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """int32 words (rows, ceil(columns * bits / 32)) back to uint8 codes (rows, columns)."""
    fits = words.dtype == torch.int32 and words.dim() == 2 and words.shape[1] == words_of(columns, bits)
    found = f"found {words.dtype} {tuple(words.shape)}"
    _check(bits, fits, f"int32 words (rows, {words_of(columns, bits)}), {found}")
    codes = torch.empty(len(words), columns, dtype=torch.uint8, device=words.device)
    if codes.numel():
        grid = (triton.cdiv(words.numel(), PACK["WORDS"]),)
        _unpack[grid](words.contiguous(), codes, columns, words.shape[1], words.numel(), BITS=bits, **PACK)
    return codes


def interleaved(codes: Tensor, unit: int, bits: int) -> Tensor:
    """uint8 codes (rows, columns) below 2**bits to int16 words (rows, blocks, unit), whose codes lie ``unit`` apart.

    The code of column (block * each + s) * unit + j is at bit s * bits of word j, where a word has ``each`` codes. The
    last block is filled up with zeros.
    """
    (rows, columns), each = codes.shape, WORD // bits
    blocks = triton.cdiv(columns, each * unit)
    codes = F.pad(codes, (0, blocks * each * unit - columns)).view(rows, blocks, each, unit).transpose(-1, -2)
    words = pack(codes.reshape(rows * blocks, each * unit), bits).view(torch.int16)
    return words[:, :unit].reshape(rows, blocks, unit)  # of an odd number the last 32 bits are half empty


def words_of(columns: int, bits: int) -> int:
    """Words of 32 bits that a row takes."""
    return -(-columns * bits // 32)


def _check(bits: int, fits: bool, wanted: str) -> None:
    if bits not in (2, 4, 8):
        raise ValueError(f"words hold codes of 2, 4 or 8 bits, found {bits}")
    if not fits:
        raise ValueError(f"expected {wanted}")


@triton.jit
def _codes_of(words: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """(A, B) int32 words to their codes, (A, B * 32 // BITS) int32."""
    EACH: tl.constexpr = 32 // BITS
    shifts = tl.arange(0, EACH) * BITS
    # The mask also cuts off the copies of the sign that >> lets in.
    codes = (words[:, :, None] >> shifts[None, None, :]) & (2**BITS - 1)
    return tl.reshape(codes, (words.shape[0], words.shape[1] * EACH))


@triton.jit
def _pack(
    codes: tl.tensor, words: tl.tensor, columns: int, per_row: int, count: int,
    BITS: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    place, column = _places(columns, per_row, BITS, WORDS)
    w = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = (w < count)[:, None] & (column < columns)
    parts = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
    word = tl.sum(parts << (tl.arange(0, 32 // BITS) * BITS)[None, :], axis=1)  # no two share a bit
    tl.store(words + w, word.to(tl.int32), mask=w < count)


@triton.jit
def _unpack(
    words: tl.tensor, codes: tl.tensor, columns: int, per_row: int, count: int,
    BITS: tl.constexpr, WORDS: tl.constexpr,
) -> None:  # fmt: skip
    place, column = _places(columns, per_row, BITS, WORDS)
    w = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    held = _codes_of(tl.load(words + w, mask=w < count, other=0)[:, None], BITS)
    tl.store(codes + place, held.to(tl.uint8), mask=(w < count)[:, None] & (column < columns))


@triton.jit
def _places(columns: int, per_row: int, BITS: tl.constexpr, WORDS: tl.constexpr) -> tl.tensor:
    """Where the codes of this program's words lie, and in which column, both (WORDS, 32 // BITS)."""
    w = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    column = (w % per_row * (32 // BITS))[:, None] + tl.arange(0, 32 // BITS)[None, :]
    return (w // per_row)[:, None] * columns + column, column
