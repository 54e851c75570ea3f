"""LSQ and LSQ+: the step size of a grid is a parameter that learns, and so is its offset.

Esser et al. 2019, arXiv 1902.08153, in its letters: v, s, Q_N, Q_P, N; Bhalgat et al. 2020, arXiv
2004.09576, adds the offset beta. For a weight v of N that share the step s,

    v_hat = round(clip(v / s, -Q_N, Q_P)) s
    d v_hat / d s = round(v / s) - v / s   where -Q_N < v / s < Q_P, else -Q_N or Q_P
    d v_hat / d v = 1                      where -Q_N < v / s < Q_P, else 0

and what s (and beta) gets is multiplied by 1 / sqrt(N Q_P), so that it moves at the pace of the weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from labkit.quant.blocks import Blocks
from labkit.quant.encode import encode, fake_quantize
from labkit.quant.fit import store_scale, store_zero, working
from labkit.quant.grid import Through
from labkit.quant.spec import QuantSpec
from labkit.quant.tensor import Params, QuantizedTensor


def lsq(v: Tensor, spec: QuantSpec, s: Tensor, beta: Tensor | None = None) -> Tensor:
    """``v`` on the grid of ``spec`` with step ``s`` and offset ``beta``, and their gradients as above.

    s     the real-valued steps, in the shape of the scales: (row blocks, column blocks), or (n_blocks,)
    beta  for grids with a zero point, what code 0 stands for, in the unit of ``v`` and the shape of ``s``

    Steps and zero points count as they are stored (fp16, whole numbers), straight through, so the result is
    ``lsq_encode(v, spec, s, beta).dequantize()`` to the last bit. Raises ValueError as ``lsq_start`` does.
    """
    lsq_check(spec)
    blocks = Blocks(tuple(v.shape), spec.block)
    g = 1 / (_counts(blocks).to(s.device) * spec.code_range[1]).sqrt().to(s)
    s = Through.apply(_slower(s, g), _stored_step(s, spec).to(s))
    zero = None
    if spec.zero != "none":
        zero = -_slower(_given(beta, spec), g) / s
        zero = Through.apply(zero, _stored_zero(zero, spec).to(s))
    return fake_quantize(_clip(working(v), spec, blocks, s, zero), spec, Params(s, zero)).to(v.dtype)


def lsq_encode(v: Tensor, spec: QuantSpec, s: Tensor, beta: Tensor | None = None) -> QuantizedTensor:
    """The codes that ``lsq`` gives ``v``, with steps and zero points in their stored dtype."""
    lsq_check(spec)
    step = _stored_step(s.detach(), spec)
    zero = None if spec.zero == "none" else _stored_zero(-_given(beta, spec).detach() / step.to(s), spec)
    return encode(v.detach(), spec, Params(step, zero))


def lsq_start(v: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Where the papers let (s, beta) begin, float32, one per block.

    s = 2 mean abs(v) / sqrt(Q_P) without a zero point (LSQ). With one, the grid spans the mean and three
    standard deviations to both sides (LSQ+ takes that range for its weights). A step of ``fit`` is as
    good a start. Raises ValueError for a format that is no integer and scales quantized themselves.
    """
    lsq_check(spec)
    v = working(v.detach())
    blocks = Blocks(tuple(v.shape), spec.block)
    seen = (1, *blocks.grid) if isinstance(spec.block, int) else blocks.grid
    s, beta = torch.zeros(seen), torch.zeros(seen)
    for where, part in blocks.regions(v):
        shape = s[where].shape
        if spec.zero == "none":
            s[where] = (2 * part.abs().mean(dim=1) / math.sqrt(spec.code_range[1])).reshape(shape)
            continue
        mean, reach = part.mean(dim=1), 3 * part.std(dim=1, correction=0)
        s[where] = (2 * reach / spec.code_range[1]).reshape(shape)
        beta[where] = (mean - reach).reshape(shape)
    return s.reshape(blocks.grid), None if spec.zero == "none" else beta.reshape(blocks.grid)


def lsq_check(spec: QuantSpec) -> None:
    """Raises ValueError for a grid whose step cannot be learned: no integers, or scales quantized again."""
    if not spec.is_integer or isinstance(spec.scale, QuantSpec):
        raise ValueError(
            f"LSQ learns the step of an integer grid whose scales are plain numbers, found {spec}; use a spec "
            "such as 'int2 g64 asym' or 'int4 channel'"
        )


def _clip(v: Tensor, spec: QuantSpec, blocks: Blocks, s: Tensor, zero: Tensor | None) -> Tensor:
    """``v`` moved to the end of the grid's range where it lies on or beyond it.

    ``Grid.round`` rounds first and clips the code, so that a gradient still reaches a v half a step outside,
    as in torch's own fake quantization. The paper clips first. The codes are the same.
    """
    step = blocks.spread(s)
    shift = 0 if zero is None else blocks.spread(zero)
    low, high = (end - shift for end in spec.code_range)
    x = v.reshape(blocks.matrix)
    steps = x / step
    x = torch.where(steps >= high, high * step, torch.where(steps <= low, low * step, x))
    return x.reshape(blocks.shape)


def _counts(blocks: Blocks) -> Tensor:
    """How many elements each block has, in the shape of the scales: the paper's N."""
    (rows, columns), (high, wide) = blocks.matrix, blocks.size
    tall = torch.arange(0, rows, high).neg().add(rows).clamp(max=high)
    broad = torch.arange(0, columns, wide).neg().add(columns).clamp(max=wide)
    return (tall[:, None] * broad).reshape(blocks.grid)


def _stored_step(s: Tensor, spec: QuantSpec) -> Tensor:
    # A step that was driven to 0 or below stays the smallest that its dtype has, and can come back.
    stored = store_scale(s.detach().clamp(min=1e-30), spec)
    assert isinstance(stored, Tensor)
    return stored


def _stored_zero(zero: Tensor, spec: QuantSpec) -> Tensor:
    zero = zero.detach()
    if spec.zero == "int":
        zero = zero.round().clamp(*spec.code_range)
    stored = store_zero(zero, spec)
    assert stored is not None
    return stored


def _given(beta: Tensor | None, spec: QuantSpec) -> Tensor:
    if beta is None:
        raise ValueError(
            f"{spec} has zero points, so LSQ+ needs an offset beta in the shape of s; found none"
        )
    return beta


def _slower(x: Tensor, g: Tensor) -> Tensor:
    """The value of ``x``; its gradient is multiplied by ``g``."""
    x = x.clone()
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient * g)
    return x
