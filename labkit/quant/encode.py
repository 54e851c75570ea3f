"""encode and fake_quantize: a tensor onto its grid."""

from __future__ import annotations

from torch import Tensor

from labkit.quant.blocks import Blocks
from labkit.quant.fit import check_finite, store_scale, store_zero, working
from labkit.quant.grid import Grid
from labkit.quant.spec import QuantSpec
from labkit.quant.tensor import Params, QuantizedTensor


def encode(x: Tensor, spec: QuantSpec, params: Params) -> QuantizedTensor:
    """The codes of ``x`` on the grid of ``spec`` and ``params``.

    The scales are rounded to their stored dtype first, so that the codes are the best ones for the scales
    that will be used. Raises ValueError for NaN or infinity and for scales of another shape than the
    blocks'.
    """
    check_finite(x)
    x = working(x)
    blocks = Blocks(tuple(x.shape), spec.block)
    params = stored(params, spec)
    _check_shapes(params, blocks, spec)
    scale, zero = params.dense(x.dtype)
    zero = None if zero is None else blocks.spread(zero)
    codes = Grid(spec, params.table).quantize(x.reshape(blocks.matrix), blocks.spread(scale), zero)
    return QuantizedTensor(codes.reshape(x.shape), params.scale, spec, params.zero, params.table)


def fake_quantize(x: Tensor, spec: QuantSpec, params: Params) -> Tensor:
    """``x`` rounded to the grid and back, same shape and dtype, with the straight-through gradient.

    The gradient of ``x`` is that of the output where ``x`` lies on the grid's range, and 0 where it is
    clipped. A plain ``params.scale`` that requires a gradient gets LSQ's. ``params`` are used as they are,
    not rounded: those of ``fit`` give exactly ``encode(x, spec, params).dequantize()``.
    """
    blocks = Blocks(tuple(x.shape), spec.block)
    _check_shapes(params, blocks, spec)
    work = working(x)
    scale, zero = params.dense(work.dtype)
    zero = None if zero is None else blocks.spread(zero)
    grid = Grid(spec, params.table)
    return grid.round(work.reshape(blocks.matrix), blocks.spread(scale), zero).reshape(x.shape).to(x.dtype)


def stored(params: Params, spec: QuantSpec) -> Params:
    """``params`` with scale and zero point as ``spec`` stores them; those of ``fit`` stay as they are."""
    scale = params.scale
    if isinstance(scale, Tensor):
        scale = store_scale(scale, spec)
    zero = params.zero
    if zero is not None and spec.zero == "int" and not bool((zero == zero.round()).all()):
        raise ValueError(f"{spec} needs whole-numbered zero points, found {zero.flatten()[:4].tolist()}...")
    return Params(scale, store_zero(zero, spec), params.table)


def _check_shapes(params: Params, blocks: Blocks, spec: QuantSpec) -> None:
    if tuple(params.scale.shape) != blocks.grid:
        raise ValueError(
            f"{spec} of a tensor {blocks.shape} needs scales of shape {blocks.grid}, "
            f"found {tuple(params.scale.shape)}"
        )
    if (params.zero is None) != (spec.zero == "none"):
        wanted = "no zero points" if spec.zero == "none" else "zero points"
        raise ValueError(f"{spec} takes {wanted}, found {'none' if params.zero is None else 'some'}")
    zeros = (1,) if spec.zero == "mean" else blocks.grid
    if params.zero is not None and tuple(params.zero.shape) != zeros:
        raise ValueError(f"zero points of {spec} must have shape {zeros}, found {tuple(params.zero.shape)}")
    if params.table is not None and params.table.dim() == 2 and len(params.table) != blocks.matrix[0]:
        raise ValueError(
            f"codebooks by row must be as many as {spec} of a tensor {blocks.shape} has rows, "
            f"{blocks.matrix[0]}; found {len(params.table)}"
        )
