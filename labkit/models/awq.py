"""AWQ's scales: make the weights that meet large inputs larger before they are rounded.

Lin et al. 2023, arXiv 2306.00978, section 3.2, in its letters: s is a factor per input channel, s_X the mean
magnitude of that channel's inputs, alpha how far s follows it. The other half of AWQ, the clip search, is
the method ``rtn_clip``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from labkit.models.calibrate import Inputs, ModelStats, shared_copy, walk
from labkit.models.fold import Site, fold, sites
from labkit.models.llama import Linear, Llama
from labkit.quant import QuantSpec, rtn


@torch.no_grad()
def awq_scale(model: Llama, stats: ModelStats | None = None, *, steps: int = 20) -> Llama:
    """Fold into each site the factor 1 / s that makes its readers round best; returns the same model.

    Equation 5: ``s = s_X^alpha``, and alpha out of 0, 1 / steps, ..., 1 is the one with the least
    ``sum over the readers of |Q(W diag(s)) diag(s)^-1 X - W X|^2``, where Q rounds to nearest on the grid
    that ``stats`` names for the reader; the smallest alpha wins a tie. Readers that are not quantized do
    not count, and a site without quantized readers stays as it is.

    stats  the calibration text and the grids. The inputs X are those of the unquantized model: scales do
           not change its function, so each layer's can be searched on its own, and memory holds one
           layer's inputs

    The up projection's site is left out where an online transform stands before down. Where query heads
    share a KV head, so do their channels of v and o: s_X is their mean. Raises ValueError without stats.
    """
    if stats is None:
        raise ValueError("awq_scale needs stats: ModelStats(calibration tokens, grids by layer)")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"awq_scale: steps must be a positive whole number, found {steps!r}")
    names = {id(linear): name for name, linear in model.linears().items()}
    by_reader: dict[str, tuple[Site, dict[str, Linear]]] = {}  # by the first reader that is quantized
    for site in sites(model).values():
        readers = {names[id(linear)]: linear for linear in site.consumers}
        if quantized := {name: linear for name, linear in readers.items() if name in stats.grids}:
            by_reader[next(iter(quantized))] = site, quantized

    def visit(name: str, linear: Linear, inputs: Inputs) -> None:
        site, readers = by_reader[name]
        weights = [(_dense(n, layer), stats.grids[n]) for n, layer in readers.items()]
        fold(site, 1 / search_scale(weights, inputs.x, site, steps=steps))

    # The walk runs a copy: a fold into the model itself would reach the norm too late for this text.
    walk(shared_copy(model), stats.tokens, visit, by_reader, progress=stats.progress, what="awq_scale")
    return model


def search_scale(
    readers: list[tuple[Tensor, QuantSpec]], x: Tensor, site: Site, *, steps: int = 20
) -> Tensor:
    """The best s, one positive factor per producer channel of ``site``, (channels,).

    readers: weight (out, in) and grid of each; x: their common input (..., in).
    """
    x = x.reshape(-1, x.shape[-1]).float()
    H = x.T @ x / len(x)  # (in, in)
    s_X = _per_channel(site, x.abs().mean(dim=0))
    s_X = s_X.clamp(min=1e-4 * float(s_X.max()))  # a channel that is silent on this text is not erased
    best, least = torch.ones_like(s_X), torch.inf
    if not float(s_X.max()) > 0:
        return best
    for step in range(steps + 1):
        s = s_X ** (step / steps)
        s = s / (s.max() * s.min()).sqrt()  # only ratios matter: keep the scales within their dtype
        spread = site.spread(s)  # (in,)
        error = 0.0
        for W, spec in readers:
            D = rtn(W * spread, spec).dequantize() / spread - W  # (out, in)
            error += float(((D @ H) * D).sum(dtype=torch.float64))
        if error < least:
            best, least = s, error
    return best


def _per_channel(site: Site, columns: Tensor) -> Tensor:
    """From a number per consumer column, (in_features,), to the mean per producer channel, (channels,)."""
    return columns.view(-1, site.repeat, site.head_dim).mean(dim=1).flatten()


def _dense(name: str, linear: Linear) -> Tensor:
    if not isinstance(linear.weight, Tensor):
        raise ValueError(f"{name} is quantized already; scale the original")
    return linear.weight


awq_scale.needs = frozenset({"inputs"})  # type: ignore[attr-defined]
awq_scale.paper = "Lin et al. 2023, arXiv 2306.00978"  # type: ignore[attr-defined]
