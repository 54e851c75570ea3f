"""Stats: what calibration has seen of a layer, and all that a method may know of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PANEL = 192  # rows of H computed by one product


@dataclass
class Stats:
    """The second moments of a linear layer's inputs, and how sensitive the loss is to its weights.

    hessian   (in_features, in_features), symmetric: the mean of x x^T over the samples, or their sum.
              GPTQ's paper has 2 X X^T; no method's result depends on the factor
    samples   how many inputs (tokens) were seen
    fisher    (out_features, in_features): the mean squared gradient of the loss by each weight, the
              diagonal of the empirical Fisher information; None where no gradients were taken
    """

    hessian: Tensor
    samples: int
    fisher: Tensor | None = None

    @classmethod
    def empty(cls, in_features: int, dtype: torch.dtype = torch.float32) -> Stats:
        """Nothing seen yet."""
        return cls(torch.zeros(in_features, in_features, dtype=dtype), 0)

    @classmethod
    def of(cls, inputs: Tensor) -> Stats:
        """The stats of ``inputs`` (..., in_features), in float64 where the inputs are, else in float32."""
        dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
        stats = cls.empty(inputs.shape[-1], dtype)
        stats.add(inputs)
        return stats

    def add(self, inputs: Tensor) -> None:
        """See ``inputs`` (..., in_features) too; how they are cut into batches only affects rounding."""
        x = inputs.detach().reshape(-1, inputs.shape[-1]).to(self.hessian.dtype)  # (samples, in_features)
        if len(x) == 0:
            return
        self.samples += len(x)
        H = self.hessian
        H *= 1 - len(x) / self.samples
        # H is symmetric: what lies on the diagonal and right of it is enough.
        for i in range(0, len(H), PANEL):
            H[i : i + PANEL, i:].addmm_(x[:, i : i + PANEL].T, x[:, i:], alpha=1 / self.samples)
        H.copy_(H.triu() + H.triu(1).T)


def hessian_of(stats: Stats | None, weight: Tensor, method: str) -> Tensor:
    """The hessian (in, in) of the inputs of ``weight`` (out, in), for ``method``, which cannot do without.

    Raises ValueError where it is missing, has another shape, has seen nothing, or holds NaN or infinity.
    """
    if stats is None:
        raise ValueError(f"{method} needs stats with the hessian of the layer's inputs: Stats.of(inputs)")
    H = stats.hessian
    if weight.ndim != 2 or H.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"expected a weight (out, in) and a hessian (in, in); "
            f"found {tuple(weight.shape)} and {tuple(H.shape)}"
        )
    if stats.samples == 0 and weight.numel():
        raise ValueError("the calibration is empty: these stats have seen no input; give some text")
    if not bool(H.isfinite().all()):
        raise ValueError("the hessian holds NaN or infinity: look at the calibration inputs of this layer")
    return H
