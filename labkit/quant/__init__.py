"""One tensor at a time: numbers in, codes and scales out. Needs torch and nothing else."""

from labkit.quant.blocks import Blocks
from labkit.quant.encode import encode, fake_quantize
from labkit.quant.fit import fit, params_for
from labkit.quant.formats import round_to_format, values_of
from labkit.quant.grid import Grid, grid
from labkit.quant.observers import OBSERVERS, Observer
from labkit.quant.spec import QuantSpec
from labkit.quant.tensor import Packed, Params, QuantizedTensor

__all__ = [
    "OBSERVERS",
    "Blocks",
    "Grid",
    "Observer",
    "Packed",
    "Params",
    "QuantSpec",
    "QuantizedTensor",
    "encode",
    "fake_quantize",
    "fit",
    "grid",
    "params_for",
    "round_to_format",
    "values_of",
]
