"""x @ weight.T where the weight is codes in words: they become numbers in registers and are never written out.

A product of few rows takes as long as its weight takes to come from memory, so everything here serves one aim: that
loads are under way at all times. Words, scales and x come by asynchronous copies several steps ahead. A word holds
codes of several units of columns at the same place in each, so its codes are taken out one after another by a shift
and a mask, where they lie: each gives the operand of a tensor core for one unit, and nothing moves between threads.

Outputs give too few programs to fill a large chip, so columns are cut as well (split-K). Whoever finishes last of those
that share outputs adds their sums, in the order of their columns: the same input gives the same bits each time.

Codes become whole numbers, exact in float16 and bfloat16, and the sum over a unit is multiplied by its scale in
float32, so that the weight itself is not rounded. (Table values and zero points that are reals are, to x's dtype.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.gpu.decode import WORD, lift, lifted, looked_up
from labkit.kernels.gpu.packing import interleaved
from labkit.kernels.inputs import per_row, width_of
from labkit.quant import Grid, QuantizedTensor

# ROWS of x at a time. With int4 and nf4 these were the fastest of those tried on an H100 (data/measurements/
# bench_h100.json); codes of 2 and 8 bits take the same, untimed.
ROW = {"OUT": 64, "ROWS": 8, "num_warps": 4, "STAGES": 4}  # up to 8
FEW = {"OUT": 64, "ROWS": 16, "num_warps": 4, "STAGES": 4}  # up to 16
MANY = {"OUT": 64, "ROWS": 64, "num_warps": 4, "STAGES": 3}
MANY_ROOMY = MANY | {"num_warps": 8}  # of a table, and of 8 bits: an A100's four warps run out of registers
# float32 goes without tensor cores. Larger tiles do not fit the registers, and from 64 outputs on Triton 3.7 rounds
# them to TF32 on a B200, whatever input_precision says.
EXACT = {"OUT": 32, "ROWS": 16, "num_warps": 4, "STAGES": 3}
UNIT = 64  # columns that share a scale, where a group has as many
PROGRAMS = 264  # that columns are cut for: two for each of an H100's 132 processors; more cost more than they hide


@dataclass(frozen=True)
class Words:
    """A weight (out, columns) as the kernel reads it. A block is as many units of columns as a word has codes.

    The last block is filled up: with four bits and groups of 64 or more, columns to a multiple of 256, and each ``x``
    with them. Those of large language models are such multiples.

    words   (blocks, out, unit) int16, from ``packing.interleaved``
    scale   (groups, out), float16 or float32
    zero    the same, what is taken off each code: float16 is of whole numbers; or None
    table   (2**bits,) float32: what each code stands for; or None
    values  the same numbers where the format has them, for a kernel with the table in it
    middle  what is taken off each code where there is neither
    width   columns of a group, a multiple of ``unit`` unless there is one group; the last may be shorter
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    table: Tensor | None
    bits: int
    middle: int
    columns: int
    width: int
    values: tuple[float, ...] = ()

    @classmethod
    def of(cls, weight: QuantizedTensor) -> Words:
        """``weight`` (out, columns), which has no act-order left, as ``TritonGpu.why_not`` lets it through."""
        spec, (low, high) = weight.spec, weight.spec.code_range
        columns = weight.shape[1]
        width = width_of(weight) or columns
        bits = next(size for size in (2, 4, 8) if size >= spec.bits)
        table, values = None, ()  # a table that was learned is read: each would make a kernel of its own
        if not spec.is_integer:
            known = None if weight.table is None else weight.table.cpu()
            table = torch.zeros(2**bits)
            table[: high + 1] = Grid(spec, known).dequantize(torch.arange(high + 1), torch.ones(()))
            values = tuple(table.tolist()) if known is None else ()
            table = table.to(weight.codes.device)
        unit = UNIT if width >= columns else min(UNIT, width & -width)
        words = interleaved((weight.codes.int() - low).byte(), unit, bits)  # (out, blocks, unit)
        scale, zero = (None if part is None else per_row(part, weight).T.contiguous() for part in weight.params.dense())
        assert scale is not None
        # float16 where that loses nothing; of 8-bit codes a block has too few columns for it to be copied ahead.
        if bits <= 4 and torch.equal(scale.half().float(), scale):
            scale = scale.half()
        if zero is not None:
            zero = zero.half() if bits <= 4 and spec.zero == "int" else zero.float()
        words = words.transpose(0, 1).contiguous()
        return cls(words, scale, zero, table, bits, -low, columns, min(width, columns), values)

    @property
    def block(self) -> int:
        """Columns of a block."""
        return self.words.shape[2] * (WORD // self.bits)


def product(x: Tensor, weight: Words, bias: Tensor | None = None) -> Tensor:
    """x (rows, columns), float32, float16 or bfloat16, to (rows, out) of the same dtype; ``bias`` (out,)."""
    rows, (blocks, out, unit) = len(x), weight.words.shape
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    config = _config(rows, x.dtype, weight)
    tiles = triton.cdiv(out, config["OUT"]), triton.cdiv(rows, config["ROWS"])
    span, splits = split(tiles[0] * tiles[1], blocks)
    sums = arrived = None
    if splits > 1:
        sums = torch.empty(splits, rows, out, device=x.device)
        arrived = _counters(x.device, tiles[0] * tiles[1])
    if more := blocks * weight.block - weight.columns:  # the last block reaches behind the last column
        x = F.pad(x, (0, more))
    x = x.contiguous()
    _product[(*tiles, splits)](
        x, weight.words, weight.scale, weight.zero, weight.table, bias, y, sums, arrived,
        rows, out, blocks, len(weight.scale), max(weight.width // unit, 1), span,
        BITS=weight.bits, MIDDLE=weight.middle, UNIT=unit, TABLE=_inlaid(weight.values, x.dtype), **config,
    )  # fmt: skip
    return y


def split(tiles: int, steps: int) -> tuple[int, int]:
    """(steps of a split, how many splits), for at most PROGRAMS unless tiles alone are more. Of shapes alone."""
    span = triton.cdiv(steps, max(1, min(steps, PROGRAMS // tiles)))
    return span, triton.cdiv(steps, span)


def _config(rows: int, dtype: torch.dtype, weight: Words) -> dict[str, int]:
    if dtype == torch.float32:
        return EXACT
    many = MANY if weight.bits == 4 and weight.table is None else MANY_ROOMY
    if weight.bits == 2:  # a block has 512 columns: with more rows x does not fit the shared memory
        many = FEW
    return next((config for config in (ROW, FEW) if rows <= config["ROWS"]), many)


@lru_cache(maxsize=256)
def _inlaid(values: tuple[float, ...], dtype: torch.dtype) -> str:
    """A table of up to 16 in the kernel itself: four hexadecimal digits for each number; empty where it is read."""
    if not values or len(values) > 16 or dtype == torch.float32:
        return ""
    bits = torch.tensor(values).to(dtype).view(torch.int16).tolist()
    return "".join(f"{number & 0xFFFF:04x}" for number in bits).ljust(64, "0")


_arrived: dict[tuple[torch.device, int], Tensor] = {}


def _counters(device: torch.device, tiles: int) -> Tensor:
    """Zeros, one for each tile at least. Kernels leave them so, and those of one stream use them one after another.

    The interpreter may be stopped between two programs, and a captured graph may run on any stream: they get new ones.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    if len(_arrived.get(key, ())) < tiles:
        _arrived[key] = torch.zeros(max(tiles, PROGRAMS), dtype=torch.int32, device=device)
    return _arrived[key]


@triton.jit
def _product(
    x: tl.tensor, words: tl.tensor, scale: tl.tensor, zero: tl.tensor, table: tl.tensor, bias: tl.tensor, y: tl.tensor,
    sums: tl.tensor, arrived: tl.tensor,
    rows: int, out: int, blocks: int, groups: int, per_group: int, span: int,
    BITS: tl.constexpr, MIDDLE: tl.constexpr, UNIT: tl.constexpr, TABLE: tl.constexpr,
    OUT: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    # The weight is the left operand: tensor cores take that from registers, where it was decoded, and their right
    # side may be as narrow as few rows are. Who is behind the last output or row reads the last one's again, and does
    # not store what becomes of it.
    EACH: tl.constexpr = 16 // BITS
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    r = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    within, j, s_of = tl.minimum(o, out - 1), tl.arange(0, UNIT), tl.arange(0, EACH)
    numbers_at = x + tl.minimum(r, rows - 1)[None, :] * (blocks * EACH * UNIT) + j[:, None]
    part = tl.program_id(2)
    total = tl.zeros((OUT, ROWS), tl.float32)
    for block in tl.range(part * span, min((part + 1) * span, blocks), num_stages=STAGES):
        held = tl.load(words + (block * out + within[:, None]) * UNIT + j[None, :])  # (OUT, UNIT)
        group = tl.minimum((block * EACH + s_of) // per_group, groups - 1)  # (EACH,)
        at = group[None, :] * out + o[:, None]
        scales = _columns(tl.load(scale + at, mask=(o < out)[:, None], other=0.0))
        zeros = scales if zero is None else _columns(tl.load(zero + at, mask=(o < out)[:, None], other=0.0))
        for s in tl.static_range(EACH):
            numbers = tl.load(numbers_at + (block * EACH + s) * UNIT)  # (UNIT, ROWS)
            steps = _steps(held, s, zeros[s], zero is not None, table, numbers, BITS, MIDDLE, TABLE)
            total += tl.dot(steps, numbers, input_precision="ieee") * scales[s].to(tl.float32)[:, None]
    real = (o < out)[:, None] & (r < rows)[None, :]
    last = True
    if sums is not None:
        tl.store(sums + (part * rows + r)[None, :] * out + o[:, None], total, mask=real)
        tl.debug_barrier()  # all threads have stored before one says so
        tile, splits = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.num_programs(2)
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == splits - 1
        if last:
            tl.store(arrived + tile, 0)
            total = tl.zeros((OUT, ROWS), tl.float32)
            for p in range(splits):
                at = (p * rows + r)[None, :] * out + o[:, None]
                total += tl.load(sums + at, mask=real, other=0.0, cache_modifier=".cg")
    if last:
        if bias is not None:
            total += tl.load(bias + within).to(tl.float32)[:, None]
        tl.store(y + r[None, :] * out + o[:, None], total, mask=real)


@triton.jit
def _steps(
    held: tl.tensor, s: tl.constexpr, zeros: tl.tensor, ZERO: tl.constexpr, table: tl.tensor, like: tl.tensor,
    BITS: tl.constexpr, MIDDLE: tl.constexpr, TABLE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The codes at place ``s`` of words (OUT, UNIT), in units of their scale, of the dtype of ``like``."""
    LIFT: tl.constexpr = lift(BITS, like.dtype)
    if table is None:
        steps = lifted(held, like, s, BITS)
        if not ZERO:
            if LIFT + MIDDLE != 0:
                steps -= tl.full((1, 1), LIFT + MIDDLE, like.dtype)
        elif zeros.dtype == tl.float16:  # whole numbers
            steps -= (zeros.to(tl.float32) + LIFT).to(like.dtype)[:, None]
        else:
            steps = (steps.to(tl.float32) - (zeros + LIFT)[:, None]).to(like.dtype)
    elif TABLE == "":
        steps = tl.load(table + ((held >> (s * BITS)) & (2**BITS - 1))).to(like.dtype)
    else:
        steps = looked_up(held, like, s, BITS, TABLE)
    return steps


@triton.jit
def _columns(x: tl.tensor) -> tuple:
    """(A, 2), (A, 4) or (A, 8) as its columns, each (A,)."""
    A: tl.constexpr = x.shape[0]
    HALF: tl.constexpr = x.shape[1] // 2
    if HALF == 1:
        return tl.split(x)
    else:
        even, odd = tl.split(tl.reshape(x, (A, HALF, 2)))
        if HALF == 2:
            a, c = tl.split(even)
            b, d = tl.split(odd)
            return a, b, c, d
        else:
            a, c, e, g = _columns(even)
            b, d, f, h = _columns(odd)
            return a, b, c, d, e, f, g, h
