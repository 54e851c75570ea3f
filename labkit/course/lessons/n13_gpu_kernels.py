# mypy: allow-untyped-defs, allow-incomplete-defs
"""Notebook 13: GPU kernels. What it asks, checks and draws.

The kernels are written to be read by someone who has just tried. Those of ``labkit.kernels.gpu`` rest on the same
ideas.
Importing this chooses Triton's interpreter, before Triton is imported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from labkit.course import Exercise, Question, plot
from labkit.course.check import Wrong, close, equal, require
from labkit.course.interpreted import launch, tl, triton, written


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _codes(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Random codes 0 to 15, (rows, columns) int32, each row with all the extremes."""
    return torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed)).int()


def pack_words(codes: Tensor) -> Tensor:
    """Codes 0 to 15 (rows, columns) as int32 words (rows, columns / 8), the first code in the lowest four bits."""
    parts = codes.reshape(len(codes), -1, 8).long() << torch.arange(0, 32, 4)
    return parts.sum(dim=-1).to(torch.int32)


def _spread(scale: Tensor, columns: int, group: int) -> Tensor:
    """scale (rows, groups) as (rows, columns)."""
    return scale.repeat_interleave(group, dim=1)[:, :columns]


def _compare(
    found: Tensor,
    expected: Tensor,
    name: str,
    mistakes: Mapping[str, Any],
    *,
    exact: bool = False,
    rtol: float = 1e-4,
    atol: float = 1e-4,
) -> None:
    """Refuse ``found`` where it differs, and draw where."""
    written(found, name)
    try:
        if exact:
            equal(found, expected, f"your {name}", mistakes=mistakes)
        else:
            close(found, expected, f"your {name}", rtol=rtol, atol=atol, mistakes=mistakes)
    except Wrong as wrong:
        wrong.figure = difference(found, expected, name)
        raise


# --- 1: add


def launch_add(kernel: Any, x: Tensor, y: Tensor, BLOCK: int = 32) -> Tensor:
    """z = x + y, all (n,), by ceil(n / BLOCK) programs."""
    z = torch.zeros_like(x)
    launch(kernel, (_cdiv(len(x), BLOCK),), ("z",), x, y, z, len(x), BLOCK=BLOCK)
    return z


@triton.jit
def add(x, y, z, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    total = tl.load(x + i, mask=inside) + tl.load(y + i, mask=inside)
    tl.store(z + i, total, mask=inside)


def _check_add(fn: Callable[..., Any]) -> None:
    for n in (64, 75, 5):
        x, y = torch.arange(float(n)) + 1, 100.0 * (torch.arange(float(n)) + 1)
        _compare(
            fn(x, y),
            x + y,
            "z",
            {
                "you wrote x alone; add y": x,
                "you multiply; the exercise adds": x * y,
                "you add x to itself; load y from its own pointer": x + x,
                "each program adds the first block: i lacks program_id(0) * BLOCK": (x + y)[
                    torch.arange(n) % 32
                ],
            },
        )


# --- 2: words to numbers


def launch_dequantize(
    kernel: Any, words: Tensor, scale: Tensor, columns: int, GROUP: int = 16, WORDS: int = 4
) -> Tensor:
    """w (rows, columns) of words (rows, columns / 8) int32 and scale (rows, groups)."""
    w = torch.zeros(len(words), columns)
    grid = (len(words), _cdiv(columns // 8, WORDS))
    launch(kernel, grid, ("w",), words, scale, w, columns, scale.shape[1], GROUP=GROUP, WORDS=WORDS)
    return w


@triton.jit
def dequantize(words, scale, w, columns, groups, GROUP: tl.constexpr, WORDS: tl.constexpr):
    row = tl.program_id(0)
    j = tl.program_id(1) * WORDS + tl.arange(0, WORDS)  # which words of the row
    e = tl.arange(0, 8)  # which code of a word
    word = tl.load(words + row * (columns // 8) + j, mask=j < columns // 8, other=0)
    code = (word[:, None] >> (4 * e)[None, :]) & 15  # (WORDS, 8)
    k = (8 * j)[:, None] + e[None, :]  # which column each code belongs to
    inside = k < columns
    s = tl.load(scale + row * groups + k // GROUP, mask=inside, other=0.0)
    tl.store(w + row * columns + k, (code - 8) * s, mask=inside)


def _check_dequantize(fn: Callable[..., Any]) -> None:
    for rows, columns in ((2, 160), (3, 40), (2, 72)):
        codes = _codes(rows, columns, columns)
        scale = _random(rows, _cdiv(columns, 16)).abs() + 0.5
        words, wide = pack_words(codes), _spread(scale, columns, 16)
        e, first = 4 * torch.arange(8), torch.arange(columns) // 8
        held = words[:, first]  # each code's word
        other_way = (held >> (28 - e.repeat(columns // 8))) & 15
        bits = (held >> torch.arange(8).repeat(columns // 8)) & 15
        unmasked = (held >> e.repeat(columns // 8)) - 8
        by_word = scale[:, (torch.arange(columns) // 8) // 16]
        _compare(
            fn(words, scale, columns),
            (codes - 8) * wide,
            "w",
            {
                "your codes come in the wrong order: code e of a word lies e * 4 bits from the lowest, "
                "so shift by 4 * e": (other_way - 8) * wide,
                "you shift by e bits; a code has four, so shift by 4 * e": (bits - 8) * wide,
                "after the shift the codes above are still there: keep the lowest four bits, & 15": unmasked
                * wide,
                "you use the code itself; 0 to 15 stand for -8 to 7: subtract 8": codes * wide,
                "each code gets the scale of the wrong group: you divide the number of the word by GROUP; divide "
                "the column k": (codes - 8) * by_word,
                "every row gets the scales of row 0: add row * groups": (codes - 8) * wide[:1],
                "you multiply by the first scale of the row; group k // GROUP has its own": (codes - 8)
                * scale[:, :1],
                "the scale is missing": codes - 8.0,
            },
        )


# --- 3: a tile of a product


def launch_matmul(kernel: Any, a: Tensor, b: Tensor, TILE: int = 16) -> Tensor:
    """c = a @ b, (M, K) and (K, N), one program for each tile of TILE by TILE."""
    (M, K), N = a.shape, b.shape[1]
    c = torch.zeros(M, N)
    launch(kernel, (_cdiv(M, TILE), _cdiv(N, TILE)), ("c",), a, b, c, M, N, K, TILE=TILE)
    return c


@triton.jit
def matmul(a, b, c, M, N, K, TILE: tl.constexpr):
    m = tl.program_id(0) * TILE + tl.arange(0, TILE)
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    sums = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, K, TILE):
        k = start + tl.arange(0, TILE)
        left = tl.load(a + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        right = tl.load(
            b + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0
        )
        sums += tl.dot(left, right, input_precision="ieee")
    tl.store(c + m[:, None] * N + n[None, :], sums, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def keeps_the_last_step(a, b, c, M, N, K, TILE: tl.constexpr):
    """A wrong one, to be looked at: it forgets the sums of the steps before the last."""
    m = tl.program_id(0) * TILE + tl.arange(0, TILE)
    n = tl.program_id(1) * TILE + tl.arange(0, TILE)
    sums = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, K, TILE):
        k = start + tl.arange(0, TILE)
        left = tl.load(a + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        right = tl.load(
            b + k[:, None] * N + n[None, :], mask=(k < K)[:, None] & (n < N)[None, :], other=0.0
        )
        sums = tl.dot(left, right, input_precision="ieee")
    tl.store(c + m[:, None] * N + n[None, :], sums, mask=(m < M)[:, None] & (n < N)[None, :])


def _check_matmul(fn: Callable[..., Any]) -> None:
    for M, K, N in ((32, 32, 32), (19, 37, 21), (5, 16, 40)):
        a, b = _random(M, K), _random(K, N, seed=1)
        last = (K - 1) // 16 * 16
        again = a[:, torch.arange(K) % 16]
        mistakes: dict[str, Any] = {
            "your tile has the first step alone: go on along K, TILE at a time, and add": a[:, :16]
            @ b[:16],
            "your tile has the last step alone: sums += ..., not sums = ...": a[:, last:] @ b[last:],
            "a does not move on: its columns must come from start too": again @ b,
        }
        if M == N:
            mistakes["c is transposed: m counts rows, and a row has N elements"] = (a @ b).T
        _compare(fn(a, b), a @ b, "c", mistakes)


# --- 4: one row times words


def launch_row(
    kernel: Any, x: Tensor, words: Tensor, scale: Tensor, GROUP: int = 32, OUT: int = 16, K: int = 16
) -> Tensor:
    """y (out,) = weight @ x for x (columns,), where the weight is words (out, columns / 8) and scale (out, groups)."""
    y = torch.zeros(len(words))
    grid, constants = (_cdiv(len(words), OUT),), {"GROUP": GROUP, "OUT": OUT, "K": K}
    launch(kernel, grid, ("y",), x, words, scale, y, len(words), len(x), scale.shape[1], **constants)
    return y


@triton.jit
def row(x, words, scale, y, out, columns, groups, GROUP: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr):
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    sums = tl.zeros((OUT,), tl.float32)
    for start in range(0, columns, K):
        k = start + tl.arange(0, K)
        inside = (o < out)[:, None] & (k < columns)[None, :]
        word = tl.load(words + o[:, None] * (columns // 8) + (k // 8)[None, :], mask=inside, other=0)
        code = (word >> (4 * (k % 8))[None, :]) & 15  # (OUT, K)
        numbers = tl.load(x + k, mask=k < columns, other=0.0)
        s = tl.load(scale + o * groups + start // GROUP, mask=o < out, other=0.0)  # (OUT,)
        sums += s * tl.sum((code - 8) * numbers[None, :], axis=1)
    tl.store(y + o, sums, mask=o < out)


def _check_row(fn: Callable[..., Any]) -> None:
    for out, columns in ((16, 64), (21, 72), (5, 40)):
        codes, groups = _codes(out, columns, out), _cdiv(columns, 32)
        scale, x = _random(out, groups).abs() + 0.5, _random(columns, seed=1)
        weight = (codes - 8) * _spread(scale, columns, 32)
        last, places = (columns - 1) // 16 * 16, torch.arange(columns)
        flipped = codes.reshape(out, -1, 8).flip(-1).reshape(out, columns)
        far = (places // 16).clamp(max=groups - 1)
        _compare(
            fn(x, pack_words(codes), scale),
            weight @ x,
            "y",
            {
                "you use the code itself; 0 to 15 stand for -8 to 7: subtract 8": (
                    codes * _spread(scale, columns, 32)
                )
                @ x,
                "every step takes the scale of the first group; step start has that of start // GROUP": (
                    (codes - 8).float() @ x
                )
                * scale[:, 0],
                "the scale of the last group multiplies the whole sum; each step has its own": (
                    (codes - 8).float() @ x
                )
                * scale[:, -1],
                "your scale moves with the steps of K; a group has GROUP columns: start // GROUP": (
                    (codes - 8) * scale[:, far]
                )
                @ x,
                "x does not move on: load it at k, which begins at start": weight @ x[places % 16],
                "your y has the last step alone: sums += ..., not sums = ...": weight[:, last:] @ x[last:],
                "your codes come in the wrong order: column k lies 4 * (k % 8) bits from the lowest": (
                    (flipped - 8) * _spread(scale, columns, 32)
                )
                @ x,
                "the scale is missing": (codes - 8).float() @ x,
            },
        )


# --- 5: split-K


def launch_parts(kernel: Any, x: Tensor, weight: Tensor, span: int, OUT: int = 16, K: int = 16) -> Tensor:
    """sums (parts, out) of x (columns,) and weight (out, columns); part p has columns p * span to p * span + span -
    1."""
    (out, columns), parts = weight.shape, _cdiv(len(x), span)
    sums = torch.zeros(parts, out)
    launch(kernel, (_cdiv(out, OUT), parts), ("sums",), x, weight, sums, out, columns, span, OUT=OUT, K=K)
    return sums


@triton.jit
def parts(x, weight, sums, out, columns, span, OUT: tl.constexpr, K: tl.constexpr):
    o = tl.program_id(0) * OUT + tl.arange(0, OUT)
    part = tl.program_id(1)
    end = tl.minimum((part + 1) * span, columns)
    total = tl.zeros((OUT,), tl.float32)
    for start in range(0, span, K):
        k = part * span + start + tl.arange(0, K)
        numbers = tl.load(x + k, mask=k < end, other=0.0)
        inside = (o < out)[:, None] & (k < end)[None, :]
        total += tl.sum(
            tl.load(weight + o[:, None] * columns + k[None, :], mask=inside, other=0.0) * numbers[None, :],
            axis=1,
        )
    tl.store(sums + part * out + o, total, mask=o < out)


def _check_parts(fn: Callable[..., Any]) -> None:
    for out, columns, span in ((16, 96, 48), (21, 100, 40), (5, 33, 24)):
        weight, x = _random(out, columns), _random(columns, seed=1)
        each = weight * x  # (out, columns)
        ends = [(p * span, min((p + 1) * span, columns)) for p in range(_cdiv(columns, span))]

        def sums(ranges: Sequence[tuple[int, int]], each: Tensor = each) -> Tensor:
            return torch.stack([each[:, a:b].sum(1) for a, b in ranges])

        over = [(a, min(a + _cdiv(span, 16) * 16, columns)) for a, _ in ends]
        last = [(a + (span - 1) // 16 * 16, b) for a, b in ends]
        _compare(
            fn(x, weight, span),
            sums(ends),
            "sums",
            {
                "every part adds the first span: part p begins at p * span": sums(
                    [(0, min(span, columns))] * len(ends)
                ),
                "every part adds all columns; part p ends before (p + 1) * span": sums(
                    [(0, columns)] * len(ends)
                ),
                "every part runs on to the last column; part p ends before (p + 1) * span": sums(
                    [(a, columns) for a, _ in ends]
                ),
                "a part reads beyond its span, into columns that the next one adds too: the mask is k < end, with "
                "end = min((part + 1) * span, columns)": sums(over),
                "each part has its last step alone: total += ..., not total = ...": sums(last),
            },
        )


# --- 6: rows to int8


def launch_quantize(kernel: Any, x: Tensor, BLOCK: int = 64) -> tuple[Tensor, Tensor]:
    """codes (rows, columns) int8 and scale (rows,) of x (rows, columns), columns <= BLOCK; a program for each row."""
    codes, scale = torch.zeros(x.shape, dtype=torch.int8), torch.zeros(len(x))
    launch(kernel, (len(x),), ("codes", "scale"), x, codes, scale, x.shape[1], BLOCK=BLOCK)
    return codes, scale


@triton.jit
def quantize(x, codes, scale, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    numbers = tl.load(x + row * columns + k, mask=k < columns, other=0.0)
    step = tl.max(tl.abs(numbers), axis=0) / 127
    divisor = tl.where(step > 0, step, 1.0)  # a row of zeros
    tl.store(scale + row, step)
    tl.store(codes + row * columns + k, tl.floor(numbers / divisor + 0.5).to(tl.int8), mask=k < columns)


def _check_quantize(fn: Callable[..., Any]) -> None:
    for rows, columns in ((3, 64), (5, 37), (2, 3)):
        generator = torch.Generator().manual_seed(columns)
        codes = torch.randint(-126, 127, (rows, columns), generator=generator)
        codes[:, 0], codes[:, 1] = -127, 90  # the largest is a negative one
        fraction = (torch.rand(rows, columns, generator=generator) - 0.5) * 0.6
        fraction[:, 0] = 0
        scale = (
            torch.tensor([0.5, 0.02, 3.0, 0.25, 0.0])[-rows:]
            if rows > 3
            else torch.tensor([0.5, 2.0, 3.0])[:rows]
        )
        x = (codes + fraction) * scale[:, None]
        codes = codes * (scale > 0)[:, None]
        found = fn(x)
        require(isinstance(found, tuple), "the launch returned no codes and scale")
        lines = x.double()

        def wrong(largest: Tensor, steps: float = 127, lines: Tensor = lines) -> Tensor:
            return (largest / steps).float()

        top, tall = lines.abs().amax(1), lines.amax(1)
        _compare(
            found[1],
            scale,
            "scale",
            {
                "your scale comes from the largest number; here the largest absolute value is a negative one: "
                "tl.abs": wrong(tall),
                "you divide by 128: then the largest number would get the code 128, which int8 does not have": wrong(
                    top, 128
                ),
                "you divide by 255; codes go from -127 to 127, so by 127": wrong(top, 255),
                "your scale is the inverse: codes are x / scale": torch.where(
                    scale > 0, 127 / top, 0.0
                ).float(),
                "your scale is the largest absolute value; divide it by 127": wrong(top, 1),
            },
            rtol=1e-5,
            atol=1e-9,
        )
        divisor = torch.where(scale > 0, scale, 1.0)[:, None]
        exact = (x / divisor).double()
        _compare(
            found[0],
            codes,
            "codes",
            {
                "you cut the fraction off; expected the nearest whole number: tl.floor(... + 0.5)": exact.trunc(),
                "you round down; expected the nearest whole number: tl.floor(... + 0.5)": exact.floor(),
                "your codes are shifted to 0 to 254; expected -127 to 127": codes + 127,
                "you multiply by the scale; divide by it": (x * scale[:, None]).round(),
            },
            exact=True,
        )


# --- 7: softmax


def launch_softmax(kernel: Any, x: Tensor, BLOCK: int = 64) -> Tensor:
    """y (rows, columns), the softmax of each row of x, columns <= BLOCK; a program for each row."""
    y = torch.zeros_like(x)
    launch(kernel, (len(x),), ("y",), x, y, x.shape[1], BLOCK=BLOCK)
    return y


@triton.jit
def softmax(x, y, columns, BLOCK: tl.constexpr):
    place = tl.program_id(0) * columns + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < columns
    numbers = tl.load(x + place, mask=inside, other=float("-inf"))
    weights = tl.exp(numbers - tl.max(numbers, axis=0))
    tl.store(y + place, weights / tl.sum(weights, axis=0), mask=inside)


def _check_softmax(fn: Callable[..., Any]) -> None:
    for rows, columns, size in ((2, 64, 1.0), (3, 37, 1.0), (2, 5, 300.0)):
        x = _random(rows, columns, seed=columns) * size
        x[:, 0] = size
        found = fn(x)
        require(
            not (size > 100 and bool(torch.isnan(found).any())),
            "numbers of several hundred give infinities and NaN: exp overflows. Subtract the row's max first",
        )
        shifted = x - x.amax(1, keepdim=True)
        weights, padding = shifted.exp(), 64 - columns
        mistakes = {
            "you do not divide by the sum of the row": weights,
            "you do not divide by the sum, nor subtract the max": x.exp(),
            "you divide by the sum of x; expected the sum of exp(x - max)": weights
            / x.sum(1, keepdim=True),
        }
        if padding:
            behind = "places behind the end of a row count in its sum"
            mistakes |= {
                f"{behind}: load them as -inf, whose exp is 0": weights
                / (weights.sum(1, keepdim=True) + padding * (-x.amax(1, keepdim=True)).exp()),
                f"{behind} with a weight of 1: load them as -inf, whose exp is 0": weights
                / (weights.sum(1, keepdim=True) + padding),
            }
        _compare(found, shifted.double().softmax(1).float(), "y", mistakes, atol=1e-6)


# --- 8: attention


def launch_attend(
    kernel: Any, q: Tensor, keys: Tensor, k_scale: Tensor, values: Tensor, v_scale: Tensor, TOKENS: int = 16
) -> Tensor:
    """y (heads, D) for q (heads, D), keys and values as words (heads, tokens, D / 8), scales (heads, tokens)."""
    (heads, tokens, _), D = keys.shape, q.shape[1]
    y = torch.zeros_like(q)
    launch(
        kernel, (heads,), ("y",), q, keys, k_scale, values, v_scale, y, tokens, D**-0.5, D=D, TOKENS=TOKENS
    )
    return y


@triton.jit
def attend(q, keys, k_scale, values, v_scale, y, tokens, factor, D: tl.constexpr, TOKENS: tl.constexpr):
    head, d = tl.program_id(0), tl.arange(0, D)
    query = tl.load(q + head * D + d)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    result = tl.zeros((D,), tl.float32)
    for start in range(0, tokens, TOKENS):
        t = start + tl.arange(0, TOKENS)
        seen, token = t < tokens, head * tokens + t
        place, inside = token[:, None] * (D // 8) + (d // 8)[None, :], seen[:, None] & (d < D)[None, :]
        shift = (4 * (d % 8))[None, :]
        k = ((tl.load(keys + place, mask=inside, other=0) >> shift) & 15) - 8  # (TOKENS, D), whole numbers
        v = ((tl.load(values + place, mask=inside, other=0) >> shift) & 15) - 8
        scores = (
            tl.sum(k * query[None, :], axis=1) * tl.load(k_scale + token, mask=seen, other=0.0) * factor
        )
        scores = tl.where(seen, scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, axis=0))
        weights, kept = tl.exp(scores - above), tl.exp(highest - above)
        result = result * kept + tl.sum(
            (weights * tl.load(v_scale + token, mask=seen, other=0.0))[:, None] * v, axis=0
        )
        total = total * kept + tl.sum(weights, axis=0)
        highest = above
    tl.store(y + head * D + d, result / total)


def _softmax_attention(scores: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("ht,htd->hd", scores.softmax(1), v)


def _running(scores: Tensor, v: Tensor, size: int, *, result: bool = True, total: bool = True) -> Tensor:
    """The running softmax in steps of ``size``, with what is asked for brought to the new maximum and the other not."""
    highest = scores[:, :0].sum(1) - torch.inf
    sums, whole = torch.zeros(len(scores)), torch.zeros(len(scores), v.shape[2])
    for step, values in zip(scores.split(size, 1), v.split(size, 1), strict=True):
        above = torch.maximum(highest, step.amax(1))
        kept, weights = (highest - above).exp(), (step - above[:, None]).exp()
        sums = sums * (kept if total else 1) + weights.sum(1)
        whole = whole * (kept[:, None] if result else 1) + torch.einsum("ht,htd->hd", weights, values)
        highest = above
    return whole / sums[:, None]


def _check_attend(fn: Callable[..., Any]) -> None:
    for heads, tokens, D in ((2, 32, 16), (3, 37, 32), (1, 7, 16)):
        q = _random(heads, D) * 2
        k_codes, v_codes = _codes(heads * tokens, D, 1), _codes(heads * tokens, D, 2)
        k_scale = _random(heads, tokens, seed=3).abs() * 0.2 + 0.1
        v_scale = _random(heads, tokens, seed=4).abs() * 0.2 + 0.1
        k = (k_codes - 8).view(heads, tokens, D) * k_scale[:, :, None]
        v = (v_codes - 8).view(heads, tokens, D) * v_scale[:, :, None]
        dots = torch.einsum("hd,htd->ht", q, k)
        scores = dots * D**-0.5
        size, missing = min(16, tokens), -tokens % 16
        padded = torch.cat([scores, scores.new_zeros(heads, missing)], 1)
        behind = torch.cat([v, v.new_zeros(heads, missing, D)], 1)
        v_by_k = (v_codes - 8).view(heads, tokens, D) * k_scale[:, :, None]
        running = partial(_running, scores, v, size)
        mistakes: dict[str, Any] = {
            "the scores lack the factor D ** -0.5": _softmax_attention(dots, v),
            "result is not brought to the new maximum: multiply it by exp(highest - above) in each step": running(
                result=False
            ),
            "total is not brought to the new maximum: multiply it by exp(highest - above) in each step": running(
                total=False
            ),
            "neither result nor total is brought to the new maximum: multiply both by exp(highest - above)": running(
                result=False, total=False
            ),
            "tokens behind the end count with a score of 0: set it to -inf": _softmax_attention(
                padded, behind
            ),
            "your y is not divided by the sum of the weights": running()
            * (scores - scores.amax(1, keepdim=True)).exp().sum(1, keepdim=True),
            "the values are multiplied by the scales of the keys": _softmax_attention(scores, v_by_k),
            "the scores lack the scales of the keys": _softmax_attention(
                torch.einsum("hd,htd->ht", q, (k_codes - 8).view(heads, tokens, D).float()) * D**-0.5, v
            ),
            "the softmax starts anew in each step and the last one is what you wrote: keep highest, total and "
            "result": _softmax_attention(
                scores[:, (tokens - 1) // 16 * 16 :], v[:, (tokens - 1) // 16 * 16 :]
            ),
        }
        if tokens <= 16:
            mistakes = {s: m for s, m in mistakes.items() if "maximum" not in s and "anew" not in s}
        if not missing:
            mistakes = {s: m for s, m in mistakes.items() if "behind" not in s}
        _compare(
            fn(
                q,
                pack_words(k_codes).view(heads, tokens, -1),
                k_scale,
                pack_words(v_codes).view(heads, tokens, -1),
                v_scale,
            ),
            _softmax_attention(scores, v),
            "y",
            mistakes,
        )


EXERCISES = [
    Exercise(
        "13.1",
        "Add, with a mask",
        difficulty=1,
        minutes=10,
        statement="""
            $$z_i = x_i + y_i \\qquad 0 \\le i < n$$

            Program $p$ of $\\lceil n / BLOCK \\rceil$ adds the elements $p \\cdot BLOCK$ to
            $p \\cdot BLOCK + BLOCK - 1$, those of them that are below $n$.
        """,
        starter='''
            @triton.jit
            def my_add(x, y, z, n, BLOCK: tl.constexpr):
                """x, y, z: pointers to (n,) float32; writes z = x + y. Program (p,)."""
                raise NotImplementedError
        ''',
        solution=add,
        check=_check_add,
        launch=launch_add,
        hints=[
            "`tl.program_id(0)` says which program this is; `tl.arange(0, BLOCK)` counts 0 to BLOCK - 1.",
            "`i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)`, and `x + i` points to those elements of "
            "x.",
            "`tl.load(x + i, mask=i < n)`, the same for y; then `tl.store(z + i, ..., mask=i < n)`.",
        ],
    ),
    Exercise(
        "13.2",
        "From words to numbers",
        difficulty=2,
        minutes=15,
        statement="""
            A word of 32 bits holds eight codes of 4 bits, the first in the lowest bits. Column $k$ of row $r$ is

            $$w_{rk} = (c_{rk} - 8)\\; s_{r,\\lfloor k / GROUP \\rfloor}, \\qquad
            c_{rk} = \\left\\lfloor \\frac{word_{r,\\lfloor k/8 \\rfloor}}
            {2^{4 (k \\bmod 8)}} \\right\\rfloor \\bmod 16$$

            Program $(r, p)$ has row $r$ and the words $p \\cdot WORDS$ to $p \\cdot WORDS + WORDS - 1$ of it.
        """,
        starter='''
            @triton.jit
            def my_dequantize(words, scale, w, columns, groups, GROUP: tl.constexpr, WORDS: tl.constexpr):
                """words (rows, columns / 8) int32, scale (rows, groups) float32; writes w (rows, columns) float32."""
                raise NotImplementedError
        ''',
        solution=dequantize,
        check=_check_dequantize,
        launch=launch_dequantize,
        hints=[
            "Load WORDS words with a mask. `>>` shifts right, and `& 15` keeps the lowest four bits.",
            "`(word[:, None] >> (4 * tl.arange(0, 8))[None, :]) & 15` has all the codes, shape (WORDS, 8). "
            "Their columns are `k = (8 * j)[:, None] + tl.arange(0, 8)[None, :]`, where j counts words.",
            "The scale lies at `scale + row * groups + k // GROUP`, the result at `w + row * columns + k`, "
            "both where k < columns.",
        ],
    ),
    Exercise(
        "13.3",
        "A tile of a product",
        difficulty=2,
        minutes=20,
        statement="""
            $$C_{mn} = \\sum_k A_{mk} B_{kn}$$

            A (M, K), B (K, N) and C (M, N) lie in memory row after row. Program $(p, q)$ makes the rows
            $p \\cdot TILE$ and the columns $q \\cdot TILE$ onwards, TILE of each. It goes along $k$ in steps of
            TILE. `tl.dot` multiplies two tiles.
        """,
        starter='''
            @triton.jit
            def my_matmul(a, b, c, M, N, K, TILE: tl.constexpr):
                """a (M, K), b (K, N) float32; writes c (M, N) = a @ b, a tile of TILE by TILE. Program (p, q)."""
                raise NotImplementedError
        ''',
        solution=matmul,
        check=_check_matmul,
        launch=launch_matmul,
        hints=[
            "Three ranges: m and n for the tile's rows and columns, k for the step. Element (m, k) of a "
            "lies at a + m * K + k.",
            "`a + m[:, None] * K + k[None, :]` points to a tile of a. Its mask is "
            "`(m < M)[:, None] & (k < K)[None, :]`, with `other=0.0`, so that what is missing adds nothing. "
            'tl.dot rounds float32 on a GPU, unless you say `input_precision="ieee"`.',
            "Begin with `tl.zeros((TILE, TILE), tl.float32)`, add `tl.dot(left, right)` for each "
            "`start in range(0, K, TILE)`, store once at the end.",
        ],
    ),
    Exercise(
        "13.4",
        "One row times int4, in one kernel",
        difficulty=3,
        minutes=25,
        statement="""
            $$y_o = \\sum_{steps} s_{o,\\,\\lfloor start / GROUP \\rfloor} \\sum_{k \\in step} (c_{ok} - 8)\\, x_k$$

            The weight is never written out: words come in, and sums go out. Program $(p,)$ has the outputs
            $p \\cdot OUT$ onwards, goes along the columns in steps of K, and multiplies each step's sum by the
            scale of its group. GROUP is a multiple of K.
        """,
        starter='''
            @triton.jit
            def my_row(
                x, words, scale, y, out, columns, groups, GROUP: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr
            ):
                """x (columns,) and scale (out, groups) float32, words (out, columns / 8) int32; writes y (out,)."""
                raise NotImplementedError
        ''',
        solution=row,
        check=_check_row,
        launch=launch_row,
        hints=[
            "It is 13.2 and 13.3 together: a loop over `start`, a tile (OUT, K) of codes, a sum over its "
            "columns.",
            "The code of column k lies in word k // 8, so load at "
            "`words + o[:, None] * (columns // 8) + (k // 8)[None, :]` and shift by `4 * (k % 8)`. A word "
            "is then loaded eight times; labkit's kernel loads it once.",
            "`sums += s * tl.sum((code - 8) * numbers[None, :], axis=1)` with s at "
            "`scale + o * groups + start // GROUP`.",
        ],
    ),
    Exercise(
        "13.5",
        "Split the columns: partial sums",
        difficulty=2,
        minutes=15,
        statement="""
            $$sums_{po} = \\sum_{k = p \\cdot span}^{\\min((p+1)\\, span,\\ columns) - 1} W_{ok}\\, x_k, \\qquad
            y_o = \\sum_p sums_{po}$$

            Program $(i, p)$ has the outputs $i \\cdot OUT$ onwards and part $p$ of the columns, in steps of K; span
            need not be a multiple of K. You write $sums$, each program a place of its own; the parts are added
            afterwards.
        """,
        starter='''
            @triton.jit
            def my_parts(x, weight, sums, out, columns, span, OUT: tl.constexpr, K: tl.constexpr):
                """x (columns,), weight (out, columns) float32; writes sums (parts, out). Program (i, p)."""
                raise NotImplementedError
        ''',
        solution=parts,
        check=_check_parts,
        launch=launch_parts,
        hints=[
            "The columns of part p begin at p * span. Where do they end? For the last part, earlier than "
            "you may think.",
            "`end = tl.minimum((part + 1) * span, columns)` and the mask `k < end`, for x and for the "
            "weight.",
            "Loop over `start in range(0, span, K)` with `k = part * span + start + tl.arange(0, K)`; the "
            "place of the result is `sums + part * out + o`.",
        ],
    ),
    Exercise(
        "13.6",
        "A row to int8",
        difficulty=2,
        minutes=12,
        statement="""
            $$s_r = \\frac{\\max_k |x_{rk}|}{127}, \\qquad
            c_{rk} = \\text{round}\\!\\left(\\frac{x_{rk}}{s_r}\\right)$$

            Program $(r,)$ has row $r$; BLOCK is at least `columns`. A row of zeros gets the scale 0 and the codes
            0. To round, take `tl.floor(... + 0.5)`.
        """,
        starter='''
            @triton.jit
            def my_quantize(x, codes, scale, columns, BLOCK: tl.constexpr):
                """x (rows, columns) float32; writes codes (rows, columns) int8 and scale (rows,) float32."""
                raise NotImplementedError
        ''',
        solution=quantize,
        check=_check_quantize,
        launch=launch_quantize,
        hints=[
            "`tl.max(tl.abs(numbers), axis=0)` is the largest of a block. What does the mask load in place "
            "of what is missing?",
            "With `other=0.0` the places behind the end do not change the largest absolute value.",
            "Divide by `tl.where(step > 0, step, 1.0)`, so that a row of zeros is not 0 / 0; `.to(tl.int8)` "
            "makes codes.",
        ],
    ),
    Exercise(
        "13.7",
        "Softmax of a row",
        difficulty=2,
        minutes=12,
        statement="""
            $$y_k = \\frac{e^{x_k - m}}{\\sum_j e^{x_j - m}}, \\qquad m = \\max_j x_j$$

            Program $(r,)$ has row $r$; BLOCK is at least `columns`. The numbers may be several hundred, and
            $e^{89}$ is more than float32 holds.
        """,
        starter='''
            @triton.jit
            def my_softmax(x, y, columns, BLOCK: tl.constexpr):
                """x (rows, columns) float32; writes y (rows, columns), the softmax of each row. Program (r,)."""
                raise NotImplementedError
        ''',
        solution=softmax,
        check=_check_softmax,
        launch=launch_softmax,
        hints=[
            "What a masked load gives in place of what is missing takes part in the max and in the sum. "
            "Which number changes neither?",
            '`other=float("-inf")`: it is never the max, and its exp is 0.',
            "`weights = tl.exp(numbers - tl.max(numbers, axis=0))`, then divide by "
            "`tl.sum(weights, axis=0)`.",
        ],
    ),
    Exercise(
        "13.8",
        "Attention over int4 keys and values",
        difficulty=3,
        minutes=40,
        statement="""
            $$y = \\sum_t \\frac{e^{a_t - m}}{\\sum_u e^{a_u - m}}\\, v_t, \\qquad a_t = factor \\cdot q \\cdot k_t$$

            Keys and values are words of int4 codes with a scale for each token: $k_t = (c_t - 8)\\, s_t$. Program
            $(h,)$ has head $h$ and goes along the tokens in steps of TOKENS, once. It keeps the largest score so
            far (`highest`), the sum of the weights (`total`) and the weighted sum of the values (`result`). When a
            step brings a larger score, what was kept is multiplied by $e^{highest - above}$, where $above$ is the
            new largest score.
        """,
        starter='''
            @triton.jit
            def my_attend(
                q, keys, k_scale, values, v_scale, y, tokens, factor, D: tl.constexpr, TOKENS: tl.constexpr
            ):
                """q (heads, D), keys, values (heads, tokens, D / 8) int32, scales (heads, tokens); writes y."""
                raise NotImplementedError
        ''',
        solution=attend,
        check=_check_attend,
        launch=launch_attend,
        hints=[
            "A step: load and decode a tile (TOKENS, D) of keys as in 13.4, take scores (TOKENS,), set "
            "those behind the end to -inf.",
            "`above = tl.maximum(highest, tl.max(scores, axis=0))`, `weights = tl.exp(scores - above)`, "
            "`kept = tl.exp(highest - above)`. highest starts at -inf, so the first kept is 0.",
            "`result = result * kept + tl.sum(weights[:, None] * v, axis=0)`, "
            "`total = total * kept + tl.sum(weights, axis=0)`, `highest = above`; store `result / total` "
            "after the loop.",
        ],
    ),
]

QUIZ = [
    Question(
        "A kernel without a mask gives the right answer for 64 elements in blocks of 32. And for 75?",
        {
            "It stops with an error on any GPU": "Often the memory behind an array belongs to another one, and "
            "nothing stops.",
            "The last program reads and writes 21 places that are not its own": "96 places are touched, 75 are there.",
            "The last 11 elements are left out": "The third program does them, and 21 more.",
        },
        answer="b",
    ),
    Question(
        "Why does a split-K kernel write partial sums to a buffer rather than add them with atomics?",
        {
            "Atomics are not in Triton": "They are: tl.atomic_add.",
            "Then there is less to write": "There is more: one row of sums for each part.",
            "Then the order of the additions is fixed, and the same input gives the same bits": "Float sums depend on "
            "their order, and atomics come in any.",
        },
        answer="c",
    ),
    Question(
        "A kernel agrees with the reference in the interpreter and compiles for sm_90 with tensor-core "
        "instructions. What is known?",
        {
            "That it is right on these shapes and fits the chip": "Values and limits were looked at, and no clock.",
            "That it is fast": "Of ours all that was known, too, when an H100 found them slower than bfloat16.",
            "That programs never get into each other's way on a GPU": "The interpreter runs one after another. "
            "Our guard "
            "finds two that write one place, in the shapes that were tried.",
        },
        answer="a",
    ),
]


# --- pictures

_PALE = (
    "#FFFFFF",
    "#DDDDDD",
    "#9CC9E8",
    "#F6CD7B",
    "#8FD4BC",
    "#EFA98B",
    "#E3B8D1",
    "#F7F0A5",
)  # none, masked, 0, 1, ...
NONE, MASKED = -2, -1

Panel = tuple[str, Any, Any]  # title, which program each cell belongs to, what is written in it


def _cells(title: str, panels: Sequence[Panel], *, cell: int = 34) -> go.Figure:
    """Grids of cells side by side, coloured by program."""
    grids = [np.atleast_2d(np.asarray(p[1])) for p in panels]
    widths, tall = [g.shape[1] for g in grids], max(g.shape[0] for g in grids)
    made = make_subplots(
        1, len(panels), column_widths=[w / sum(widths) for w in widths],
        horizontal_spacing=0.8 / (sum(widths) + len(panels)),
        subplot_titles=[p[0] for p in panels],
    )  # fmt: skip
    count = len(_PALE)
    scale = [[(i + j) / count, c] for i, c in enumerate(_PALE) for j in (0, 1)]
    for column, (grid, panel) in enumerate(zip(grids, panels, strict=True), 1):
        made.add_heatmap(
            z=grid.tolist(), text=np.atleast_2d(np.asarray(panel[2], dtype=object)).tolist(),
            texttemplate="%{text}", zmin=-2.5, zmax=count - 2.5, colorscale=scale, showscale=False,
            xgap=2, ygap=2, hoverinfo="skip", row=1, col=column,
        )  # fmt: skip
        made.update_yaxes(range=[tall - 0.5, -0.5], row=1, col=column)
    made.update_xaxes(visible=False)
    made.update_yaxes(visible=False)
    made.update_annotations(font_size=12)
    width = max(40 + 9 * len(title), min(760, cell * (sum(widths) + len(panels)) + 60))
    return made.update_layout(
        title_text=title, width=width, height=cell * tall + 110, margin={"l": 15, "r": 15, "t": 80, "b": 15}
    )


def programs(n: int = 11, BLOCK: int = 4) -> go.Figure:
    """Which program has which of n elements, and what its mask leaves out."""
    count = _cdiv(n, BLOCK)
    rows = np.arange(count * BLOCK).reshape(count, BLOCK)
    owner = np.where(rows < n, np.arange(count)[:, None] % 6, MASKED)
    title = f"{n} elements, blocks of {BLOCK}: {count} programs; masked places: {count * BLOCK - n}"
    return _cells(title, [("a row for each program; grey: masked", owner, rows.astype(str))])


def picture(number: int) -> go.Figure:
    """The small picture of exercise 13.``number``."""
    return _PICTURES[number]()


def _word() -> go.Figure:
    codes = [[f"code {i}" for i in range(7, -1, -1)], [f"bit {4 * i}" for i in range(7, -1, -1)]]
    owner = [[0, 0, 0, 0, 0, 0, 0, 0], [NONE] * 8]
    k = np.arange(8)
    columns = [("columns 0 to 7: code 0 first", [k * 0, k * 0 + NONE], [[f"k = {i}" for i in k], [""] * 8])]
    return _cells(
        "One word: its first code lies in the lowest bits",
        [("a word, highest bits left", owner, codes), *columns],
        cell=52,
    )


def _tile() -> go.Figure:
    a, b, c = np.full((6, 8), MASKED), np.full((8, 6), MASKED), np.zeros((6, 6), int)
    a[2:4], b[:, 4:6] = np.arange(8) // 2, (np.arange(8) // 2)[:, None]
    c[:] = MASKED
    c[2:4, 4:6] = 5
    empty = lambda g: np.full(g.shape, "", dtype=object)  # noqa: E731
    ta, tb, tc = empty(a), empty(b), empty(c)
    ta[2:4], tb[:, 4:6] = np.arange(8) // 2, (np.arange(8) // 2)[:, None]
    for p in range(3):
        for q in range(3):
            tc[2 * p, 2 * q] = f"{p},{q}"
    panels = [("A (M, K)", a, ta), ("B (K, N)", b, tb), ("C (M, N)", c, tc)]
    return _cells("Program (1, 2), TILE = 2: four steps along k, one tile of C", panels, cell=26)


def _fused() -> go.Figure:
    steps, out = np.arange(12) // 3, np.arange(6)
    w, t = np.full((6, 12), MASKED), np.full((6, 12), "", dtype=object)
    w[3:6], t[3:6] = steps, steps
    y = np.where(out >= 3, 5, MASKED)[:, None]
    x = np.full((6, 12), NONE)
    x[0] = steps
    tx = np.full((6, 12), "", dtype=object)
    tx[0] = steps
    panels = [("x: one row", x, tx), ("W as words: out by columns", w, t), ("y", y, np.full((6, 1), ""))]
    return _cells("Program (1,): three outputs, a step at a time; two steps share a scale", panels, cell=24)


def _split() -> go.Figure:
    owner = np.broadcast_to(np.arange(12) // 4, (6, 12))
    sums = np.broadcast_to(np.arange(3)[:, None], (3, 6))
    panels = [
        ("W: out by columns, a colour for each part", owner, owner.astype(str)),
        ("sums (parts, out)", sums, sums.astype(str)),
    ]
    return _cells("Three parts of the columns, each with sums of its own", panels, cell=28)


def _rows_to_int8() -> go.Figure:
    x = np.array([[0.5, -2.0, 1.0, MASKED], [3.0, 0.75, -1.5, MASKED], [0.0, 0.0, 0.0, MASKED]])
    text = [[f"{v:g}" for v in row[:3]] + [""] for row in x]
    s = np.abs(x[:, :3]).max(1) / 127
    codes = [[f"{np.floor(v / (d or 1) + 0.5):.0f}" for v in row[:3]] for row, d in zip(x, s, strict=True)]
    owner = np.broadcast_to(np.arange(3)[:, None], (3, 4)).copy()
    owner[:, 3] = MASKED
    panels = [
        ("x", owner, text),
        ("scale", owner[:, :1], [[f"{v:.3f}"] for v in s]),
        ("codes", owner[:, :3], codes),
    ]
    return _cells("A row for each program; grey: masked, loaded as 0", panels, cell=50)


def _softmax_row() -> go.Figure:
    x = np.array([1.0, 3.0, 2.0])
    w = np.exp(x - 3)
    owner, fill = [0, 0, 0, MASKED], ["-inf"]
    panels = [
        ("x", owner, [*[f"{v:g}" for v in x], *fill]),
        ("exp(x - 3)", owner, [*[f"{v:.2f}" for v in w], "0"]),
        ("y", owner[:3], [f"{v:.2f}" for v in w / w.sum()]),
    ]
    return _cells("One row: what the mask leaves out is loaded as -inf", panels, cell=50)


def _running_softmax() -> go.Figure:
    scores = np.array([[1.0, 2.0], [5.0, 0.0], [3.0, 4.0]])
    highest, total, lines = -np.inf, 0.0, []
    for step in scores:
        above = max(highest, step.max())
        kept = np.exp(highest - above)
        total = total * kept + np.exp(step - above).sum()
        highest = above
        lines.append([f"{above:g}", f"{kept:.3f}", f"{total:.3f}"])
    owner = np.arange(3)[:, None]
    panels = [
        ("scores of a step", owner.repeat(2, 1), [[f"{v:g}" for v in s] for s in scores]),
        ("above, kept, total", owner.repeat(3, 1), lines),
    ]
    return _cells(
        "Three steps of two tokens: the sum is kept relative to the largest score", panels, cell=58
    )


_PICTURES: dict[int, Callable[[], go.Figure]] = {
    1: programs,
    2: _word,
    3: _tile,
    4: _fused,
    5: _split,
    6: _rows_to_int8,
    7: _softmax_row,
    8: _running_softmax,
}


def difference(found: Tensor, expected: Tensor, name: str = "the result") -> go.Figure:
    """|found - expected| as colours, with lines between what different programs wrote."""
    gap = (found.double() - expected.double()).abs()
    gap = torch.nan_to_num(gap, nan=torch.inf, posinf=torch.inf).reshape(-1, found.shape[-1])
    largest = gap[gap.isfinite()].max().item() if bool(gap.isfinite().any()) else 1.0
    shown = gap.clamp(max=largest or 1.0)
    owner = getattr(found, "programs", torch.zeros(found.shape)).reshape(gap.shape)
    off = gap > 1e-4 + 1e-4 * expected.double().abs().reshape(gap.shape)
    wrong, everyone = len(owner[off].unique()), len(owner.unique())
    made = plot.heatmap(
        shown,
        title=f"{name}: wrong in what {wrong} of {everyone} programs wrote",
        x_title="last axis of the result",
        y_title="row",
        label="|difference|",
    )
    made.update_traces(colorscale=[[0, "#FFFFFF"], [1, plot.RED]], zmin=0)
    x: list[float | None] = []
    y: list[float | None] = []
    for r, c in torch.nonzero(owner[:, 1:] != owner[:, :-1]).tolist():
        x += [c + 0.5, c + 0.5, None]
        y += [r - 0.5, r + 0.5, None]
    for r, c in torch.nonzero(owner[1:] != owner[:-1]).tolist():
        x += [c - 0.5, c + 0.5, None]
        y += [r + 0.5, r + 0.5, None]
    made.add_scatter(
        x=x, y=y, mode="lines", line={"color": "#444444", "width": 1}, hoverinfo="skip", showlegend=False
    )
    rows, columns = gap.shape
    made.update_xaxes(range=[-0.5, columns - 0.5], showgrid=False)
    made.update_yaxes(
        range=[rows - 0.5, -0.5], autorange=False, showgrid=False, dtick=1 if rows < 12 else None
    )
    return made.update_layout(height=min(460, max(220, 150 + 28 * rows)))


# --- the roofline

CHIPS = {
    # bytes per second from memory, operations per second of the tensor cores on fp16, dense. The vendor's figures:
    # NVIDIA A100 80GB SXM data sheet (2021); H100 SXM data sheet (2023, half of what it states for sparse matrices);
    # DGX B200 data sheet (2024, an eighth of the system's 64 TB/s and of its dense fp16).
    "A100": (2.039e12, 312e12),
    "H100": (3.35e12, 989e12),
    "B200": (8.0e12, 2250e12),
}


def intensity(rows: int, bits: float, out: int = 4096, columns: int = 4096, group: int = 64) -> float:
    """Operations per byte of a product of ``rows`` rows with an (out, columns) weight of ``bits`` bits.

    Below 16 bits each group has a scale of 16; activations and results have 16 bits each.
    """
    scale = 16 / group if bits < 16 else 0
    read = out * columns * (bits + scale) / 8 + 2 * rows * (out + columns)
    return 2 * rows * out * columns / read


def bound(rows: int, bits: float, chip: str = "H100") -> float:
    """The least microseconds for that product: those of memory or of arithmetic, whichever is more."""
    speed, peak = CHIPS[chip]
    operations = 2 * rows * 4096 * 4096
    return 1e6 * max(operations / intensity(rows, bits) / speed, operations / peak)


def roofline(chip: str = "H100", rows: int = 1, bits: int = 4) -> go.Figure:
    """Where a product of a (4096, 4096) weight lies under the two limits of a chip."""
    speed, peak = CHIPS[chip]
    at = intensity(rows, bits)
    limited = "memory" if at < peak / speed else "arithmetic"
    title = f"{chip}, rows {rows}, bits {bits}: {at:.3g} operations per byte, {limited} decides, "
    title += f"{bound(rows, bits, chip):.3g} us"
    made = plot.figure(
        title, "operations per byte", "operations per second (10<sup>12</sup>)", log_x=True, log_y=True
    )
    made.update_layout(title_font_size=13)
    edges = [0.5, peak / speed, 20000]
    made.add_scatter(x=edges, y=[min(e * speed, peak) / 1e12 for e in edges], mode="lines", name=f"limit of {chip}",
                     line={"color": plot.BLACK, "width": 2})  # fmt: skip
    for i, other in enumerate((16, 8, 4)):
        place = intensity(rows, other)
        made.add_scatter(
            x=[place], y=[min(place * speed, peak) / 1e12], mode="markers", name=f"{other} bits",
            marker={"size": 15 if other == bits else 9, "symbol": plot.SYMBOLS[i], "color": plot.COLORS[i]},
        )  # fmt: skip
    made.update_xaxes(dtick=1)
    made.update_yaxes(dtick=1)
    return made.update_layout(legend={"x": 0.98, "xanchor": "right", "y": 0.05})


def speeds(rate: Mapping[str, float], ceiling: float) -> go.Figure:
    """Gigabytes per second at which each kernel read its weight, and how fast this machine reads at all."""
    made = plot.bars(rate, title="One row times 4096 x 4096 on this machine", y_title="weight read (GB/s)")
    made.add_hline(y=ceiling, line_dash="dash", annotation_text=f"plain reading: {ceiling:.1f} GB/s")
    made.update_yaxes(range=[0, 1.2 * max(ceiling, *rate.values())])
    return made


# --- the compiler

_COMPILE = """
import json, sys
from dataclasses import asdict
from labkit.kernels.gpu.compiled import cases, compiled
name, *architectures = sys.argv[1:]
case = next(c for c in cases() if c.name == name)
print(json.dumps([asdict(compiled(case, int(a))) for a in architectures]))
"""


def compile_apart(name: str, architectures: Sequence[int] = (80, 90, 100)) -> dict[int, str]:
    """The PTX of one of labkit's kernels for each architecture, compiled in a process without the interpreter."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="labkit-ptx-") as cache:
        for architecture in architectures:
            folder = Path(cache) / str(architecture)
            environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
            done = subprocess.run(
                [sys.executable, "-c", _COMPILE, name, str(architecture)],
                env=environment | {"TRITON_CACHE_DIR": str(folder)}, capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"compiling failed: {done.stderr.strip().splitlines()[-1]}")
            json.loads(done.stdout)
            found[architecture] = next(folder.rglob("*.ptx")).read_text()
    return found


def instructions(ptx: str) -> list[str]:
    """The tensor-core instructions in a PTX text, each name once, in the order in which they come."""
    found = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*", ptx)
    return list(dict.fromkeys(found))


def registers(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Registers of a thread, for each kernel and architecture of data/measurements/gpu_compiled.json."""
    made = plot.figure("Registers of a thread, recorded without a GPU", "registers", height=440, width=560)
    names = list(dict.fromkeys(r["kernel"] for r in rows))
    for i, architecture in enumerate(dict.fromkeys(r["architecture"] for r in rows)):
        used = {r["kernel"]: r["registers"] for r in rows if r["architecture"] == architecture}
        made.add_scatter(
            x=[used.get(n) for n in names], y=names, mode="markers", name=architecture,
            marker={"symbol": plot.SYMBOLS[i], "size": 10, "color": plot.COLORS[i]},
        )  # fmt: skip
    made.add_vline(x=255, line_dash="dash", annotation_text="limit: 255")
    made.update_yaxes(autorange="reversed", tickfont_size=10, dtick=1)
    made.update_xaxes(range=[0, 290])
    return made.update_layout(legend={"orientation": "h", "y": 1.06, "x": 0.4})


# --- a GPU

_TIMED = {  # works of data/measurements/bench_h100.json, by what stands under their bars
    "one row": "1 row by 14336 x 4096, int4 g64",
    "16 rows": "16 rows by 14336 x 4096, int4 g64",
    "256 rows": "256 rows by 14336 x 4096, int4 g64",
    "attention, int8": "attention of 32 x 4096 tokens, int8 channel",
    "attention, int4": "attention of 32 x 4096 tokens, int4 channel asym",
}


def beside_bf16(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How many times as fast as torch in bfloat16, by work, in the rows of a file of ``labkit bench``."""
    found = {row["work"]: row["ratio"] for row in rows if row["peer_name"] == "torch bf16"}
    return {name: found[work] for name, work in _TIMED.items()}


def timed(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Both beside torch in bfloat16, for each work."""
    made = plot.figure("The kernels on an H100, recorded", "", "times as fast as torch in bfloat16", width=640)
    for i, (name, rows) in enumerate((("proved, never timed", before), ("timed and changed", now))):
        ratios = beside_bf16(rows)
        made.add_bar(
            x=list(ratios), y=list(ratios.values()), name=name, marker_color=plot.COLORS[i],
            text=[f"{ratio:.2f}" for ratio in ratios.values()], textposition="outside", cliponaxis=False,
        )  # fmt: skip
    line = {"dash": "dash", "color": "black"}
    made.add_scatter(x=list(_TIMED), y=[1] * len(_TIMED), mode="lines", name="bfloat16", line=line)
    return made.update_layout(barmode="group", legend={"x": 0.98, "xanchor": "right", "y": 1.05})
