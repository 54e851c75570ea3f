"""HQQ: zero points from the weights alone, by a half-quadratic solver.

Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs), in its
letters: W, W_q (codes), W_r (what they stand for), W_e (the error that is forgiven), s, z, beta, kappa, p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from labkit.quant.blocks import Blocks
from labkit.quant.encode import encode
from labkit.quant.fit import check_finite, fit, working
from labkit.quant.grid import Grid
from labkit.quant.spec import QuantSpec
from labkit.quant.stats import Stats
from labkit.quant.tensor import Params, QuantizedTensor


def hqq(
    weight: Tensor,
    spec: QuantSpec,
    stats: Stats | None = None,
    *,
    p: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
) -> QuantizedTensor:
    """``weight`` (out_features, in_features) with the zero points that make ``sum |W - W_r|^p`` small.

    The norm with p < 1 forgives the few weights that are far off and cares for the many that are not. Its
    problem is split by a second unknown W_e: min over z and W_e of ``|W_e|_p^p + beta/2 |W_e - (W - W_r)|^2``,
    which is solved for one after the other, with beta growing by kappa each time. Scales are those of min
    and max.

    spec        integers with a zero point that is a real number: "int4 g64 asym-float"
    p           of the norm, above 0 and at most 1
    beta        in the square of the weight's unit, as in the paper: weights are taken as they come
    iterations  at most this many; it ends earlier, once the mean of |W - W_r| no longer falls

    ``stats`` is not used: no data. Raises ValueError for another spec, options out of range, NaN or infinity.
    """
    check(spec, p, beta, kappa, iterations)
    check_finite(weight)
    W = working(weight.detach())
    blocks, grid = Blocks(tuple(W.shape), spec.block), Grid(spec)
    params = fit(W, spec)
    s, z = params.dense(W.dtype)
    assert z is not None  # check() saw to it
    z2 = z.reshape(1, -1) if isinstance(spec.block, int) else z
    s2 = s.reshape_as(z2)
    for where, part in blocks.regions(W):  # part (blocks, block_size)
        s_, z_ = s2[where].reshape(-1, 1), z2[where].reshape(-1, 1)
        z2[where] = _solve(part, s_, z_, grid, p, beta, kappa, iterations).reshape(z2[where].shape)
    return encode(W, spec, Params(params.scale, z))


def check(
    spec: QuantSpec, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01, iterations: int = 20
) -> None:
    """Raises ValueError for a spec or option that HQQ cannot do."""
    if spec.zero != "float":
        raise ValueError(
            f"hqq solves for zero points that are real numbers: 'int4 g64 asym-float'; found {spec}"
        )
    if not (0 < p <= 1 and beta > 0 and kappa >= 1 and iterations >= 1):
        raise ValueError(
            f"hqq wants 0 < p <= 1, beta > 0, kappa >= 1 and iterations >= 1; found p={p}, beta={beta}, "
            f"kappa={kappa}, iterations={iterations}"
        )


hqq.needs = frozenset()  # type: ignore[attr-defined]
hqq.paper = "Badri & Shaji 2023, Mobius Labs"  # type: ignore[attr-defined]
hqq.check = check  # type: ignore[attr-defined]


def _solve(
    W: Tensor, s: Tensor, z: Tensor, grid: Grid, p: float, beta: float, kappa: float, iterations: int
) -> Tensor:
    """The zero points (blocks, 1) of blocks W (blocks, block_size)."""
    s = torch.where(s == 0, 1, s)
    least = torch.inf
    for _ in range(iterations):
        W_q = grid.quantize(W, s, z).to(W.dtype)
        W_r = (W_q - z) * s
        W_e = _shrink(W - W_r, beta, p)
        z = (W_q - (W - W_e) / s).mean(dim=1, keepdim=True)
        error = float((W - W_r).abs().mean())
        if error >= least:
            break
        least, beta = error, beta * kappa
    return z


def _shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """The W_e nearest to optimal for given x = W - W_r: ``sign(x) max(|x| - |x|^(p-1) / beta, 0)``.

    Exact for p = 1, where it is soft thresholding; for p < 1 the generalised one of the paper.
    """
    return torch.sign(x) * (x.abs() - x.abs() ** (p - 1) / beta).clamp(min=0)
