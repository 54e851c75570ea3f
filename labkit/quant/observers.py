"""Observers: which range of values a block's grid shall cover.

A wide range rounds coarsely, a narrow one clips. ``minmax`` never clips; each of the others makes some
criterion small. ``functools.partial(percentile, keep=99.0)`` is an observer with another setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from labkit.quant.grid import Grid
from labkit.quant.spec import QuantSpec

# What a search tries: the whole range first, then ever smaller parts of it.
RATIOS = tuple(percent / 100 for percent in range(100, 0, -1))


class Observer(Protocol):
    """Chooses the range of each block.

    ``blocks`` is (n_blocks, block_size), float32 or float64, finite and not empty: a ragged last group
    comes in a call of its own, with its own block size, so there is no padding to look out for.
    ``weight`` is the importance of each element, same shape, or None. Returns ``lo`` and ``hi``, each
    (n_blocks,).
    """

    def __call__(
        self, blocks: Tensor, spec: QuantSpec, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


def minmax(blocks: Tensor, spec: QuantSpec, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The smallest and the largest element: nothing is clipped. Takes no importance weight."""
    _no_weight(weight, "minmax")
    return blocks.amin(dim=1), blocks.amax(dim=1)


def percentile(
    blocks: Tensor, spec: QuantSpec, weight: Tensor | None = None, *, keep: float = 99.9
) -> tuple[Tensor, Tensor]:
    """The range that leaves out the outermost elements.

    Symmetric grids: x clipped to [-a, a], where a is the ``keep``-th percentile of abs(x) (as in NVIDIA's
    calibrator, Wu et al. 2020, arXiv 2004.09602). Affine grids: the (100 - keep)-th to the
    keep-th percentile of x. Between two elements it interpolates linearly. Takes no importance weight.
    """
    _no_weight(weight, "percentile")
    if spec.zero == "none":
        a = _quantile(blocks.abs(), keep / 100)
        return _clip(blocks.amin(dim=1), a), _clip(blocks.amax(dim=1), a)
    return _quantile(blocks, 1 - keep / 100), _quantile(blocks, keep / 100)


def mse(blocks: Tensor, spec: QuantSpec, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The range with the least squared error, ``sum weight (x - q(x))^2`` over a block.

    q rounds to the grid of ``spec``, with its scale and zero point as they are stored. The ranges tried
    are those of x clipped to [-a, a], where a is r max abs(x) with r in RATIOS; none of them is better,
    and the widest wins a tie. AWQ's clip search is of this kind (Lin et al. 2023, arXiv 2306.00978);
    Banner et al. 2018 (arXiv 1810.05723) solve the problem in closed form for Gaussian and Laplace
    densities.
    """
    spec, grid = _plain(spec), Grid(spec)

    def squared_error(lo: Tensor, hi: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        error = (blocks - grid.round(blocks, scale, zero)).square()
        return (error if weight is None else error * weight).sum(dim=1, dtype=torch.float64)

    return search(blocks.amin(dim=1), blocks.amax(dim=1), spec, squared_error)


def entropy(
    blocks: Tensor, spec: QuantSpec, weight: Tensor | None = None, *, bins: int = 2048
) -> tuple[Tensor, Tensor]:
    """The range that loses the least information of a histogram: TensorRT's calibration (Migacz, GTC 2017).

    The criterion is ``KL(P || Q) = sum P log(P / Q)`` over ``bins`` equal bins: of abs(x) from 0 to its
    maximum on symmetric grids, of x from its minimum to its maximum on affine ones. P is the histogram
    inside the range; what lies outside is added to the outermost bin inside. Q is made of the histogram
    inside alone: the bins that round to one code share its mass equally, those where P is 0 left out.
    Both are normalised. Elements that are 0 are not counted: they have a code of their own in any
    range, and after a ReLU they would drown the rest.

    The ranges tried are those of ``mse`` that hold at least as many bins as codes; none of them has a
    smaller KL, and the widest wins a tie. ``weight`` counts in the histogram. Meant for blocks of
    thousands of elements, such as activations per tensor; a histogram of a group of 64 says little.
    """
    weights = torch.ones_like(blocks) if weight is None else weight
    parts = zip(blocks.split(256), weights.split(256), strict=True)  # each block holds arrays of ``bins``
    ranges = [_entropy(part, _plain(spec), importance, bins) for part, importance in parts]
    return torch.cat([lo for lo, _ in ranges]), torch.cat([hi for _, hi in ranges])


OBSERVERS: dict[str, Observer] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}


def _entropy(blocks: Tensor, spec: QuantSpec, weight: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    folded = spec.zero == "none"
    x = blocks.abs() if folded else blocks
    low, high = x.amin(dim=1), x.amax(dim=1)
    low = torch.zeros_like(low) if folded else low
    width = torch.where(high > low, (high - low) / bins, 1)[:, None]
    index = ((x - low[:, None]) / width).long().clamp_(max=bins - 1)
    counted = weight * (x != 0)
    histogram = counted.new_zeros(len(x), bins).scatter_add_(1, index, counted).double()  # (n_blocks, bins)
    centres = low[:, None] + width * (torch.arange(bins, device=x.device) + 0.5)
    grid, codes = Grid(spec), 2**spec.bits

    def divergence(lo: Tensor, hi: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        below, above = centres < lo[:, None], centres > hi[:, None]
        first, last = below.sum(dim=1, keepdim=True), bins - 1 - above.sum(dim=1, keepdim=True)
        inside = histogram.masked_fill(below | above, 0)
        p = inside.clone()
        p.scatter_add_(1, first.clamp(max=bins - 1), (histogram * below).sum(dim=1, keepdim=True))
        p.scatter_add_(1, last.clamp(min=0), (histogram * above).sum(dim=1, keepdim=True))
        code = grid.quantize(centres, scale, zero).long() - grid.lowest  # (n_blocks, bins)
        mass = inside.new_zeros(len(x), codes).scatter_add_(1, code, inside)
        sharers = inside.new_zeros(len(x), codes).scatter_add_(1, code, (p > 0).double())
        q = torch.where(p > 0, (mass / sharers).gather(1, code), 0)
        p, q = p / p.sum(dim=1, keepdim=True), q / q.sum(dim=1, keepdim=True)
        kl = torch.where(p > 0, p * (p / q).log(), 0).sum(dim=1)
        enough = (last - first + 1)[:, 0] >= (codes // 2 if folded else codes)
        return torch.where(enough, kl, torch.inf)

    lo, hi = search(low, high, spec, divergence)
    return (_clip(blocks.amin(dim=1), hi), _clip(blocks.amax(dim=1), hi)) if folded else (lo, hi)


def search(
    lo: Tensor,
    hi: Tensor,
    spec: QuantSpec,
    cost: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    ratios: Iterable[float] = RATIOS,
) -> tuple[Tensor, Tensor]:
    """Of (lo, hi) clipped to [-a, a], each block's range with the least ``cost(lo, hi, scale, zero)``, where
    a is a ratio of the largest magnitude.
    """
    from labkit.quant.fit import params_for  # fit calls observers

    absmax = torch.maximum(lo.abs(), hi.abs())
    least = torch.full(lo.shape, torch.inf, dtype=torch.float64, device=lo.device)
    best_lo, best_hi = lo, hi
    for ratio in ratios:
        a = ratio * absmax
        low, high = _clip(lo, a), _clip(hi, a)
        scale, zero = params_for(low, high, spec).dense(lo.dtype)
        zero = torch.zeros_like(scale) if zero is None else zero
        found = cost(low, high, scale[:, None], zero[:, None])
        better = found < least
        least = torch.where(better, found, least)
        best_lo, best_hi = torch.where(better, low, best_lo), torch.where(better, high, best_hi)
    return best_lo, best_hi


def _clip(x: Tensor, a: Tensor) -> Tensor:
    return torch.clamp(x, -a, a)


def _quantile(x: Tensor, q: float) -> Tensor:
    """Each row's q-quantile, interpolated linearly; torch.quantile refuses above 16 million elements."""
    place = q * (x.shape[1] - 1)
    ordered = x.sort(dim=1).values
    below = ordered[:, int(place)]
    return torch.lerp(below, ordered[:, min(int(place) + 1, x.shape[1] - 1)], place - int(place))


def _plain(spec: QuantSpec) -> QuantSpec:
    """Scales that are quantized themselves depend on all blocks: a search over one leaves that out."""
    return replace(spec, scale="fp32") if isinstance(spec.scale, QuantSpec) else spec


def _no_weight(weight: Tensor | None, name: str) -> None:
    if weight is not None:
        raise ValueError(f"the observer {name!r} takes no importance weight; use 'mse' or 'entropy'")
