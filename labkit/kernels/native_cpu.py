"""Weights of up to 8 bits on the CPU by our own kernel, which reads the codes and writes no weight out.

Up to 4 bits every format is a table of 16 values, so integers, floats and codebooks take the same path; int5 to int8
are multiplied as they are. Activations stay in float32, and so do all sums; or they are rounded to int8 first, where
the recipe says so, and sums of integers are exact. Either way the output differs from the reference by the rounding
of float32 sums and no more.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from labkit.kernels import build
from labkit.kernels.arena import Arena
from labkit.kernels.inputs import (
    check_input,
    not_of_groups,
    not_on_a_cpu,
    own_tables,
    per_row,
    uneven_act_order,
    width_of,
)
from labkit.quant import Blocks, Grid, QuantizedTensor, QuantSpec

LANES = 16  # output features of a panel, or inputs of a row with its own table
CHUNK = 8  # inputs that are loaded together


class NativeCpu:
    """A weight in panels of 16 output features; ``native/product.h`` says how they are laid out.

    Takes every format of up to 4 bits, and integers of up to 8, on groups of columns that are a multiple of 8 wide
    (the last may be shorter), of 16 where each row has a table of its own; one row or several. Act-order is undone by
    reordering the columns of the weight here, and those of ``x`` in each call. With activations of "int8 g32 narrow
    scale=fp32", or another width, integer weights only.
    """

    backend = "native_cpu"

    @staticmethod
    def why_not(weight: QuantizedTensor, input: QuantSpec | None = None) -> str | None:
        """What keeps this kernel from taking ``weight`` and activations on the grid ``input``, or None where it can."""
        if reason := not_on_a_cpu(weight):
            return reason
        if reason := not_of_groups(weight, LANES if own_tables(weight) else CHUNK):
            return reason
        width = width_of(weight) or weight.shape[1]
        if input is not None and (reason := _why_not_rounded(weight.spec, width, input, weight.shape[1])):
            return reason
        return uneven_act_order(weight, width) or build.why_not()

    def __init__(self, weight: QuantizedTensor, input: QuantSpec | None = None, march: str = "native"):
        self._march, self.shape, self._source, self._input = march, weight.shape, weight, input
        self._settled = False  # whether others may hold addresses of its memory, which it then never leaves
        spec, (out, columns) = weight.spec, weight.shape
        width = width_of(weight) or columns
        self._own = own_tables(weight)
        self._panels = -(-out // LANES)
        self._columns = _whole(columns, CHUNK * LANES if self._own else CHUNK)
        self._width = width if width < columns else self._columns
        self._input_width = 0 if input is None else _whole(Blocks((1, columns), input.block).size[1], CHUNK)
        self._order = None if weight.g_idx is None else torch.argsort(weight.g_idx, stable=True).int()
        codes = weight.codes if self._order is None else weight.codes[:, self._order]
        self._bits = 4 if spec.bits <= 4 else 8
        low, high = spec.code_range
        middle = (low + high + 1) // 2  # the code that becomes 0
        codes = codes.int() - (low if self._bits == 4 else middle if spec.zero != "none" else 0)
        codes = F.pad(codes, (0, self._columns - columns))
        if self._own:
            codes = codes.view(out, -1, CHUNK, LANES).transpose(2, 3)  # (out, chunks, 16, 8)
        else:
            codes = F.pad(codes, (0, 0, 0, self._panels * LANES - out))
            codes = codes.view(self._panels, LANES, -1, CHUNK).transpose(1, 2)  # (panels, chunks, 16, 8)
        if self._bits == 4:
            codes = codes[..., :4] + 16 * codes[..., 4:]
        else:
            codes = codes.unflatten(-1, (2, 4)).transpose(2, 3) & 0xFF  # (panels, chunks, 2, 16, 4)
        self._codes = codes.to(torch.uint8).contiguous()

        scale, zero = weight.params.dense()
        scale = self._by_panel(scale)
        # The kernel's integers are code - middle where there is a zero point: what is left of it is an offset.
        offset = None if zero is None else self._by_panel(middle - zero)
        self._table = torch.zeros(*((out,) if self._own else ()), 16)
        if self._own:
            assert weight.table is not None
            self._table[:, : spec.levels] = weight.table
        elif self._bits == 4:
            values = Grid(spec, weight.table).dequantize(torch.arange(low, high + 1), torch.ones(()), None)
            self._table[: len(values)] = values - (middle if zero is not None else 0)
        parts = [part for part in (scale, offset, self._table if self._own else None) if part is not None]
        self._half = all(torch.equal(part.half().float(), part) for part in parts)
        dtype = torch.float16 if self._half else torch.float32
        self._table = self._table.to(dtype) if self._own else self._table
        self._scale = scale.to(dtype)
        self._offset = None if offset is None else offset.to(dtype)
        self._told = ctypes.byref(self.native())

    def _by_panel(self, part: Tensor) -> Tensor:
        """One for each row and group, (panels, groups, 16) float32, of one for each block; or (out, groups)."""
        rows = per_row(part, self._source).float()
        if self._own:
            return F.pad(rows, (0, -(-self._columns // self._width) - rows.shape[1]))
        rows = F.pad(rows, (0, 0, 0, self._panels * LANES - self.shape[0]))
        return rows.view(self._panels, LANES, -1).transpose(1, 2).contiguous()

    def __reduce__(self) -> tuple[type[NativeCpu], tuple[object, ...]]:
        return NativeCpu, (self._source, self._input, self._march)  # laid out anew where it is read

    @property
    def nbytes(self) -> int:
        parts = (self._codes, self._scale, self._offset, self._order, self._table)
        return sum(part.nbytes for part in parts if part is not None)

    def native(self) -> build.Weight:
        """The weight as the library takes it, without a bias. It keeps alive what it points to."""
        parts = (self._codes, self._table, self._scale, self._offset, None, self._order)
        found = build.Weight(
            self._bits,
            self._half,
            self._own,
            *(None if part is None else part.data_ptr() for part in parts),
            *(*self.shape, self._columns, self._width, self._input_width),
        )
        found.kept = parts
        return found

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        check_input(x, self.shape)
        y = _Product.apply(x, self) if torch.is_grad_enabled() and x.requires_grad else self._product(x)
        return y if bias is None else y + bias.to(y.dtype)

    def _product(self, x: Tensor) -> Tensor:
        # Caches are full of weights: each operator here takes several times as long as where they are not.
        plain = x.dtype == torch.float32 and x.is_contiguous()
        rows, y = x if plain else x.float().contiguous(), torch.empty(*x.shape[:-1], self.shape[0])
        build.library(self._march).labkit_linear(
            self._told, rows.data_ptr(), y.data_ptr(), x.numel() // self.shape[1], torch.get_num_threads()
        )
        return y if x.dtype == torch.float32 else y.to(x.dtype)


_READ = ("_codes", "_table", "_scale", "_offset")  # by each product, in this order


def settle(weights: Iterable[object]) -> None:
    """Put those of ``weights`` that are this kernel's into one stretch of memory, in their order, once for all."""
    found = [weight for weight in weights if isinstance(weight, NativeCpu) and not weight._settled]
    held = [{name: part for name in _READ if (part := getattr(weight, name)) is not None} for weight in found]
    arena = Arena(Arena.nbytes([part for parts in held for part in parts.values()]))
    for weight, parts in zip(found, held, strict=True):
        for name, part in parts.items():
            setattr(weight, name, arena.take(part))
        weight._settled, weight._told = True, ctypes.byref(weight.native())


class _Product(torch.autograd.Function):
    """The product where ``x`` wants a gradient: the weight is written out on the way back only."""

    @staticmethod
    def forward(ctx, x: Tensor, prepared: NativeCpu) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.source = prepared._source
        return prepared._product(x)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        return gradient @ ctx.source.dequantize(gradient.dtype), None


def _why_not_rounded(spec: QuantSpec, width: int, input: QuantSpec, columns: int) -> str | None:
    """Why activations on the grid ``input`` cannot be multiplied as bytes by codes in groups of ``width``."""
    if not spec.is_integer:
        return f"rounded activations are multiplied by integers, found {spec.format}"
    steps = Blocks((1, columns), input.block).size[1]
    if input != QuantSpec(
        "int8", (1, input.block[1] if isinstance(input.block, tuple) else None), scale="fp32", narrow=True
    ):
        return f"it rounds activations to 'int8 g32 narrow scale=fp32' or another width, found {input}"
    if steps % CHUNK and steps < columns:
        return f"activations must share a step by a multiple of {CHUNK}, found {steps}"
    short, long = sorted((steps, width))
    return (
        f"steps of {steps} activations and groups of {width} overlap"
        if long % short and long < columns
        else None
    )


def _whole(columns: int, chunk: int) -> int:
    return -(-columns // chunk) * chunk
