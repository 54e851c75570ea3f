"""Which elements share a scale: a tensor cut into blocks, and block values spread back over the tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from labkit.quant.spec import Block


@dataclass(frozen=True)
class Blocks:
    """How ``block`` cuts a tensor of ``shape``.

    A tensor of any rank is seen as a matrix: leading axes together are the rows, the last is the columns; a
    vector is one row. ``grid`` is the shape of the scales: (row blocks, column blocks), or (n_blocks,) for
    flat runs. The last block of an axis may be smaller.
    """

    shape: tuple[int, ...]
    block: Block

    @cached_property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns); a flat run sees the whole tensor as one row."""
        if isinstance(self.block, int):
            return 1, prod(self.shape)
        columns = self.shape[-1] if self.shape else 1
        return prod(self.shape[:-1]), columns

    @cached_property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of a full block."""
        if isinstance(self.block, int):
            return 1, self.block
        rows, columns = self.matrix
        return min(self.block[0] or max(rows, 1), max(rows, 1)), min(
            self.block[1] or max(columns, 1), max(columns, 1)
        )

    @cached_property
    def grid(self) -> tuple[int, ...]:
        counts = tuple(-(-n // size) for n, size in zip(self.matrix, self.size, strict=True))
        return counts[1:] if isinstance(self.block, int) else counts

    def regions(self, x: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """Every set of blocks of equal size: (where they lie in the grid, (n_blocks, block_size)).

        The grid is seen as a matrix here, one row for flat runs. Full blocks come first, then the smaller
        ones at the right and lower edge.
        """
        x = x.reshape(self.matrix)
        for rows in _runs(self.matrix[0], self.size[0]):
            for columns in _runs(self.matrix[1], self.size[1]):
                (r0, nr, hr), (c0, nc, hc) = rows, columns  # first block, count, height/width of one block
                top, left = r0 * self.size[0], c0 * self.size[1]
                part = x[top : top + nr * hr, left : left + nc * hc]
                blocks = part.reshape(nr, hr, nc, hc).transpose(1, 2).reshape(nr * nc, hr * hc)
                yield (slice(r0, r0 + nr), slice(c0, c0 + nc)), blocks

    def spread(self, values: Tensor, g_idx: Tensor | None = None) -> Tensor:
        """One value per block (shape ``grid``) to one per element, to broadcast against ``matrix``.

        ``g_idx`` (columns,) names the column block of every column, where act-order has scattered them.
        """
        values = values.reshape(1, -1) if isinstance(self.block, int) else values
        if g_idx is not None:
            values = values.index_select(1, g_idx.long())
        elif self.size[1] > 1:
            values = _repeat(values, 1, self.size[1], self.matrix[1])
        if self.size[0] > 1:
            values = _repeat(values, 0, self.size[0], self.matrix[0])
        return values


def _runs(n: int, size: int) -> list[tuple[int, int, int]]:
    """(first block, count, size) for the full blocks of an axis of ``n`` and for the ragged last one."""
    full, rest = divmod(n, size)
    return [run for run in ((0, full, size), (full, 1, rest)) if run[1] and run[2]]


def _repeat(values: Tensor, dim: int, size: int, n: int) -> Tensor:
    if values.shape[dim] == 1:  # one block along this axis: broadcasting does it
        return values
    return torch.repeat_interleave(values, size, dim=dim).narrow(dim, 0, n)
