"""What torchao, optimum-quanto and llm-compressor do in their own way, in our words and otherwise with labkit's parts.

Each function gives the codes of a layer, (out, in), and its scales, as the library is said to come to them; None for
scales that are not made here. Where both equal what the library really makes, the step that the function's text names
is all that is different.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from library_layers import Layer, quantize, rounded, stats_of
from torch import Tensor

from labkit.quant import Grid, Params, QuantSpec, rtn, values_of
from labkit.quant.blocks import Blocks
from labkit.quant.formats import float_codes, nearest, round_to_format
from labkit.quant.hqq import _shrink
from labkit.quant.observers import search

Redone = tuple[Tensor, Tensor | None]


def spread(values: Tensor, spec: QuantSpec, layer: Layer) -> Tensor:
    """One value for each block to one for each weight, to broadcast."""
    return Blocks(tuple(layer.weight.shape), spec.block).spread(values)


def in_float32(layer: Layer, spec: QuantSpec, widen: bool = True) -> tuple[Tensor, Tensor]:
    """Scale and least number of each block as all three come to them: subtracted, then divided, in float32. labkit
    rounds once, at the end. ``widen``: the range contains 0.
    """
    blocks = layer.weight.unflatten(1, (-1, spec.block[1] or layer.weight.shape[1]))  # type: ignore[index]
    lo, hi = blocks.amin(dim=2), blocks.amax(dim=2)  # (out, groups)
    if widen:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    return (hi - lo) / (spec.levels - 1), lo


def clamped(steps: Tensor, spec: QuantSpec) -> Tensor:
    return steps.clamp(*spec.code_range)


def by_reciprocal(layer: Layer, spec: QuantSpec) -> Redone:
    """torchao: times 1 / scale, not divided by it; with a zero point, in float32 as above."""
    if spec.zero == "none":
        scale, zero = rtn(layer.weight, spec).params.dense()[0], 0
    else:
        scale, lo = in_float32(layer, spec)
        zero = spread(clamped(-(lo / scale).round(), spec), spec, layer)
    return clamped((layer.weight * spread(1 / scale, spec, layer)).round() + zero, spec), scale


def from_the_least(layer: Layer, spec: QuantSpec, middle: bool = False) -> Redone:
    """optimum-quanto: the height above the least number over the scale, rounded. ``middle``: torchao for tinygemm,
    which stores the number in the middle of the grid and goes back from there.
    """
    scale, lo = in_float32(layer, spec, widen=False)
    if middle:
        lo = (lo + scale * 2 ** (spec.bits - 1)) - scale * 2 ** (spec.bits - 1)
    steps = (layer.weight - spread(lo, spec, layer)) / spread(scale, spec, layer)
    return clamped(steps.round(), spec), scale


def without_widening(layer: Layer, spec: QuantSpec) -> Redone:
    """optimum-quanto, zeropoint=True: the range is that of the numbers, with 0 or without."""
    scale, lo = in_float32(layer, spec, widen=False)
    zero = clamped((-lo / scale).round(), spec)
    steps = (layer.weight / spread(scale, spec, layer)).round() + spread(zero, spec, layer)
    return clamped(steps, spec), scale


def signed_zero(layer: Layer, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """llm-compressor's scales and zero points; its codes begin at -2^(b-1)."""
    scale, lo = in_float32(layer, spec)
    half = 2 ** (spec.bits - 1)
    return scale, (-half - lo / scale).clamp(-half, half - 1).round()


def after_the_zero(layer: Layer, spec: QuantSpec) -> Redone:
    """llm-compressor: rounded once the zero point is added."""
    scale, zero = signed_zero(layer, spec)
    half = 2 ** (spec.bits - 1)
    steps = layer.weight / spread(scale, spec, layer) + spread(zero, spec, layer)
    return steps.clamp(-half, half - 1).round() + half, scale


def mse_in_float32(layer: Layer, spec: QuantSpec, norm: float = 2.4, steps: int = 20) -> Redone:
    """llm-compressor's search: |error|^norm, added up in float32, in 1, 0.99, ... of each range."""

    def observer(blocks: Tensor, spec: QuantSpec, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        def cost(lo: Tensor, hi: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
            return (Grid(spec).round(blocks, scale) - blocks).abs().pow(norm).sum(dim=1)

        ratios = [1 - step / 100 for step in range(steps)]
        return search(blocks.amin(dim=1), blocks.amax(dim=1), spec, cost, ratios)

    q = quantize("rtn", spec, {"observer": observer}, layer)
    return q.codes, q.params.dense()[0]


def nf4_of_four_digits(layer: Layer, spec: QuantSpec) -> Redone:
    """torchao: a table of four digits, and numbers divided by their scale."""
    table = torch.tensor([round(float(value), 4) for value in values_of("nf4")])
    blocks = layer.weight.reshape(-1, 64)
    codes = nearest(blocks / blocks.abs().amax(dim=1, keepdim=True), table)
    return codes.reshape(layer.weight.shape), None


def nvfp4_at_once(layer: Layer, spec: QuantSpec, multiply: bool = False) -> Redone:
    """The scale of the tensor is absmax / (6 * 448): torchao divides by it, and multiplies by 1 / scale in the end.
    ``multiply``: llm-compressor stores its reciprocal and multiplies by that, and divides in the end.
    """
    blocks = layer.weight.reshape(-1, 16)
    least, whole = blocks.abs().amax(dim=1, keepdim=True) / 6, layer.weight.abs().max() / 2688
    if multiply:
        whole = 2688 / layer.weight.abs().max()
        fp8 = (least * whole).to(torch.float8_e4m3fn).float()
        scale, steps = fp8 / whole, blocks / (fp8 / whole)
    else:
        fp8 = (least / whole).to(torch.float8_e4m3fn).float()
        scale, steps = fp8 * whole, blocks * ((1 / whole) / fp8)
    codes = float_codes(round_to_format(steps, spec.format), spec.format)
    return codes.reshape(layer.weight.shape), scale.reshape(len(layer.weight), -1)


def mxfp4_even(layer: Layer, spec: QuantSpec) -> Redone:
    """llm-compressor: labkit's e8m0-even."""
    q = rtn(layer.weight, replace(spec, scale="e8m0-even"))
    return q.codes, q.params.dense()[0]


def mxfp8_by_one_bit(layer: Layer, spec: QuantSpec) -> Redone:
    """llm-compressor: the largest weight of a block, rounded to one bit of mantissa, gives the power of two."""
    blocks = layer.weight.reshape(-1, 32)
    fraction, exponent = torch.frexp(blocks.abs().amax(dim=1, keepdim=True))
    scale = torch.exp2((exponent + (fraction >= 0.875).int() - 9).float())  # 448 lies below 2^9
    codes = float_codes(round_to_format(blocks / scale, spec.format), spec.format)
    return codes.reshape(layer.weight.shape), scale.reshape(len(layer.weight), -1)


def hqq_of_torchao(layer: Layer, spec: QuantSpec) -> Redone:
    """Times 1 / scale throughout; with 4 bits the solver begins at whole zero points, as in the hqq package."""
    W = layer.weight.reshape(-1, 64)
    lo, hi = W.amin(dim=1, keepdim=True), W.amax(dim=1, keepdim=True)
    inverse = (spec.levels - 1) / (hi - lo)
    z = (-lo * inverse).round() if spec.bits == 4 else -lo * inverse
    beta, least = 10.0, torch.inf
    for _ in range(20):
        W_q = clamped((W * inverse + z).round(), spec)
        W_r = (W_q - z) / inverse
        z = (W_q - (W - _shrink(W - W_r, beta, 0.7)) * inverse).mean(dim=1, keepdim=True)
        error = float((W - W_r).abs().mean())
        if error >= least:
            break
        least, beta = error, beta * 1.01
    return clamped((W * inverse + z).round(), spec).reshape(layer.weight.shape), 1 / inverse


def hqq_of_quanto(layer: Layer, spec: QuantSpec) -> Redone:
    """Zero points in the unit of the weights; those of the least mean error are kept, where labkit takes the last."""
    W = layer.weight.reshape(-1, 64)
    lo, hi = W.amin(dim=1, keepdim=True), W.amax(dim=1, keepdim=True)
    s, best, beta = (hi - lo) / (spec.levels - 1), -lo, 10.0

    def at(shift: Tensor) -> tuple[Tensor, Tensor, float]:
        """Codes, what they stand for, and the mean error."""
        W_q = clamped(((W + shift) / s).round(), spec)
        W_r = W_q * s - shift
        return W_q, W_r, float((W - W_r).abs().mean())

    W_q, W_r, least = at(best)
    for _ in range(20):
        shift = (W_q * s - (W - _shrink(W - W_r, beta, 0.7))).mean(dim=1, keepdim=True)
        W_q, W_r, error = at(shift)
        if error >= least:
            break
        least, best, beta = error, shift, beta * 1.01
    return at(best)[0].reshape(layer.weight.shape), s


def gptq_of_llm_compressor(layer: Layer, spec: QuantSpec, act_order: bool = False) -> Redone:
    """Scales of the weights as they came, zero points as in ``after_the_zero``; H made and factorised in float32."""
    module, half = importlib.import_module("labkit.quant.gptq"), 2 ** (spec.bits - 1)

    def factor(H: Tensor, damp: float) -> Tensor:
        H = H + damp * H.diagonal().mean() * torch.eye(len(H))
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)

    def integers(grid: Grid, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        if spec.zero == "none":
            return clamped((x / scale).round(), spec)
        assert zero is not None
        return (x / scale + (zero - half)).clamp(-half, half - 1).round() + half

    stats = stats_of(layer)
    assert stats is not None and layer.inputs is not None
    x = math.sqrt(2) * layer.inputs.float().T
    stats.hessian = x @ x.T
    params = rtn(layer.weight, spec).params
    if spec.zero == "int":
        scale, zero = signed_zero(layer, spec)
        params = Params(scale, zero + half)
    ways = (
        (module, "_inverse_factor", factor),
        (module, "fit", lambda *_: params),
        (Grid, "_integers", integers),
    )
    with ExitStack() as stack:
        for way in ways:
            stack.enter_context(mock.patch.object(*way))
        # labkit subtracts in place, perhaps with one rounding instead of two.
        options: dict[str, Any] = {"update": lambda right, err, row: right - err[:, None] * row}
        q = module.gptq(layer.weight, spec, stats, static_groups=True, act_order=act_order, **options)
    return q.codes, params.dense()[0]


def awq_search(
    layer: Layer, spec: QuantSpec, tried: Iterable[Tensor], q: Callable[[Layer, QuantSpec], Tensor]
) -> Redone:
    """Of the factors tried, those of the least squared error of the outputs, where q rounds; codes by labkit."""
    assert layer.inputs is not None
    x = layer.inputs.float()
    wanted, best, least = x @ layer.weight.T, torch.ones(x.shape[1]), torch.inf
    for s in tried:
        s = s / (s.max() * s.min()).sqrt()
        error = float(
            (x @ (q(Layer("", (layer.weight * s).float()), spec) / s).float().T - wanted).square().mean()
        )
        if error < least:
            best, least = s, error
    return rounded(layer, spec, best).codes, best


def awq_of_torchao(layer: Layer, spec: QuantSpec) -> Redone:
    """Rounded as ``by_reciprocal`` does; alpha is 0, 1/20, ... 19/20."""

    def q(layer: Layer, spec: QuantSpec) -> Tensor:
        codes, scale = by_reciprocal(layer, spec)
        assert scale is not None
        zero = 0
        if spec.zero == "int":
            zero = spread(clamped(-(in_float32(layer, spec)[1] / scale).round(), spec), spec, layer)
        return (codes - zero) * spread(scale, spec, layer)

    assert layer.inputs is not None
    s_X = layer.inputs.float().abs().mean(dim=0)
    return awq_search(layer, spec, [s_X ** (step / 20) for step in range(20)], q)


def awq_with_duo_scaling(layer: Layer, spec: QuantSpec) -> Redone:
    """llm-compressor, as AutoAWQ: s_X^alpha over s_W^(1 - alpha), s_W the mean of |w| over the largest of its group."""
    assert layer.inputs is not None
    s_X, size = layer.inputs.float().abs().mean(dim=0), spec.block[1]  # type: ignore[index]
    groups = layer.weight.abs().unflatten(1, (-1, size))
    s_W = (groups / (groups.amax(dim=2, keepdim=True) + 1e-6)).flatten(1).mean(dim=0, dtype=torch.float64)
    alphas = [step / 19 for step in range(20)]
    tried = [torch.ones_like(s_X), *(s_X**alpha / (s_W ** (1 - alpha) + 1e-4) for alpha in alphas)]
    return awq_search(layer, spec, tried, lambda layer, spec: rtn(layer.weight, spec).dequantize())
