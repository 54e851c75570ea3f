"""Weights of up to 8 bits on the CPU by our own kernel, which reads the codes and sums in float32.

Up to 4 bits every format is a table of 16 values, so integers, floats and codebooks take the same path; int5 to int8
are multiplied as they are. The output differs from the reference by the rounding of float32 sums and no more.
"""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.kernels import build
from labkit.kernels.inputs import check_input, not_on_a_cpu, uneven_act_order
from labkit.quant import Blocks, Grid, QuantizedTensor

LANES = 16  # output features of a panel
CHUNK = 8  # inputs that are loaded together


class NativeCpu:
    """A weight in panels of 16 output features; ``native/product.h`` says how they are laid out.

    Takes every format of up to 4 bits whose table is one for all rows, and integers of up to 8, on groups of
    columns that are a multiple of 8 wide (the last may be shorter), one row or several. Act-order is undone by
    reordering the columns of the weight here, and those of ``x`` in each call.
    """

    backend = "native_cpu"

    @staticmethod
    def why_not(weight: QuantizedTensor) -> str | None:
        """What keeps this kernel from taking ``weight``, or None where it can."""
        spec = weight.spec
        if reason := not_on_a_cpu(weight):
            return reason
        if spec.bits > 4 and not spec.is_integer:
            return f"above 4 bits the kernel is for integers, found {spec.format}"
        if spec.zero == "mean":
            return "it does not know the mean that was taken off"
        if weight.table is not None and weight.table.dim() != 1:
            return "each row has a table of its own"
        width = _width(weight)
        if width is None:
            return f"runs of {spec.block} cross rows of {weight.shape[1]}; use groups"
        if width % CHUNK and width < weight.shape[1]:
            return f"groups must be a multiple of {CHUNK}, found {width}"
        return uneven_act_order(weight, width) or build.why_not()

    def __init__(self, weight: QuantizedTensor, march: str = "native"):
        self._march, self.shape, self._source = march, weight.shape, weight
        spec, (out, columns) = weight.spec, weight.shape
        width = _width(weight) or columns
        self._width = -(-min(width, columns) // CHUNK) * CHUNK
        self._order = None if weight.g_idx is None else torch.argsort(weight.g_idx, stable=True).int()
        codes = weight.codes if self._order is None else weight.codes[:, self._order]
        self._bits = 4 if spec.bits <= 4 else 8
        low, high = spec.code_range
        middle = (low + high + 1) // 2  # the code that becomes 0
        codes = codes.int() - (low if self._bits == 4 else middle if spec.zero != "none" else 0)
        self._panels, self._columns = -(-out // LANES), -(-columns // CHUNK) * CHUNK
        codes = F.pad(codes, (0, self._columns - columns, 0, self._panels * LANES - out))
        codes = codes.view(self._panels, LANES, -1, CHUNK)  # (panels, 16, chunks, 8)
        if self._bits == 4:
            codes = codes.permute(0, 2, 1, 3)  # (panels, chunks, 16, 8)
            codes = codes[..., 0::2] + 16 * codes[..., 1::2]
        else:
            codes = codes.permute(0, 2, 3, 1) & 0xFF  # (panels, chunks, 8, 16)
        self._codes = codes.to(torch.uint8).contiguous()

        scale, zero = weight.params.dense()
        blocks = Blocks(tuple(weight.shape), spec.block)
        scale = self._by_panel(scale, blocks)
        # The kernel's integers are code - middle where there is a zero point: what is left of it is an offset.
        offset = None if zero is None else self._by_panel(middle - zero, blocks)
        self._table = torch.zeros(16)
        if self._bits == 4:
            values = Grid(spec, weight.table).dequantize(torch.arange(low, high + 1), torch.ones(()), None)
            self._table[: len(values)] = values - (middle if zero is not None else 0)
        parts = [part for part in (scale, offset) if part is not None]
        self._half = all(torch.equal(part.half().float(), part) for part in parts)
        dtype = torch.float16 if self._half else torch.float32
        self._scale = scale.to(dtype)
        self._offset = None if offset is None else offset.to(dtype)

    def _by_panel(self, part: Tensor, blocks: Blocks) -> Tensor:
        """One for each row and group, (panels, groups, 16) float32, of one for each block."""
        out = self.shape[0]
        rows = (
            part.reshape(out, -1)
            if part.dim() == 1
            else part.repeat_interleave(blocks.size[0], dim=0)[:out]
        )
        rows = F.pad(rows.float(), (0, 0, 0, self._panels * LANES - out))  # (panels * 16, groups)
        return rows.view(self._panels, LANES, -1).transpose(1, 2).contiguous()

    @property
    def nbytes(self) -> int:
        parts = (self._codes, self._scale, self._offset, self._order, self._table)
        return sum(part.nbytes for part in parts if part is not None)

    def native(self) -> build.Weight:
        """The weight as the library takes it, without a bias, for as long as this object lives."""
        parts = (self._codes, self._table, self._scale, self._offset, None, self._order)
        return build.Weight(
            self._bits,
            self._half,
            *(None if part is None else part.data_ptr() for part in parts),
            *(*self.shape, self._columns, self._width),
        )

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        check_input(x, self.shape)
        y = _Product.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else self._product(x)
        return y if bias is None else y + bias.to(y.dtype)

    def _product(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.shape[1]).float().contiguous()
        y = torch.empty(len(rows), self.shape[0])
        build.library(self._march).labkit_linear(
            ctypes.byref(self.native()), rows.data_ptr(), y.data_ptr(), len(rows), torch.get_num_threads()
        )
        return y.to(x.dtype).reshape(*x.shape[:-1], self.shape[0])


class _Product(torch.autograd.Function):
    """The product where ``x`` wants a gradient: the weight is written out on the way back only."""

    @staticmethod
    def forward(ctx, x: Tensor, prepared: NativeCpu) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.source = prepared._source
        return prepared._product(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        return gradient @ ctx.source.dequantize(gradient.dtype), None


def _width(weight: QuantizedTensor) -> int | None:
    """Columns of a group; None where a flat run is not a part of one row."""
    if isinstance(weight.spec.block, int):
        return weight.spec.block if weight.shape[1] % weight.spec.block == 0 else None
    return Blocks(tuple(weight.shape), weight.spec.block).size[1]
