"""Attention of one new token over keys and values that are codes: flash-decoding.

The context is cut into parts, so that one request with a long one keeps the whole chip busy; each part gives a softmax
of its own and the logarithm of its sum, by which a second kernel weighs the parts together. Query heads that share a
key head are the rows of one tile, so a code is read once for all of them. (Dao et al. 2023, Flash-Decoding for
long-context inference; the running softmax is that of FlashAttention, arXiv 2205.14135.)

Within a program each warp has tokens and a softmax of its own, the first axis of all tiles, so that warps wait for
each other only at the end. Codes go from memory to the registers of the tensor cores, where they become whole numbers,
exact in float16 and bfloat16; a scale or a zero point of a token multiplies or corrects the scores and the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import e, log2

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from labkit.kernels.gpu.decode import lift, lifted
from labkit.kernels.gpu.packing import interleaved
from labkit.kernels.gpu.product import split
from labkit.quant import Blocks, QuantizedTensor

# Timed on an H100. TOKENS of each warp in a step; as many programs as a product has.
ATTEND = {"TOKENS": 32, "num_warps": 4, "STAGES": 3}
COMBINE = {"PARTS": 32, "num_warps": 4}
LEAST = 16  # rows and columns of a tensor core's tile; heads of a program
LEAST_EXACT = 4  # heads of a program in float32, which goes without tensor cores


@dataclass(frozen=True)
class Held:
    """Keys or values (B, kv_heads, S, head_dim) as the kernel reads them.

    words   (B * kv_heads * S, J) int16, J = ceil(head_dim * bits / 16), from ``packing.interleaved``: the s-th codes of
            a row's words stand for J neighbours
    scale   (row blocks, column blocks) float32, of blocks of ``tall`` tokens by ``wide`` numbers
    zero    the same, what is taken off each code; None: half of 2**bits
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
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
        codes = (x.codes.flatten(0, 2).int() + (2 ** (spec.bits - 1) if zero is None else 0)).byte()  # from 0 up
        with torch.cuda.device_of(codes):  # Triton launches on the current device
            words = interleaved(codes, _words_of(x.shape[3], spec.bits), spec.bits)[:, 0]
        blocks = Blocks(tuple(x.shape), spec.block)
        zero = None if zero is None else zero.contiguous()
        return cls(words, scale.contiguous(), zero, spec.bits, tuple(x.shape), *blocks.size)

    @property
    def whole(self) -> bool:
        """Whether a token has one scale."""
        return self.wide == self.shape[3]

    @property
    def even(self) -> bool:
        """Whether the tokens of a warp's tile have their scales in common."""
        return self.tall % ATTEND["TOKENS"] == 0 and self.shape[2] % ATTEND["TOKENS"] == 0

    @property
    def alike(self) -> bool:
        """Whether the s-th codes of a token's words have a scale in common, for each s."""
        return self.wide % self.words.shape[1] == 0

    @property
    def quick(self) -> bool:
        """Whether a tile has few scales beside its codes. Shared memory would not hold several steps of many."""
        return self.whole or self.even or self.alike


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
    if not q.numel() or not context:
        return torch.zeros_like(q)
    dtype = q.dtype
    if knobs.runtime.interpret:  # which is wrong in bfloat16
        q = q.float()
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    group, cores = heads // kv_heads, q.dtype != torch.float32
    tile = LEAST if cores else LEAST_EXACT  # of heads
    tiles = triton.cdiv(group, tile)
    ahead = keys.quick and values.quick
    roomy = cores and width <= 128 and ahead  # otherwise more tokens than LEAST spill registers
    config = ATTEND if roomy else ATTEND | {"TOKENS": LEAST}
    config = config if ahead else config | {"STAGES": 1}
    step = config["num_warps"] * config["TOKENS"]
    steps, parts = split(batch * kv_heads * tiles, triton.cdiv(context, step))
    sums = torch.empty(batch * heads, parts, width, device=q.device)
    logs = torch.empty(batch * heads, parts, device=q.device)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        _attend[(batch * kv_heads, parts, tiles)](
            q.contiguous(), keys.words, keys.scale, keys.zero, values.words, values.scale, values.zero, lengths,
            sums, logs,
            (width**-0.5 if scale is None else scale) * log2(e), kv_heads, context, group, steps * step, parts,
            keys.tall, keys.wide, keys.scale.shape[1], values.tall, values.wide, values.scale.shape[1],
            K_BITS=keys.bits, K_WHOLE=keys.whole, K_EVEN=keys.even, K_ALIKE=keys.alike,
            V_BITS=values.bits, V_WHOLE=values.whole, V_EVEN=values.even, V_ALIKE=values.alike,
            HEADS=tile, WIDTH=width, WARPS=config["num_warps"], **config,
        )  # fmt: skip
        _combine[(batch * heads,)](sums, logs, y, width, parts, D=triton.next_power_of_2(width), **COMBINE)
    return y.to(dtype)


@triton.constexpr_function
def _words_of(width, bits):  # type: ignore[no-untyped-def]
    """Words of a row."""
    return triton.cdiv(width * bits, 16)


@triton.constexpr_function
def _tile_of(width, bits):  # type: ignore[no-untyped-def]
    """What a tile takes for them, a power of two."""
    return max(LEAST, triton.next_power_of_2(_words_of(width, bits)))


@triton.jit
def _scaled(
    steps: tl.tensor, scale: tl.tensor, zero: tl.tensor, place: tl.tensor, there: tl.tensor, OFF: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """The numbers of ``steps``, with scales at ``place``, where these vary along a token's numbers."""
    scales = tl.load(scale + place, mask=there, other=0.0)
    off = OFF if zero is None else tl.load(zero + place, mask=there, other=0.0) + OFF
    return (steps.to(tl.float32) * scales - off * scales).to(steps.dtype)


@triton.jit(do_not_specialize=["kv_heads", "group", "parts"])
def _attend(
    q: tl.tensor, keys: tl.tensor, k_scale: tl.tensor, k_zero: tl.tensor, values: tl.tensor, v_scale: tl.tensor,
    v_zero: tl.tensor, lengths: tl.tensor, sums: tl.tensor, logs: tl.tensor,
    factor: float, kv_heads: int, context: int, group: int, span: int, parts: int,
    k_tall: int, k_wide: int, k_across: int, v_tall: int, v_wide: int, v_across: int,
    K_BITS: tl.constexpr, K_WHOLE: tl.constexpr, K_EVEN: tl.constexpr, K_ALIKE: tl.constexpr,
    V_BITS: tl.constexpr, V_WHOLE: tl.constexpr, V_EVEN: tl.constexpr, V_ALIKE: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    KJ: tl.constexpr = _words_of(WIDTH, K_BITS)
    VJ: tl.constexpr = _words_of(WIDTH, V_BITS)
    # What is taken off each step beside a zero point, if there is one: a code alone has 0 in its middle.
    K_OFF: tl.constexpr = lift(K_BITS, q.dtype.element_ty) + (2 ** (K_BITS - 1) if k_zero is None else 0)
    V_OFF: tl.constexpr = lift(V_BITS, q.dtype.element_ty) + (2 ** (V_BITS - 1) if v_zero is None else 0)
    # Weights times scales might be too small for float16: the result's unit is the largest scale so far.
    SMALL: tl.constexpr = q.dtype.element_ty == tl.float16
    which, part = tl.program_id(0).to(tl.int64), tl.program_id(1)  # which key head, over all requests
    h = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    head, real = which * group + h, h < group
    kj, vj = tl.arange(0, _tile_of(WIDTH, K_BITS)), tl.arange(0, _tile_of(WIDTH, V_BITS))
    length = context
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + which // kv_heads), context)

    query: tl.tuple = ()  # for each code of a word (WARPS, HEADS, KJ)
    result: tl.tuple = ()  # (WARPS, HEADS, VJ)
    query_sum = tl.zeros((HEADS,), tl.float32)
    for s in tl.static_range(16 // K_BITS):
        d = s * KJ + kj
        there = real[:, None] & ((kj < KJ) & (d < WIDTH))[None, :]
        numbers = tl.load(q + head[:, None] * WIDTH + d[None, :], mask=there, other=0.0)  # (HEADS, KJ)
        query_sum += tl.sum(numbers.to(tl.float32), axis=1)
        query += (tl.broadcast_to(numbers[None, :, :], (WARPS, HEADS, numbers.shape[1])),)
    for _ in tl.static_range(16 // V_BITS):
        result += (tl.zeros((WARPS, HEADS, vj.shape[0]), tl.float32),)
    highest = tl.full((WARPS, HEADS), -1e38, tl.float32)  # finite: a warp may have no token
    total = tl.zeros((WARPS, HEADS), tl.float32)
    taken = tl.zeros((WARPS, HEADS), tl.float32)  # off all numbers of the result
    unit = tl.zeros((WARPS,), tl.float32)
    keys += which * context * KJ
    values += which * context * VJ
    warp, token = tl.arange(0, WARPS)[:, None] * TOKENS, tl.arange(0, TOKENS)[None, :]
    for start in tl.range(part * span, min((part + 1) * span, length), WARPS * TOKENS, num_stages=STAGES):
        first = start + warp  # (WARPS, 1)
        t = first + token  # (WARPS, TOKENS)
        seen, row = t < length, which * context + t
        inside = seen[:, None, :] & (kj < KJ)[None, :, None]
        at = t[:, None, :] * KJ + kj[None, :, None]  # (WARPS, KJ, TOKENS)
        words = tl.load(keys + at, mask=inside, other=0)
        scores = tl.zeros((WARPS, HEADS, TOKENS), tl.float32)
        for s in tl.static_range(16 // K_BITS):
            k = lifted(words, query[s], s, K_BITS)
            if not K_WHOLE:
                j = tl.arange(0, 1) if K_ALIKE else kj
                i = s * KJ + j  # (1,) or (KJ,)
                when = first if K_EVEN else t  # (WARPS, 1) or (WARPS, TOKENS)
                down, along = (which * context + when) // k_tall * k_across, i // k_wide
                place = down[:, None, :] + along[None, :, None]
                fits = (when < length)[:, None, :] & ((j < KJ) & (i < WIDTH))[None, :, None]
                k = _scaled(k, k_scale, k_zero, place, fits, K_OFF)
            scores = tl.dot(query[s], k, scores, input_precision="ieee")
        if K_WHOLE:
            place = row // k_tall * k_across
            if k_zero is not None:
                zeros = tl.load(k_zero + place, mask=seen, other=0.0) + K_OFF
                scores -= query_sum[None, :, None] * zeros[:, None, :]
            elif K_OFF != 0:
                scores -= query_sum[None, :, None] * K_OFF
            scores *= (tl.load(k_scale + place, mask=seen, other=0.0) * factor)[:, None, :]
        else:
            scores *= factor
        scores = tl.where(seen[:, None, :], scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, axis=2))
        weights, kept = tl.exp2(scores - above[:, :, None]), tl.exp2(highest - above)
        highest = above
        total = total * kept + tl.sum(weights, axis=2)
        if V_WHOLE:
            place = row // v_tall * v_across
            scales = tl.load(v_scale + place, mask=seen, other=0.0)  # (WARPS, TOKENS)
            if SMALL:
                larger = tl.maximum(unit, tl.max(tl.abs(scales), axis=1))
                share = 1.0 / tl.where(larger > 0, larger, 1.0)
                kept *= (unit * share)[:, None]
                scales *= share[:, None]
                unit = larger
            weights = (weights * scales[:, None, :]).to(q.dtype.element_ty)
            taken *= kept
            if v_zero is not None:
                zeros = tl.load(v_zero + place, mask=seen, other=0.0) + V_OFF
                taken += tl.sum(weights.to(tl.float32) * zeros[:, None, :], axis=2)
            elif V_OFF != 0:
                taken += tl.sum(weights.to(tl.float32), axis=2) * V_OFF
        inside = seen[:, :, None] & (vj < VJ)[None, None, :]
        at = t[:, :, None] * VJ + vj[None, None, :]  # (WARPS, TOKENS, VJ)
        words = tl.load(values + at, mask=inside, other=0)
        new: tl.tuple = ()
        for s in tl.static_range(16 // V_BITS):
            v = lifted(words, query[0], s, V_BITS)
            if not V_WHOLE:
                j = tl.arange(0, 1) if V_ALIKE else vj
                i = s * VJ + j  # (1,) or (VJ,)
                when = first if V_EVEN else t
                down, along = (which * context + when) // v_tall * v_across, i // v_wide
                place = down[:, :, None] + along[None, None, :]
                fits = (when < length)[:, :, None] & ((j < VJ) & (i < WIDTH))[None, None, :]
                v = _scaled(v, v_scale, v_zero, place, fits, V_OFF)
            before = result[s] * kept[:, :, None]
            new += (tl.dot(weights.to(v.dtype), v, before, input_precision="ieee"),)
        result = new

    above = tl.max(highest, axis=0)  # (HEADS,)
    share = tl.exp2(highest - above[None, :])  # (WARPS, HEADS)
    whole = tl.sum(total * share, axis=0)
    whole = tl.where(whole > 0, whole, 1.0)  # a part behind the end has a sum of 0, and keeps its -1e38
    place = head * parts + part
    tl.store(logs + place, above + tl.log2(whole), mask=real)
    share /= whole[None, :]
    if SMALL and V_WHOLE:
        share *= unit[:, None]
    for s in tl.static_range(16 // V_BITS):
        d = s * VJ + vj
        there = real[:, None] & ((vj < VJ) & (d < WIDTH))[None, :]
        numbers = tl.sum((result[s] - taken[:, :, None]) * share[:, :, None], axis=0)  # (HEADS, VJ)
        tl.store(sums + place[:, None] * WIDTH + d[None, :], numbers, mask=there)


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
