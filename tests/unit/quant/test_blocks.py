"""Blocks: where every scale goes, for whole and ragged blocks, and transposed ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labkit.quant import Blocks, QuantSpec, encode, fit

SIZES = st.none() | st.integers(1, 9)


def owner(
    row: int, column: int, rows: int, columns: int, block: tuple[int | None, int | None] | int
) -> tuple:
    """The index of the scale of one element."""
    if isinstance(block, int):
        return ((row * columns + column) // block,)
    return row // (block[0] or rows), column // (block[1] or columns)


@settings(max_examples=150)
@given(st.integers(1, 12), st.integers(1, 12), st.tuples(SIZES, SIZES) | st.integers(1, 30))
def test_every_element_belongs_to_the_block_it_lies_in(rows: int, columns: int, block: object) -> None:
    blocks = Blocks((rows, columns), block)
    owners = [[owner(r, c, rows, columns, block) for c in range(columns)] for r in range(rows)]
    assert blocks.grid == tuple(i + 1 for i in owners[-1][-1])
    numbered = torch.arange(torch.Size(blocks.grid).numel()).reshape(blocks.grid)
    spread = blocks.spread(numbered).expand(blocks.matrix).reshape(rows, columns)
    assert spread.tolist() == [[numbered[index].item() for index in line] for line in owners]
    # Regions hold the same elements: each block of a region has one owner, and all of its elements.
    seen = {}
    for where, parts in blocks.regions(spread):
        indices = numbered.reshape(1, -1)[where] if isinstance(block, int) else numbered[where]
        for index, part in zip(indices.flatten().tolist(), parts, strict=True):
            assert set(part.tolist()) == {index} and index not in seen
            seen[index] = len(part)
    assert sum(seen.values()) == rows * columns and len(seen) == numbered.numel()


def test_groups_lie_along_rows_not_columns() -> None:
    x = torch.tensor([[1.0, 2.0, 30.0, 40.0], [5.0, 6.0, 70.0, 80.0]])
    along_rows = fit(x, QuantSpec("int8", (1, 2), scale="fp32", narrow=True)).scale
    assert (along_rows * 127).round().tolist() == [[2.0, 40.0], [6.0, 80.0]]
    along_columns = fit(x, QuantSpec("int8", (2, 1), scale="fp32", narrow=True)).scale
    assert (along_columns * 127).round().tolist() == [[5.0, 6.0, 70.0, 80.0]]


def test_flat_runs_cross_rows() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert (fit(x, QuantSpec("nf4", 4, scale="fp32")).scale).tolist() == [4.0, 6.0]


def test_a_vector_is_one_row_and_leading_axes_are_rows() -> None:
    spec = QuantSpec("int8", (1, None), scale="fp32")
    x = torch.randn(2, 3, 5)
    q = encode(x, spec, fit(x, spec))
    assert q.shape == (2, 3, 5) and q.scale.shape == (6, 1)
    for i in range(2):
        for j in range(3):
            alone = encode(x[i, j], spec, fit(x[i, j], spec))
            assert torch.equal(alone.codes, q.codes[i, j]) and alone.scale.shape == (1, 1)


@pytest.mark.parametrize("block", [(1, 4), (None, None), 4])
def test_g_idx_and_observers_see_no_padding(block: object) -> None:
    sizes = []

    def note(
        blocks: torch.Tensor, spec: QuantSpec, weight: object = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(tuple(blocks.shape))
        return blocks.amin(1), blocks.amax(1)

    fit(torch.ones(2, 6), QuantSpec("int4", block), observer=note)
    assert sizes == {(1, 4): [(2, 4), (2, 2)], (None, None): [(1, 12)], 4: [(3, 4)]}[block]
