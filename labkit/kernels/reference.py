"""The reference: dequantize, then an ordinary float32 product. Other backends are measured against it."""

from __future__ import annotations

from torch import Tensor

from labkit.kernels.dense import dense
from labkit.kernels.inputs import check_input
from labkit.quant import QuantizedTensor


class Reference:
    """Holds the dequantized weight in float32: saves no memory, takes any spec, is right."""

    backend = "reference"

    @staticmethod
    def why_not(weight: QuantizedTensor) -> str | None:
        """None: it takes every weight."""
        return None

    def __init__(self, weight: QuantizedTensor):
        self.shape = weight.shape
        self._weight = weight.dequantize()  # (out, in)

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        check_input(x, self.shape)
        bias = None if bias is None else bias.float()
        return dense(x.float(), self._weight, bias).to(x.dtype)
