"""Learned codebooks: k-means, k-means weighted by sensitivity (SqueezeLLM), and quantiles.

In one dimension k-means is the Lloyd-Max quantizer (see ``lloyd``). SqueezeLLM (Kim et al. 2023, arXiv
2306.07629) weights each number by the diagonal of the Fisher information: how much the loss rises with the
square of its error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from labkit.quant import formats
from labkit.quant.blocks import Blocks
from labkit.quant.encode import encode
from labkit.quant.fit import check_finite, fit, real_dtype, working
from labkit.quant.lloyd import near_optimal, quantiles
from labkit.quant.spec import QuantSpec
from labkit.quant.stats import Stats
from labkit.quant.tensor import Params, QuantizedTensor

Codebook = Literal["row", "tensor"]


def kmeans(
    weight: Tensor, spec: QuantSpec, stats: Stats | None = None, *, codebook: Codebook = "row"
) -> QuantizedTensor:
    """``weight`` (out_features, in_features) on the values that bring the least squared error.

    spec      table2, table3 or table4: 4, 8 or 16 values, in units of the scales. "table4 tensor" has one
              scale, which is as good as none; "table4 g64" normalises each group first
    codebook  "row": every output channel has its own values, as in SqueezeLLM; "tensor": all share them.
              Stored in fp32 or bf16 as the scales are, else in fp16, and counted in ``nbytes``

    ``stats`` is not used. Raises ValueError for another format, for flat runs with codebooks by row, and for
    NaN or infinity.
    """
    return _learned(weight, spec, codebook, near_optimal)


def squeezellm(
    weight: Tensor, spec: QuantSpec, stats: Stats | None = None, *, codebook: Codebook = "row"
) -> QuantizedTensor:
    """``kmeans`` of ``sum fisher (w - q)^2``: precise where the loss is sensitive (the paper's equation 3).

    stats     its ``fisher`` (out_features, in_features) is the mean squared gradient of each weight. A
              codebook whose weights all have Fisher 0 is learned without it

    The paper's sparse part, outliers kept aside, is not done. Raises ValueError as ``kmeans`` does, and for
    a Fisher that is missing, negative, not finite or of another shape.
    """
    fisher = None if stats is None else stats.fisher
    if fisher is None:
        raise ValueError("squeezellm needs stats with the fisher of the weight, its mean squared gradient")
    unfit = int((~((fisher >= 0) & fisher.isfinite())).sum())
    if fisher.shape != weight.shape or unfit:
        raise ValueError(
            f"fisher must be finite, not negative, and of the weight's shape {tuple(weight.shape)}; found "
            f"shape {tuple(fisher.shape)} with {unfit} negative, infinite or NaN elements"
        )

    def sensitive(x: Tensor, k: int, importance: Tensor) -> Tensor:
        return near_optimal(x, k, importance * fisher.double().reshape(importance.shape))

    return _learned(weight, spec, codebook, sensitive)


def quantile(
    weight: Tensor, spec: QuantSpec, stats: Stats | None = None, *, codebook: Codebook = "row"
) -> QuantizedTensor:
    """``weight`` on values that are used about equally often: its (i + 1/2) / 2^bits quantiles.

    The idea that nf4 carries out for a normal distribution (Dettmers et al. 2023, arXiv 2305.14314, section
    3): the most information a code can carry, which is not the least error. ``spec``, ``codebook`` and
    errors as in ``kmeans``.
    """
    return _learned(weight, spec, codebook, lambda x, k, importance: quantiles(x, k))


def check(spec: QuantSpec, codebook: Codebook = "row") -> None:
    """Raises ValueError for a spec or option that these methods cannot do."""
    if spec.format not in formats.LEARNED:
        raise ValueError(f"codebooks are learned for {', '.join(formats.LEARNED)}; found {spec}")
    if codebook not in ("row", "tensor"):
        raise ValueError(f"codebook must be 'row' or 'tensor', found {codebook!r}")
    if codebook == "row" and isinstance(spec.block, int):
        raise ValueError(f"flat runs know no rows: {spec} needs codebook='tensor', or blocks such as g64")


kmeans.needs = quantile.needs = frozenset()  # type: ignore[attr-defined]
squeezellm.needs = frozenset({"fisher"})  # type: ignore[attr-defined]
kmeans.paper = "Lloyd 1982, IEEE Trans. Inf. Theory 28(2)"  # type: ignore[attr-defined]
squeezellm.paper = "Kim et al. 2023, arXiv 2306.07629"  # type: ignore[attr-defined]
quantile.paper = "Dettmers et al. 2023, arXiv 2305.14314"  # type: ignore[attr-defined]
kmeans.check = squeezellm.check = quantile.check = check  # type: ignore[attr-defined]


def _learned(
    weight: Tensor, spec: QuantSpec, codebook: Codebook, learn: Callable[[Tensor, int, Tensor], Tensor]
) -> QuantizedTensor:
    """``weight`` on the table that ``learn(x, levels, importance)`` makes of the weights over their scales."""
    check(spec, codebook)
    check_finite(weight)
    W = working(weight.detach())
    blocks = Blocks(tuple(W.shape), spec.block)
    # A scale is its block's absmax, as for any table from -1 to 1.
    params = fit(W, QuantSpec("nf4", spec.block, scale=spec.scale))
    scale = blocks.spread(params.dense(torch.float64)[0]).expand(blocks.matrix)
    x = W.reshape(blocks.matrix) / torch.where(scale == 0, 1, scale)  # (rows, columns)
    importance = scale**2  # (w - q)^2 = scale^2 (x - value)^2
    if codebook == "tensor":
        x, importance = x.reshape(1, -1), importance.reshape(1, -1)
    table = learn(x, spec.levels, importance) if W.numel() else x.new_zeros(len(x), spec.levels)
    table = table[0] if codebook == "tensor" else table
    return encode(W, spec, Params(params.scale, table=table.to(real_dtype(spec))))
