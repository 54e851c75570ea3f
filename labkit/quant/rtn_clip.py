"""Round to nearest in the range that changes the layer's output least: AWQ's clip search.

Lin et al. 2023, arXiv 2306.00978; the scale search, AWQ's other half, is a transform of the whole model.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from labkit.quant.encode import encode
from labkit.quant.fit import check_finite, check_has_values, fit, working
from labkit.quant.grid import Grid
from labkit.quant.observers import search
from labkit.quant.spec import QuantSpec
from labkit.quant.stats import Stats, hessian_of
from labkit.quant.tensor import Params, QuantizedTensor


def rtn_clip(
    weight: Tensor, spec: QuantSpec, stats: Stats | None = None, *, steps: int = 20, smallest: float = 0.5
) -> QuantizedTensor:
    """``weight`` (out_features, in_features), each group clipped to the range that serves its inputs best.

    For each row's group of columns g, weights w and Hessian block H_gg, the ranges tried are w clipped to
    [-a, a] with a = r max abs(w), r = 1, 1 - 1 / steps, ... down to above ``smallest``; the one with the
    least ``(Q(w) - w) H_gg (Q(w) - w)^T`` is taken, the widest where two tie. That is the mean squared error
    of what the group adds to the output, other groups left out.

    stats  its ``hessian`` (in_features, in_features), of the layer's inputs

    Raises ValueError for a spec whose blocks are not runs within a row or whose scales are quantized
    themselves, and for shapes that do not fit.
    """
    check(spec, steps, smallest)
    check_finite(weight)
    W = working(weight.detach())
    H = hessian_of(stats, W, "rtn_clip").to(W)
    if W.numel() == 0:
        return encode(W, spec, fit(W, spec))
    ratios = [1 - step / steps for step in range(steps) if step < (1 - smallest) * steps]
    assert not isinstance(spec.block, int)  # check() saw to it
    group = spec.block[1] or W.shape[1]
    parts: list[Params] = []
    for start in range(0, W.shape[1], group):
        g = slice(start, start + group)
        parts.append(fit(W[:, g], spec, partial(_least_output_error, H_gg=H[g, g], ratios=ratios)))
    return encode(W, spec, Params.side_by_side(parts))


def check(spec: QuantSpec, steps: int = 20, smallest: float = 0.5) -> None:
    """Raises ValueError for a spec or option that ``rtn_clip`` cannot do."""
    check_has_values(spec)
    if isinstance(spec.block, int) or spec.block[0] != 1 or isinstance(spec.scale, QuantSpec):
        raise ValueError(
            f"rtn_clip needs groups within a row and plain scales, such as int4 g64 asym; found {spec}"
        )
    if steps < 1 or not 0 <= smallest < 1:
        raise ValueError(f"rtn_clip: expected steps >= 1 and 0 <= smallest < 1, found {steps}, {smallest}")


rtn_clip.needs = frozenset({"hessian"})  # type: ignore[attr-defined]
rtn_clip.paper = "Lin et al. 2023, arXiv 2306.00978"  # type: ignore[attr-defined]
rtn_clip.check = check  # type: ignore[attr-defined]


def _least_output_error(
    blocks: Tensor, spec: QuantSpec, weight: Tensor | None = None, *, H_gg: Tensor, ratios: list[float]
) -> tuple[Tensor, Tensor]:
    """An observer of one group of columns, blocks (out, group)."""
    grid = Grid(spec)

    def output_error(lo: Tensor, hi: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        D = grid.round(blocks, scale, zero) - blocks  # (out, group)
        return ((D @ H_gg) * D).sum(dim=1, dtype=torch.float64)

    return search(blocks.amin(dim=1), blocks.amax(dim=1), spec, output_error, ratios)
