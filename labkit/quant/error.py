"""How far a quantized tensor lies from the original, summed in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from labkit.quant.tensor import QuantizedTensor


def mse(original: Tensor, quantized: Tensor | QuantizedTensor) -> float:
    """The mean squared error: ``mean((x - q)^2)``, in the square of x's unit.

    ``original`` and ``quantized`` have the same shape. Raises ValueError when they do not, or when they are
    empty (a mean over nothing has no value).
    """
    x, q = _pair(original, quantized)
    if x.numel() == 0:
        raise ValueError(f"mse is a mean over elements; found none, shape {tuple(x.shape)}")
    return (x - q).square().mean().item()


def rounding_and_clipping(
    original: Tensor, quantized: Tensor | QuantizedTensor, scale: Tensor | float
) -> tuple[float, float]:
    """The mean squared error in two parts that add up to ``mse``: what rounding does and what clipping does.

    Rounding to an integer grid is off by half a step at most, so an element that is further off was clipped.
    All of its error counts as clipping. ``scale`` is the step, of a shape that broadcasts against
    ``original``. Raises ValueError as ``mse`` does.
    """
    x, q = _pair(original, quantized)
    total = mse(x, q)
    error = (x - q).abs()
    step = torch.as_tensor(scale).double()
    slack = 1e-5 * step + 1e-6 * x.abs()  # half a step exactly, computed in float32, is still rounding
    clipped = torch.where(error > step / 2 + slack, error, 0).square().mean().item()
    return total - clipped, clipped


def sqnr_db(original: Tensor, quantized: Tensor | QuantizedTensor) -> float:
    """The signal-to-quantization-noise ratio in decibels: ``10 log10( sum x^2 / sum (x - q)^2 )``.

    ``original`` and ``quantized`` have the same shape. An exact copy has ``inf``; noise on an all-zero
    signal has ``-inf``. One bit more is worth 20 log10(2) = 6.02 dB, as long as rounding and not clipping
    makes the noise (Bennett 1948). Raises ValueError when the shapes differ.
    """
    x, q = _pair(original, quantized)
    signal, noise = x.square().sum().item(), (x - q).square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def hessian_error(weight: Tensor, quantized: Tensor | QuantizedTensor, hessian: Tensor) -> float:
    """The relative squared error of a linear layer's output on its calibration inputs: what GPTQ lowers.

    ``tr((W - Q) H (W - Q)^T) / tr(W H W^T)``, which for ``H = X X^T`` is ``|(W - Q) X|^2 / |W X|^2``
    (Frantar et al. 2022, arXiv 2210.17323, equation 1, made relative). No unit; 0 is exact; a factor on H
    has no effect.

    weight, quantized: (out_features, in_features)
    hessian: (in_features, in_features), without damping, which helps the search but is no part of the score

    Raises ValueError when the shapes do not fit together.
    """
    w, q = _pair(weight, quantized)
    if w.ndim != 2 or hessian.shape != (w.shape[1], w.shape[1]):
        raise ValueError(
            f"expected a weight (out, in) and a hessian (in, in); "
            f"found {tuple(w.shape)} and {tuple(hessian.shape)}"
        )
    h = hessian.double()
    error, whole = (((m @ h) * m).sum().item() for m in (w - q, w))
    if error == 0:
        return 0.0
    return error / whole if whole > 0 else math.inf


def _pair(original: Tensor, quantized: Tensor | QuantizedTensor) -> tuple[Tensor, Tensor]:
    if not isinstance(quantized, Tensor):
        quantized = quantized.dequantize(torch.float32)
    if original.shape != quantized.shape:
        raise ValueError(
            f"expected two tensors of one shape; found {tuple(original.shape)} and {tuple(quantized.shape)}"
        )
    return original.double(), quantized.double()
