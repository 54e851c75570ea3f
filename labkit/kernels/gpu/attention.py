"""Attention of one new token over keys and values that are codes: flash-decoding.

The context is cut into parts, so that one request with a long one keeps the whole chip busy; each part gives a softmax
of its own and the logarithm of its sum, by which a second kernel weighs the parts together. Query heads that share a
key head are the rows of one tile, so a code is read once for all of them. (Dao et al. 2023, Flash-Decoding for
long-context inference; the running softmax is that of FlashAttention, arXiv 2205.14135.)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.gpu.packing import codes_of, pack
from labkit.kernels.gpu.product import split
from labkit.quant import Blocks, QuantizedTensor

ATTEND = {"TOKENS": 32, "num_warps": 4, "num_stages": 2}
COMBINE = {"PARTS": 32, "num_warps": 4}
LEAST = 16  # rows and columns of a tensor core's tile


@dataclass(frozen=True)
class Held:
    """Keys or values (B, kv_heads, S, head_dim) as the kernel reads them.

    words   (B * kv_heads * S, ceil(head_dim * bits / 32)) int32, from ``packing.pack``
    scale   (row blocks, column blocks) float32, of blocks of ``tall`` tokens by ``wide`` numbers
    zero    the same, what is taken off each code; or None
    middle  what is taken off each code where there is no zero point
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    middle: int
    shape: tuple[int, ...]
    tall: int
    wide: int

    @classmethod
    def of(cls, x: QuantizedTensor) -> Held:
        """``x`` (B, kv_heads, S, head_dim) of int4 or int8, symmetric or affine, in any blocks but flat runs.

        "int8 channel" has a scale for each token and head, "int4 g32" one for 32 numbers of a head, "int4 32x1"
        KIVI's (arXiv 2402.02750) for one number of 32 tokens. Raises ValueError for others.
        """
        spec = x.spec
        if len(x.shape) != 4 or spec.format not in ("int4", "int8") or isinstance(spec.block, int):
            raise ValueError(f"expected int4 or int8 (B, kv_heads, S, head_dim) in blocks, found {x!r}")
        scale, zero = x.params.dense()
        low = spec.code_range[0]
        words = pack((x.codes.int() - low).byte().flatten(0, 2), spec.bits)
        blocks = Blocks(tuple(x.shape), spec.block)
        zero = None if zero is None else zero.contiguous()
        return cls(words, scale.contiguous(), zero, spec.bits, -low, tuple(x.shape), *blocks.size)


def attend(
    q: Tensor, keys: Held, values: Held, lengths: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(q @ keys.T * scale) @ values, (B, heads, head_dim) like ``q``, of its dtype.

    q        (B, heads, head_dim); heads i * n to i * n + n - 1 share key head i, n = heads / kv_heads
    keys, values  of (B, kv_heads, S, head_dim), each on its own grid
    lengths  (B,) int32: how many of the S positions each request has; None: all. Where it is 0 the result is 0
    scale    of the scores; None: head_dim ** -0.5

    Raises ValueError where the shapes do not fit.
    """
    (batch, heads, width), (_, kv_heads, context, _) = q.shape, keys.shape
    if keys.shape != values.shape or heads % kv_heads or keys.shape != (batch, kv_heads, context, width):
        raise ValueError(f"q {tuple(q.shape)} does not fit keys {keys.shape} and values {values.shape}")
    group, padded = heads // kv_heads, max(LEAST, triton.next_power_of_2(width))
    span, parts = split(batch * kv_heads, context, ATTEND["TOKENS"])
    sums = torch.empty(batch * heads, parts, width, device=q.device)
    logs = torch.empty(batch * heads, parts, device=q.device)
    _attend[(batch * kv_heads, parts)](
        q.contiguous(), keys.words, keys.scale, keys.zero, values.words, values.scale, values.zero, lengths, sums, logs,
        (width**-0.5 if scale is None else scale) * log2(e), kv_heads, context, width, group, span, parts,
        keys.tall, keys.wide, keys.words.shape[1], keys.scale.shape[1],
        values.tall, values.wide, values.words.shape[1], values.scale.shape[1],
        K_BITS=keys.bits, K_MIDDLE=keys.middle, K_WHOLE=keys.wide == width,
        V_BITS=values.bits, V_MIDDLE=values.middle, V_WHOLE=values.wide == width,
        HEADS=max(LEAST, triton.next_power_of_2(group)), D=padded, **ATTEND,
    )  # fmt: skip
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    _combine[(batch * heads,)](sums, logs, y, width, parts, D=padded, **COMBINE)
    return y


@triton.jit
def _numbers(
    words: tl.tensor, scale: tl.tensor, zero: tl.tensor, row: tl.tensor, seen: tl.tensor, width: int,
    tall: int, wide: int, per_row: int, across: int, BITS: tl.constexpr, MIDDLE: tl.constexpr, WHOLE: tl.constexpr,
    D: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The numbers of ``row`` (TOKENS,), those that are ``seen``: (TOKENS, D) float32."""
    EACH: tl.constexpr = 32 // BITS
    j, d = tl.arange(0, D // EACH), tl.arange(0, D)
    inside = seen[:, None] & (j < per_row)[None, :]
    held = tl.load(words + row[:, None] * per_row + j[None, :], mask=inside, other=0)
    codes = codes_of(held, BITS)  # (TOKENS, D)
    place, fits = (row // tall)[:, None] * across, seen[:, None]  # (TOKENS, 1)
    if not WHOLE:
        place, fits = place + (d // wide)[None, :], fits & (d < width)[None, :]
    if zero is not None:
        steps = codes.to(tl.float32) - tl.load(zero + place, mask=fits, other=0.0)
    else:
        steps = (codes - MIDDLE).to(tl.float32)
    return steps * tl.load(scale + place, mask=fits, other=0.0)


@triton.jit
def _attend(
    q: tl.tensor, keys: tl.tensor, k_scale: tl.tensor, k_zero: tl.tensor, values: tl.tensor, v_scale: tl.tensor,
    v_zero: tl.tensor, lengths: tl.tensor, sums: tl.tensor, logs: tl.tensor,
    factor: float, kv_heads: int, context: int, width: int, group: int, span: int, parts: int,
    k_tall: int, k_wide: int, k_words: int, k_across: int,
    v_tall: int, v_wide: int, v_words: int, v_across: int,
    K_BITS: tl.constexpr, K_MIDDLE: tl.constexpr, K_WHOLE: tl.constexpr,
    V_BITS: tl.constexpr, V_MIDDLE: tl.constexpr, V_WHOLE: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    which, part = tl.program_id(0).to(tl.int64), tl.program_id(1)  # which key head, over all requests
    h, d = tl.arange(0, HEADS), tl.arange(0, D)
    head = which * group + h
    real = (h < group)[:, None] & (d < width)[None, :]
    query = tl.load(q + head[:, None] * width + d[None, :], mask=real, other=0.0)  # (HEADS, D)
    length = context
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + which // kv_heads), context)
    highest = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    result = tl.zeros((HEADS, D), tl.float32)
    for start in range(part * span, min((part + 1) * span, length), TOKENS):
        s = start + tl.arange(0, TOKENS)
        row, seen = which * context + s, s < length
        k = _numbers(keys, k_scale, k_zero, row, seen, width, k_tall, k_wide, k_words, k_across,
                     K_BITS, K_MIDDLE, K_WHOLE, D)  # fmt: skip
        scores = tl.dot(query, tl.trans(k.to(query.dtype)), input_precision="ieee")  # (HEADS, TOKENS)
        scores = tl.where(seen[None, :], scores * factor, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, axis=1))  # finite: a step has one token at least
        weights, kept = tl.exp2(scores - above[:, None]), tl.exp2(highest - above)
        v = _numbers(values, v_scale, v_zero, row, seen, width, v_tall, v_wide, v_words, v_across,
                     V_BITS, V_MIDDLE, V_WHOLE, D)  # fmt: skip
        added = tl.dot(weights.to(query.dtype), v.to(query.dtype), input_precision="ieee")
        result = result * kept[:, None] + added
        total = total * kept + tl.sum(weights, axis=1)
        highest = above
    total = tl.where(total > 0, total, 1.0)  # a part behind the end has a sum of 0, and keeps its -inf
    place = head * parts + part
    tl.store(sums + place[:, None] * width + d[None, :], result / total[:, None], mask=real)
    tl.store(logs + place, highest + tl.log2(total), mask=h < group)


@triton.jit
def _combine(
    sums: tl.tensor, logs: tl.tensor, y: tl.tensor, width: int, parts: int, D: tl.constexpr, PARTS: tl.constexpr
) -> None:  # fmt: skip
    head = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    highest = tl.full((PARTS,), float("-inf"), tl.float32)
    for start in range(0, parts, PARTS):
        p = start + tl.arange(0, PARTS)
        highest = tl.maximum(highest, tl.load(logs + head * parts + p, mask=p < parts, other=float("-inf")))
    above = tl.maximum(tl.max(highest, axis=0), -1e38)  # finite where no part has a token
    total = tl.zeros((PARTS,), tl.float32)
    result = tl.zeros((D,), tl.float32)
    for start in range(0, parts, PARTS):
        p = start + tl.arange(0, PARTS)
        weights = tl.exp2(tl.load(logs + head * parts + p, mask=p < parts, other=float("-inf")) - above)
        real = (p < parts)[:, None] & (d < width)[None, :]
        place = (head * parts + p)[:, None] * width + d[None, :]  # (PARTS, D)
        numbers = tl.load(sums + place, mask=real, other=0.0)
        result += tl.sum(weights[:, None] * numbers, axis=0)
        total += weights
    tl.store(y + head * width + d, result / tl.maximum(tl.sum(total, axis=0), 1e-38), mask=d < width)
