"""AdaRound: learn for every weight whether it is rounded down or up.

Nagel et al. 2020, arXiv 2004.10568, in its letters: W, V, h(V) in [0, 1], zeta and gamma (the rectified
sigmoid's stretch), lambda and beta (the regulariser's weight and power). It minimises equation 21,

    || W X - W_soft X ||^2 + lambda sum( 1 - |2 h(V) - 1|^beta ),   W_soft = s clip(floor(W / s) + h(V), n, p)

The first term is tr(dW H dW^T) with dW = W - W_soft and H = X X^T, whatever X is: the Hessian says all that
the paper's mini-batches say of the layer's inputs, and takes less memory. (What needs the inputs themselves is
the paper's later variant with the layer's activation function inside the norm; it is not here.)
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from labkit.quant.blocks import Blocks
from labkit.quant.encode import encode
from labkit.quant.fit import check_finite, fit, working
from labkit.quant.observers import Observer
from labkit.quant.spec import QuantSpec
from labkit.quant.stats import Stats, hessian_of
from labkit.quant.tensor import QuantizedTensor

ZETA, GAMMA = 1.1, -0.1


class FellBack(UserWarning):
    """A method found nothing better than rounding to nearest, and gave that."""


@torch.enable_grad()  # quantizing a model runs without
def adaround(
    weight: Tensor,
    spec: QuantSpec,
    stats: Stats | None = None,
    *,
    steps: int = 500,
    rate: float = 0.05,
    regulariser: float = 3.0,
    beta_first: float = 20.0,
    beta_last: float = 2.0,
    warmup: float = 0.2,
    observer: str | Observer = "mse",
) -> QuantizedTensor:
    """``weight`` (out_features, in_features) on the grid of ``spec``, each number one of its two neighbours.

    stats        its ``hessian`` (in_features, in_features) says which inputs X there are
    steps, rate  of Adam on V, from h(V) = W / s - floor(W / s), where W_soft is W. Every step sees all of H
    regulariser  lambda. The first term is divided by its mean per weight under rounding to nearest, so that
                 lambda means the same for every layer
    beta_first, beta_last  the power at the start and at the end, a cosine between them: a high one leaves
                 h(V) free near 1/2, a low one drives all of it to 0 or 1
    warmup       this share of the steps goes without the regulariser
    observer     chooses the range of each block; the scales do not learn

    Where the result is no better than rounding to nearest by tr(dW H dW^T), that is returned, with a
    FellBack warning. Works in float32, or float64 if W came so. Raises ValueError for shapes that do not
    fit, an H that is not finite or has seen nothing, and formats that are no integers.
    """
    adaround_check(spec)
    check_finite(weight)
    W = working(weight.detach())
    H = hessian_of(stats, W, "adaround").to(W)
    params = fit(W, spec, observer)
    nearest = encode(W, spec, params)
    if W.numel() == 0:
        return nearest
    blocks = Blocks(tuple(W.shape), spec.block)
    dense, zeros = params.dense(W.dtype)
    s = _per_weight(dense, blocks)
    zero = torch.zeros_like(s) if zeros is None else _per_weight(zeros, blocks)
    low, high = (end - zero for end in spec.code_range)
    steps_of_W = W / torch.where(s == 0, 1, s)
    # A float zero point need not be whole: floor the code, not the weight.
    floor = torch.floor(steps_of_W + zero) - zero

    def error(dW: Tensor) -> float:
        return ((dW @ H) * dW).sum(dtype=torch.float64).item()

    to_beat = error(W - nearest.dequantize(W.dtype))
    if to_beat == 0:
        return nearest
    V = _inverse_of_h(steps_of_W - floor).requires_grad_()
    adam = torch.optim.Adam([V], lr=rate)
    for step in range(steps):
        h = (torch.sigmoid(V) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        dW = W - s * torch.clamp(floor + h, low, high)
        # The gradient of tr(dW H dW^T) is 2 dW H: with dW H held fixed, one product does for both ways.
        loss = 2 * (dW.detach() @ H * dW).sum() * (W.numel() / to_beat)
        progress = (step / steps - warmup) / (1 - warmup)
        if progress >= 0:
            power = beta_last + (beta_first - beta_last) * (1 + math.cos(math.pi * progress)) / 2
            loss = loss + regulariser * (1 - (2 * h - 1).abs().pow(power)).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    hard = s * torch.clamp(floor + (V.detach() > 0), low, high)  # V > 0 is h > 1/2
    if error(W - hard) >= to_beat:
        warnings.warn(FellBack("AdaRound was no better than rounding to nearest"), stacklevel=2)
        return nearest
    return encode(hard, spec, params)  # hard lies on the grid, so encode only names its codes


def adaround_check(spec: QuantSpec, **options: object) -> None:
    """Raises ValueError for a format in which down and up are not one code apart. No option matters."""
    if not spec.is_integer:
        raise ValueError(f"AdaRound rounds down or up between integers, found {spec}; use int2 to int8")


adaround.needs = frozenset({"hessian"})  # type: ignore[attr-defined]
adaround.paper = "Nagel et al. 2020, arXiv 2004.10568"  # type: ignore[attr-defined]
adaround.check = adaround_check  # type: ignore[attr-defined]


def _inverse_of_h(fraction: Tensor) -> Tensor:
    """V with h(V) = fraction, in [0, 1)."""
    return torch.logit((fraction - GAMMA) / (ZETA - GAMMA))


def _per_weight(values: Tensor, blocks: Blocks) -> Tensor:
    return blocks.spread(values).expand(blocks.matrix).reshape(blocks.shape)
