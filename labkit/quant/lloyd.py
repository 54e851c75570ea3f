"""k-means of plain numbers: Lloyd's iteration, and a start from which it ends close to the optimum.

Lloyd 1957, "Least squares quantization in PCM" (printed in 1982, IEEE Trans. Information Theory 28); Max 1960,
"Quantizing for minimum distortion". Many problems are solved at once: each row of ``x`` (problems, n) is one,
with importances ``weight`` of the same shape, not negative. All arithmetic is float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CELLS = 128  # how finely the start looks: enough for 16 centres to end within 1 % of the optimum


class Sums(NamedTuple):
    """Of each row, sorted: the numbers ``x`` (problems, n), and the sums of w, w x and w x^2 over its first
    0, 1, ... n numbers, (problems, n + 1) each. A sum over neighbours is then one difference.
    """

    x: Tensor
    w: Tensor
    wx: Tensor
    wxx: Tensor


def lloyd(x: Tensor, centres: Tensor, weight: Tensor | None = None, iterations: int = 1000) -> Tensor:
    """Lloyd's iteration from ``centres`` (problems, k), ascending, until no number changes its centre.

    Each number goes to its nearest centre, the lower of two equally near; each centre to the weighted mean
    of its numbers, and one that has none stays. Returns (problems, k), ascending.
    """
    return _lloyd(_sums(x, weight), centres.double(), iterations)


def near_optimal(x: Tensor, k: int, weight: Tensor | None = None) -> Tensor:
    """k centres (problems, k), ascending, whose weighted squared error is close to the least there is.

    Lloyd's iteration ends in a local optimum, often tens of percent off for 16 centres. But the best cells of
    one dimension are intervals, and dynamic programming finds the best intervals exactly (Wang & Song 2011,
    "Ckmeans.1d.dp"). It takes time with the square of n, so it is done for CELLS cells instead of n numbers;
    Lloyd's iteration then moves the borders within the cells.
    """
    sums = _sums(x, weight)
    cells = _cells(sums)
    parts = []
    for rows in torch.arange(len(x), device=x.device).split(64):  # each holds CELLS^2 numbers a problem
        some = Sums(*(part[rows] for part in sums))
        parts.append(_lloyd(some, _best_intervals(some, cells[rows], k), 1000))
    return torch.cat(parts)


def quantiles(x: Tensor, k: int) -> Tensor:
    """The (i + 1/2) / k quantiles of each row, interpolated linearly: (problems, k), ascending."""
    ordered = x.double().sort(dim=1).values
    place = (torch.arange(k, dtype=torch.float64, device=x.device) + 0.5) / k * (x.shape[1] - 1)
    below = place.long()
    above = (below + 1).clamp(max=x.shape[1] - 1)
    return torch.lerp(ordered[:, below], ordered[:, above], place - below)


def _sums(x: Tensor, weight: Tensor | None) -> Sums:
    x = x.double()
    w = torch.ones_like(x) if weight is None else weight.double()
    w = torch.where((w == 0).all(dim=1, keepdim=True), 1, w)  # where nothing is important, everything is
    # Numbers without importance go to the end, out of the way: no sum hears of them.
    largest = x.masked_fill(w == 0, -torch.inf).amax(dim=1, keepdim=True)
    x, order = torch.where(w > 0, x, largest).sort(dim=1, stable=True)
    w = w.gather(1, order)
    return Sums(x, *(torch.nn.functional.pad(part.cumsum(dim=1), (1, 0)) for part in (w, w * x, w * x * x)))


def _lloyd(sums: Sums, centres: Tensor, iterations: int) -> Tensor:
    edges = None
    for _ in range(iterations):
        inner = torch.searchsorted(sums.x, (centres[:, :-1] + centres[:, 1:]) / 2, right=True)
        before, edges = edges, _closed(inner, sums.x.shape[1])
        if before is not None and torch.equal(edges, before):
            break
        centres = _means(sums, edges, centres)
    return centres


def _closed(inner: Tensor, n: int) -> Tensor:
    """Borders between intervals, (problems, k - 1), with the first, 0, and the last, n: (problems, k + 1)."""
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=n)


def _means(sums: Sums, edges: Tensor, otherwise: Tensor) -> Tensor:
    """The mean of each interval (problems, k); where it holds no weight, ``otherwise``."""
    w, wx = (part.gather(1, edges).diff(dim=1) for part in (sums.w, sums.wx))
    n = sums.x.shape[1]
    lowest = sums.x.gather(1, edges[:, :-1].clamp(max=n - 1))
    highest = sums.x.gather(1, (edges[:, 1:] - 1).clamp(min=0))
    # Clamped, because a difference of sums may lose the whole of some very small weights.
    return torch.where(w > 0, (wx / w).clamp(lowest, highest), otherwise)


def _cells(sums: Sums) -> Tensor:
    """Borders of CELLS cells, or of one for each number where there are fewer: (problems, cells + 1).

    The best k intervals, k large, hold equal parts of the integral of density^(1/3) (Panter & Dite 1951).
    Between two neighbours the density is weight / gap, so their part is weight^(1/3) gap^(2/3).
    """
    problems, n = sums.x.shape
    if n <= CELLS:
        return torch.arange(n + 1, device=sums.x.device).expand(problems, -1)
    w = sums.w.diff(dim=1)
    parts = ((w[:, :-1] + w[:, 1:]) / 2) ** (1 / 3) * sums.x.diff(dim=1) ** (2 / 3)
    # A wide gap, before an outlier, is one border at most: of more, all but one would be of empty cells.
    parts = parts.minimum(parts.sum(dim=1, keepdim=True) / CELLS)
    upto = torch.nn.functional.pad(parts.cumsum(dim=1), (1, 0))  # (problems, n)
    inner = upto[:, -1:] * torch.arange(1, CELLS, device=upto.device) / CELLS
    return _closed(torch.searchsorted(upto, inner), n)


def _best_intervals(sums: Sums, cells: Tensor, k: int) -> Tensor:
    """The centres (problems, k) of the k runs of neighbouring cells with the least squared error."""
    w, wx, wxx = (part.gather(1, cells) for part in (sums.w, sums.wx, sums.wxx))  # (problems, cells + 1)
    mass, moment, square = (part[:, None, :] - part[:, :, None] for part in (w, wx, wxx))
    # Of the run from border i to border j: its sum of w (x - mean)^2.
    error = (square - torch.where(mass > 0, moment**2 / mass, 0)).clamp(min=0)
    error = error.masked_fill(torch.ones_like(error[0]).tril(-1).bool(), torch.inf)
    least, last = error[:, 0], []  # of the cells up to border j, in one run
    for _ in range(k - 1):
        least, start = (least[:, :, None] + error).min(dim=1)  # in one run more, whose start is remembered
        last.append(start)
    ends = [torch.full_like(cells[:, :1], cells.shape[1] - 1)]
    for start in reversed(last):
        ends.append(start.gather(1, ends[-1]))
    ends.append(torch.zeros_like(ends[0]))
    edges = cells.gather(1, torch.cat(ends[::-1], dim=1))
    first = sums.x.gather(1, edges[:, :-1].clamp(max=sums.x.shape[1] - 1))
    return _means(sums, edges, first)
