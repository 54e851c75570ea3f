"""Codes of 1 to 8 bits as bytes, and back.

A row is a stream of bits: its code i takes bits i*b to (i+1)*b - 1, and bit k lies in byte k // 8 with
weight 2**(k % 8). So of two 4-bit codes the first is the low half of the byte.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` codes of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """(rows, columns) of uint8 codes below 2**bits to (rows, packed_bytes(columns, bits)) of bytes.

    Bits left over in a row's last byte are zero. Raises ValueError when a code needs more bits.
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"expected uint8 codes (rows, columns), found {codes.dtype} {tuple(codes.shape)}")
    if codes.numel() and int(codes.max()) >= 2**bits:
        raise ValueError(f"a code of {bits} bits must be below {2**bits}, found {int(codes.max())}")
    if bits == 8:
        return codes.clone()
    columns = codes.shape[1]
    # Eight codes fill `bits` bytes exactly: gather them in one 64-bit word, then take the word apart.
    padded = _padded(codes, -(-columns // 8), 8)
    word = torch.zeros(padded.shape[:2], dtype=torch.int64, device=codes.device)
    for i in range(8):
        word |= padded[:, :, i].long() << (i * bits)
    parts = [((word >> (8 * i)) & 0xFF).to(torch.uint8) for i in range(bits)]
    stream = torch.stack(parts, dim=-1).flatten(1)  # (rows, groups * bits)
    return stream[:, : packed_bytes(columns, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, columns: int) -> Tensor:
    """(rows, packed_bytes(columns, bits)) of bytes back to (rows, columns) of uint8 codes."""
    expected = packed_bytes(columns, bits)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != expected:
        raise ValueError(
            f"expected uint8 bytes (rows, {expected}) for {columns} codes of {bits} bits, "
            f"found {packed.dtype} {tuple(packed.shape)}"
        )
    if bits == 8:
        return packed.clone()
    padded = _padded(packed, -(-columns // 8), bits)
    word = torch.zeros(padded.shape[:2], dtype=torch.int64, device=packed.device)
    for i in range(bits):
        word |= padded[:, :, i].long() << (8 * i)
    codes = [((word >> (i * bits)) & (2**bits - 1)).to(torch.uint8) for i in range(8)]
    return torch.stack(codes, dim=-1).flatten(1)[:, :columns].contiguous()


def _padded(x: Tensor, groups: int, size: int) -> Tensor:
    """(rows, n) to (rows, groups, size), zeros at the end."""
    out = x.new_zeros(len(x), groups * size)
    out[:, : x.shape[1]] = x
    return out.unflatten(1, (groups, size))
