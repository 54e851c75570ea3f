"""x @ weight.T where the weight is codes in words: they become numbers in registers and are never written out.

One row reads the weight once and does little with it, so it is cut along its columns too (split-K) to have enough
programs; several rows go through the tensor cores in tiles. Partial sums lie in a buffer and are added in the order of
their columns, not by atomics: the same input gives the same bits each time.

Codes become whole numbers, exact in float16 and bfloat16, and the sum over a group is multiplied by the group's scale
in float32, so that the weight itself is not rounded. (Table values and zero points that are reals are, to x's dtype.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.gpu.packing import codes_of, pack
from labkit.kernels.inputs import per_row, width_of
from labkit.quant import Grid, QuantizedTensor

ROW = {"OUT": 32, "num_warps": 4, "num_stages": 3}  # one row
FEW = {"OUT": 64, "ROWS": 16, "num_warps": 4, "num_stages": 4}  # up to 16
MANY = {"OUT": 128, "ROWS": 64, "num_warps": 8, "num_stages": 3}
ADD = {"BLOCK": 1024, "num_warps": 4}
COLUMNS = 64  # of a step, where a group has as many
PROGRAMS = 256  # that one product should have at least: about two for each processor of the largest chips


@dataclass(frozen=True)
class Words:
    """A weight (out, columns) as the kernels read it.

    words   (out, ceil(columns * bits / 32)) int32, from ``packing.pack``
    scale   (groups, out), float16 or float32
    zero    (groups, out), uint8 or float32: what is taken off each code; or None
    table   (2**bits,) float32: what each code stands for; or None
    middle  what is taken off each code where there is neither
    width   columns of a group, a multiple of 16 unless there is one group; the last may be shorter
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    table: Tensor | None
    bits: int
    middle: int
    columns: int
    width: int

    @classmethod
    def of(cls, weight: QuantizedTensor) -> Words:
        """``weight`` (out, columns), which has no act-order left, as ``TritonGpu.why_not`` lets it through."""
        spec, (low, high) = weight.spec, weight.spec.code_range
        bits = next(size for size in (2, 4, 8) if size >= spec.bits)
        table = None
        if not spec.is_integer:
            known = None if weight.table is None else weight.table.cpu()
            table = torch.zeros(2**bits)
            table[: high + 1] = Grid(spec, known).dequantize(torch.arange(high + 1), torch.ones(()))
            table = table.to(weight.codes.device)
        scale, zero = weight.params.dense()
        scale = per_row(scale, weight).T.contiguous()
        if zero is not None:
            zero = per_row(zero, weight).T.contiguous()
            zero = zero.byte() if spec.zero == "int" else zero
        half, columns = scale.half(), weight.shape[1]
        return cls(
            pack((weight.codes.int() - low).byte(), bits), half if torch.equal(half.float(), scale) else scale,
            zero, table, bits, -low, columns, min(width_of(weight) or columns, columns),
        )  # fmt: skip

    @property
    def step(self) -> int:
        """Columns that the kernels take at once: a power of two that divides a group, 16 to COLUMNS."""
        return COLUMNS if self.width >= self.columns else min(COLUMNS, self.width & -self.width)


def product(x: Tensor, weight: Words, bias: Tensor | None = None) -> Tensor:
    """x (rows, columns), float32, float16 or bfloat16, to (rows, out) of the same dtype; ``bias`` (out,)."""
    rows, out = len(x), len(weight.words)
    if rows == 0:
        return x.new_empty(0, out)
    config = ROW if rows == 1 else FEW if rows <= FEW["ROWS"] else MANY
    tiles = (triton.cdiv(out, config["OUT"]), triton.cdiv(rows, config.get("ROWS", 1)))
    span, splits = split(tiles[0] * tiles[1], weight.columns, weight.step)
    x = x.contiguous()
    whole = splits == 1
    sums = torch.empty(splits, rows, out, dtype=x.dtype if whole else torch.float32, device=x.device)
    kernel = _row if rows == 1 else _tiles
    kernel[(*tiles, splits)](
        x, weight.words, weight.scale, weight.zero, weight.table, bias if whole else None, sums,
        rows, out, weight.columns, weight.words.shape[1], weight.width, span,
        BITS=weight.bits, MIDDLE=weight.middle, K=weight.step, **config,
    )  # fmt: skip
    return sums[0] if whole else _added(sums, bias, x.dtype)


def split(tiles: int, columns: int, step: int) -> tuple[int, int]:
    """(columns of a split, how many splits): enough for PROGRAMS, each of whole steps. Of shapes alone."""
    steps = triton.cdiv(columns, step)
    span = triton.cdiv(steps, min(steps, triton.cdiv(PROGRAMS, tiles))) * step
    return span, triton.cdiv(columns, span)


def _added(sums: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    splits, rows, out = sums.shape
    y = torch.empty(rows, out, dtype=dtype, device=sums.device)
    _add[(triton.cdiv(rows * out, ADD["BLOCK"]),)](sums, bias, y, splits, rows * out, out, **ADD)
    return y


@triton.jit
def _steps(
    words: tl.tensor, zero: tl.tensor, table: tl.tensor, o: tl.tensor, start: int, group: int, out: int, per_row: int,
    BITS: tl.constexpr, MIDDLE: tl.constexpr, K: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The weight of outputs ``o`` (OUT,) and K columns from ``start``, in units of its scale: (OUT, K) float32."""
    EACH: tl.constexpr = 32 // BITS
    j = start // EACH + tl.arange(0, K // EACH)
    inside = (o < out)[:, None] & (j < per_row)[None, :]
    codes = codes_of(tl.load(words + o[:, None] * per_row + j[None, :], mask=inside, other=0), BITS)
    if table is not None:
        steps = tl.load(table + codes)
    elif zero is not None:
        taken = tl.load(zero + group * out + o, mask=o < out, other=0).to(tl.float32)  # (OUT,)
        steps = codes.to(tl.float32) - taken[:, None]
    else:
        steps = (codes - MIDDLE).to(tl.float32)
    return steps


@triton.jit
def _row(
    x: tl.tensor, words: tl.tensor, scale: tl.tensor, zero: tl.tensor, table: tl.tensor, bias: tl.tensor, y: tl.tensor,
    rows: int, out: int, columns: int, per_row: int, width: int, span: int,
    BITS: tl.constexpr, MIDDLE: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr,
) -> None:  # fmt: skip
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    part = tl.program_id(2)
    sums = tl.zeros((OUT, K), tl.float32)  # added across columns once, at the end
    for start in range(part * span, min((part + 1) * span, columns), K):
        k, group = start + tl.arange(0, K), start // width
        steps = _steps(words, zero, table, o, start, group, out, per_row, BITS, MIDDLE, K)  # (OUT, K)
        numbers = tl.load(x + k, mask=k < columns, other=0.0).to(tl.float32)  # (K,)
        scales = tl.load(scale + group * out + o, mask=o < out, other=0.0).to(tl.float32)  # (OUT,)
        sums += steps * numbers[None, :] * scales[:, None]
    total = tl.sum(sums, axis=1)
    if bias is not None:
        total += tl.load(bias + o, mask=o < out, other=0.0).to(tl.float32)
    tl.store(y + part * out + o, total, mask=o < out)


@triton.jit
def _tiles(
    x: tl.tensor, words: tl.tensor, scale: tl.tensor, zero: tl.tensor, table: tl.tensor, bias: tl.tensor, y: tl.tensor,
    rows: int, out: int, columns: int, per_row: int, width: int, span: int,
    BITS: tl.constexpr, MIDDLE: tl.constexpr, K: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    # The weight is the left operand: tensor cores take that from registers, where it was decoded, and their right
    # side may be as narrow as few rows are.
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    r = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    part = tl.program_id(2)
    sums = tl.zeros((OUT, ROWS), tl.float32)
    for start in range(part * span, min((part + 1) * span, columns), K):
        k, group = start + tl.arange(0, K), start // width
        inside = (r < rows)[None, :] & (k < columns)[:, None]
        numbers = tl.load(x + r[None, :] * columns + k[:, None], mask=inside, other=0.0)  # (K, ROWS)
        steps = _steps(words, zero, table, o, start, group, out, per_row, BITS, MIDDLE, K)  # (OUT, K)
        scales = tl.load(scale + group * out + o, mask=o < out, other=0.0).to(tl.float32)  # (OUT,)
        sums += tl.dot(steps.to(numbers.dtype), numbers, input_precision="ieee") * scales[:, None]
    if bias is not None:
        sums += tl.load(bias + o, mask=o < out, other=0.0).to(tl.float32)[:, None]
    place = (part * rows + r[None, :]) * out + o[:, None]
    tl.store(y + place, sums, mask=(o < out)[:, None] & (r < rows)[None, :])


@triton.jit
def _add(
    sums: tl.tensor, bias: tl.tensor, y: tl.tensor, splits: int, count: int, out: int, BLOCK: tl.constexpr
) -> None:
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        total += tl.load(sums + i, mask=i < count, other=0.0)
        sums += count
    if bias is not None:
        total += tl.load(bias + i % out, mask=i < count, other=0.0).to(tl.float32)
    tl.store(y + i, total, mask=i < count)
