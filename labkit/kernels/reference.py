"""The reference: dequantize, then an ordinary float32 product. Other backends are measured against it."""

from __future__ import annotations

from torch import Tensor

from labkit.kernels.dense import dense
from labkit.kernels.inputs import check_input, rounded
from labkit.quant import QuantizedTensor, QuantSpec


class Reference:
    """Holds the dequantized weight in float32: saves no memory, takes any spec, is right.

    Activations on a grid are rounded to it and back, by the scales that ``fit`` finds for each call. Raises ValueError
    where they hold NaN or infinity.
    """

    backend = "reference"

    @staticmethod
    def why_not(weight: QuantizedTensor, input: QuantSpec | None = None) -> str | None:
        """None: it takes every weight and every grid of activations."""
        return None

    def __init__(self, weight: QuantizedTensor, input: QuantSpec | None = None):
        self.shape, self._input = weight.shape, input
        self._weight = weight.dequantize()  # (out, in)

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        check_input(x, self.shape)
        bias = None if bias is None else bias.float()
        return dense(rounded(x.float(), self._input), self._weight, bias).to(x.dtype)
