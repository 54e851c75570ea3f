"""The arithmetic of a grid, elementwise: numbers to codes, codes to numbers. The only place that rounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from labkit.quant import formats
from labkit.quant.spec import QuantSpec


class Grid:
    """The codes of ``spec``. Scales and zero points are plain floats that broadcast against the numbers.

    A number is ``(code - zero) * scale`` for integers and ``table[code] * scale`` for the other formats.
    Works in the dtype that the arguments promote to (float32 or float64). ``table`` is the learned codebook
    of table4.
    """

    def __init__(self, spec: QuantSpec, table: Tensor | None = None):
        self.spec = spec
        self.lowest, self.highest = spec.code_range
        if spec.is_integer:
            self.values = None
        elif spec.format == "table4":
            self.values = _checked_table(table)
        else:
            self.values = formats.values_of(spec.format)

    def quantize(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """The codes of ``x``, int8 for symmetric integers, else uint8: round half to even, clamp.

        Where the scale is 0 the code is that of the number 0.
        """
        if self.values is None:
            dtype = torch.int8 if self.lowest < 0 else torch.uint8
            return self._integers(x, scale, zero).to(dtype)
        scaled = self._scaled(x, scale)
        if self.spec.format in formats.FLOATS:
            return formats.float_codes(formats.round_to_format(scaled, self.spec.format), self.spec.format)
        return formats.nearest(scaled, self.values.to(scaled)).to(torch.uint8)

    def dequantize(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """The numbers that ``codes`` stand for, in the dtype of ``scale``."""
        if self.values is not None:
            return self.values.to(scale)[codes.int()] * scale
        numbers = codes.to(scale.dtype)
        return (numbers if zero is None else numbers - zero) * scale

    def round(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """``dequantize(quantize(x))``, with the straight-through gradient for x, scale and zero.

        Rounding counts as the identity and clamping as what it is, so nothing flows to an ``x`` outside the
        range and ``scale`` gets LSQ's gradient (arXiv 1902.08153).
        """
        if self.values is None:
            numbers = self._integers(x, scale, zero)
            return (numbers if zero is None else numbers - zero) * scale
        scaled = self._scaled(x, scale)
        if self.spec.format in formats.FLOATS:
            largest = formats.FLOATS[self.spec.format].largest
            nearest = formats.round_to_format(scaled.detach(), self.spec.format)
            return _Through.apply(scaled.clamp(-largest, largest), nearest) * scale
        table = self.values.to(scaled)
        nearest = table[formats.nearest(scaled.detach(), table)]
        return _Through.apply(scaled.clamp(table[0], table[-1]), nearest) * scale

    def scale_for(self, lo: Tensor, hi: Tensor) -> Tensor:
        """The scale (float64) whose grid covers ``lo`` to ``hi``, not yet rounded to its stored dtype.

        An affine integer grid is widened to contain 0. A constant block gets the scale that puts the
        constant on the grid. The scale of an all-zero block is 0. Scales stored as e8m0 follow the OCP
        Microscaling rule, 2^(floor(log2(absmax)) - floor(log2(largest value))), and saturate above it.
        """
        lo, hi = lo.double(), hi.double()
        absmax = torch.maximum(lo.abs(), hi.abs())
        if self.spec.zero == "int":
            scale = (hi.clamp(min=0) - lo.clamp(max=0)) / self.highest
        elif self.spec.zero == "float":
            scale = (hi - lo) / self.highest
        elif self.spec.is_integer and not self.spec.narrow:
            scale = absmax / ((2**self.spec.bits - 1) / 2)
        elif self.values is not None:
            scale = absmax / self.values[self.values.isfinite()].abs().max().double()
        else:
            scale = absmax / self.highest
        if self.spec.scale == "e8m0":
            return self._power_of_two(absmax, scale)
        if self.spec.scale in ("fp32", "bf16", "fp16"):
            # One code step is then the constant itself: exact as far as the scale's dtype holds it.
            fits = absmax <= torch.finfo(formats.SCALE_DTYPES[self.spec.scale]).max
            scale = torch.where((lo == hi) & fits, absmax, scale)
        return scale

    def zero_for(self, lo: Tensor, scale: Tensor) -> Tensor | None:
        """The zero point (float64) of blocks that start at ``lo``, with their stored scale, or None."""
        if self.spec.zero == "none":
            return None
        steps = -lo.double() / _nonzero(scale.double())
        return steps if self.spec.zero == "float" else torch.round(steps).clamp(self.lowest, self.highest)

    def _integers(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        steps = x / _nonzero(scale)
        if self.spec.zero == "none":
            steps = _round(steps)
        elif zero is None:
            raise ValueError(f"{self.spec} needs a zero point, found none")
        elif self.spec.zero == "int":
            steps = _round(steps) + zero  # the zero point is a whole number: 0.0 gets exactly this code
        else:
            steps = _round(steps + zero)
        return steps.clamp(self.lowest, self.highest)

    def _scaled(self, x: Tensor, scale: Tensor) -> Tensor:
        if self.spec.format in formats.FLOATS:
            return x / _nonzero(scale)
        return x * (1 / _nonzero(scale))  # as bitsandbytes does it: the same codes to the last bit

    def _power_of_two(self, absmax: Tensor, scale: Tensor) -> Tensor:
        if self.spec.zero == "none":
            largest = torch.tensor(formats.largest_of(self.spec.format))
            exponent = torch.frexp(absmax)[1] - torch.frexp(largest)[1]
        else:  # no rule in the paper: the next power of two up, so that nothing is clipped
            exponent = torch.ceil(torch.log2(scale)).nan_to_num(neginf=-127)
        return torch.exp2(torch.where(absmax == 0, -127, exponent).double().clamp(-127, 127))


def grid(spec: QuantSpec, table: Tensor | None = None) -> Grid:
    """The grid of ``spec``, for code that quantizes element by element or column by column (GPTQ)."""
    return Grid(spec, table)


class _Through(torch.autograd.Function):
    """The value of the second argument, the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _round(x: Tensor) -> Tensor:
    nearest = torch.round(x.detach())
    return _Through.apply(x, nearest) if x.requires_grad else nearest


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _checked_table(table: Tensor | None) -> Tensor:
    if table is None:
        raise ValueError("table4 needs its codebook: Params(scale, table=sixteen ascending values)")
    if table.shape != (16,) or not bool((table[1:] >= table[:-1]).all()):
        raise ValueError(
            f"a codebook must be 16 ascending values, found shape {tuple(table.shape)}: {table.tolist()}"
        )
    return table
