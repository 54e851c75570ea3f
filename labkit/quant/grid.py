"""The arithmetic of a grid, elementwise: numbers to codes, codes to numbers. The only place that rounds."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor

from labkit.quant import formats
from labkit.quant.spec import QuantSpec


class Grid:
    """The codes of ``spec``. Scales and zero points are plain floats that broadcast against the numbers.

    A number is ``(code - zero) * scale`` for integers and ``table[code] * scale`` for the other formats,
    plus ``zero`` where that is the mean. Works in the dtype that the arguments promote to (float32 or
    float64). ``table`` is a learned codebook, (levels,), or (rows, levels): one for each row of the numbers,
    which must then be a matrix.
    """

    def __init__(self, spec: QuantSpec, table: Tensor | None = None):
        self.spec = spec
        self.lowest, self.highest = spec.code_range
        if spec.is_integer:
            self.values = None
        elif spec.format in formats.LEARNED:
            self.values = _checked_table(table, spec)
        else:
            self.values = formats.values_of(spec.format)

    def quantize(self, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """The codes of ``x``, int8 for symmetric integers, else uint8: round half to even, clamp.

        Where the scale is 0 the code is that of the number 0.
        """
        if self.values is None:
            dtype = torch.int8 if self.lowest < 0 else torch.uint8
            return self._integers(x, scale, zero).to(dtype)
        scaled = self._scaled(x, scale, zero)
        if self.spec.format in formats.FLOATS:
            return formats.float_codes(formats.round_to_format(scaled, self.spec.format), self.spec.format)
        return formats.nearest(scaled, self.values.to(scaled)).to(torch.uint8)

    def dequantize(self, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """The numbers that ``codes`` stand for, in the dtype of ``scale``."""
        if self.values is not None:
            numbers = _look_up(self.values.to(scale), codes) * scale
            return numbers + zero if self._centred(zero) else numbers
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
        scaled = self._scaled(x, scale, zero)
        if self.spec.format in formats.FLOATS:
            largest = formats.FLOATS[self.spec.format].largest
            nearest = formats.round_to_format(scaled.detach(), self.spec.format)
            numbers = Through.apply(scaled.clamp(-largest, largest), nearest) * scale
        else:
            table = self.values.to(scaled)
            nearest = _look_up(table, formats.nearest(scaled.detach(), table))
            numbers = Through.apply(scaled.clamp(table[..., :1], table[..., -1:]), nearest) * scale
        return numbers + zero if self._centred(zero) else numbers

    def scale_for(self, lo: Tensor, hi: Tensor) -> Tensor:
        """The scale (float64) whose grid covers ``lo`` to ``hi``, not yet rounded to its stored dtype.

        An affine integer grid is widened to contain 0. A constant block gets the scale that puts the
        constant on the grid. The scale of an all-zero block is 0.

        Scales stored as e8m0 are powers of two by one of three rules. ``e8m0``, of OCP Microscaling:
        2^(floor(log2(absmax)) - floor(log2(largest value))), which clips where absmax / scale exceeds the
        largest value. ``e8m0-even``: the same of an absmax rounded to the format's mantissa, which goes one
        up where the clipping would be worst. ``e8m0-ceil``: 2^ceil(log2(absmax / largest value)), the least
        that clips nothing. (torchao calls them FLOOR, EVEN and RCEIL.) The scale of an all-zero block is
        then 2^-127, and affine grids always take the last rule.
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
        if str(self.spec.scale).startswith("e8m0"):
            return self._power_of_two(absmax, scale)
        if self.spec.scale in ("fp32", "bf16", "fp16"):
            # One code step is then the constant itself: exact as far as the scale's dtype holds it.
            fits = absmax <= torch.finfo(formats.SCALE_DTYPES[self.spec.scale]).max
            scale = torch.where((lo == hi) & fits, absmax, scale)
        return scale

    def zero_for(self, lo: Tensor, scale: Tensor) -> Tensor | None:
        """The zero point (float64) of blocks that start at ``lo``, with their stored scale, or None."""
        if self.spec.zero in ("none", "mean"):  # a mean is that of the whole tensor: fit takes it
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

    def _scaled(self, x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        if self._centred(zero):
            x = x - zero
        if self.spec.format in formats.FLOATS:
            return x / _nonzero(scale)
        return x * (1 / _nonzero(scale))  # as bitsandbytes does it: the same codes to the last bit

    def _centred(self, zero: Tensor | None) -> TypeGuard[Tensor]:
        """Whether ``zero`` is the mean that was taken off. (Other grids of tables and floats ignore it.)"""
        return zero is not None and self.spec.zero == "mean"

    def _power_of_two(self, absmax: Tensor, scale: Tensor) -> Tensor:
        if self.spec.zero in ("int", "float") or self.spec.scale == "e8m0-ceil":
            fraction, exponent = torch.frexp(scale)  # scale = fraction * 2**exponent, 0.5 <= fraction < 1
            exponent = exponent - (fraction == 0.5).int()
        else:
            fraction, exponent = torch.frexp(absmax)
            if self.spec.scale == "e8m0-even":
                fmt = formats.FLOATS.get(self.spec.format)
                mantissa = fmt.mantissa if fmt else self.spec.bits - 2  # int8 is 1.xxxxxx and a sign
                exponent = exponent + (fraction >= 1 - 2.0 ** -(mantissa + 2)).int()
            exponent = exponent - torch.frexp(torch.tensor(formats.largest_of(self.spec.format)))[1]
        return torch.exp2(torch.where(absmax == 0, -127, exponent).double().clamp(-127, 127))


def grid(spec: QuantSpec, table: Tensor | None = None) -> Grid:
    """The grid of ``spec``, for code that quantizes element by element or column by column (GPTQ)."""
    return Grid(spec, table)


class Through(torch.autograd.Function):
    """The value of the second argument, the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _round(x: Tensor) -> Tensor:
    nearest = torch.round(x.detach())
    return Through.apply(x, nearest) if x.requires_grad else nearest


def _nonzero(scale: Tensor) -> Tensor:
    return scale + scale.logical_not()  # 1 where it is 0


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """The entries of ``table`` (levels,), or of each row's own (rows, levels) for ``index`` (rows, columns)."""
    return table[index.int()] if table.dim() == 1 else table.gather(1, index.long())


def _checked_table(table: Tensor | None, spec: QuantSpec) -> Tensor:
    if table is None:
        raise ValueError(
            f"{spec.format} needs its codebook: Params(scale, table={spec.levels} ascending values)"
        )
    fits = table.dim() in (1, 2) and table.shape[-1] == spec.levels
    if not fits or not bool((table[..., 1:] >= table[..., :-1]).all()):
        raise ValueError(
            f"a codebook of {spec.format} must be {spec.levels} ascending values, or a row of them for each "
            f"row of the tensor; found shape {tuple(table.shape)}: {table.flatten()[:16].tolist()}"
        )
    return table
