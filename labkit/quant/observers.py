"""Observers: which range of values a block's grid shall cover."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from labkit.quant.spec import QuantSpec


class Observer(Protocol):
    """Chooses the range of each block.

    ``blocks`` is (n_blocks, block_size), float32 or float64, finite and not empty: a ragged last group comes in a call
    of its own, with its own block size, so there is no padding to look out for. ``weight`` is the importance of each
    element, same shape, or None. Returns ``lo`` and ``hi``, each (n_blocks,).
    """

    def __call__(
        self, blocks: Tensor, spec: QuantSpec, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


def minmax(blocks: Tensor, spec: QuantSpec, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The smallest and the largest element: nothing is clipped."""
    return blocks.amin(dim=1), blocks.amax(dim=1)


OBSERVERS: dict[str, Observer] = {"minmax": minmax}
