"""The product with a weight that is not quantized, by the faster of the two libraries that torch brings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 16  # with fewer the time goes into reading the weight, and both are alike
PRODUCTS = 2**22  # with fewer the call itself, 15 microseconds more than torch's, counts


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: x (..., in_features), weight (out_features, in_features), result (..., out_features).

    torch multiplies float32 matrices by MKL, which uses half of an AMD processor's vectors where it has AVX-512.
    oneDNN, with which torch multiplies bfloat16, uses all, in the same float32 arithmetic: twice as fast there. The
    gradients are such products too; they cannot be differentiated again.
    """
    if not _takes(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Dense.apply(x, weight, bias)
    return _onednn(x, weight, bias)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        rows, outputs = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            dense(gradient, weight.T) if of_x else None,
            dense(outputs.T, rows.T) if of_weight else None,  # (out_features, in_features)
            outputs.sum(dim=0) if of_bias else None,
        )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    parts = [t for t in (x, weight, bias) if t is not None]
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in parts)
        and x.dim() > 1
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and x.numel() >= ROWS * x.shape[-1]
        and x.numel() * len(weight) >= PRODUCTS
    )
