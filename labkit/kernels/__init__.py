"""The matrix product with a quantized weight: one dispatch, an exact reference, and the fast paths."""

from labkit.kernels.dense import dense
from labkit.kernels.dispatch import BACKENDS, Prepared, backends, best, linear, prepare
from labkit.kernels.inputs import rounded

__all__ = ["BACKENDS", "Prepared", "backends", "best", "dense", "linear", "prepare", "rounded"]
