"""One tensor at a time: numbers in, codes and scales out. Needs torch and nothing else."""

from labkit.quant.adaround import FellBack, adaround
from labkit.quant.blocks import Blocks
from labkit.quant.encode import encode, fake_quantize
from labkit.quant.error import hessian_error, mse, rounding_and_clipping, sqnr_db
from labkit.quant.fit import fit, params_for
from labkit.quant.formats import round_to_format, values_of
from labkit.quant.gptq import GPTQWarning, gptq
from labkit.quant.gptq_layout import from_gptq, to_gptq
from labkit.quant.grid import Grid, grid
from labkit.quant.hadamard import hadamard, hadamard_block, hadamard_transform
from labkit.quant.hqq import hqq
from labkit.quant.kmeans import kmeans, quantile, squeezellm
from labkit.quant.lloyd import lloyd, near_optimal
from labkit.quant.lsq import lsq, lsq_encode, lsq_start
from labkit.quant.methods import METHODS
from labkit.quant.moving_average import MovingAverage
from labkit.quant.observers import OBSERVERS, Observer
from labkit.quant.rtn import rtn
from labkit.quant.rtn_clip import rtn_clip
from labkit.quant.spec import QuantSpec
from labkit.quant.stats import Stats
from labkit.quant.tensor import Packed, Params, QuantizedTensor

__all__ = [
    "METHODS",
    "OBSERVERS",
    "Blocks",
    "FellBack",
    "GPTQWarning",
    "Grid",
    "MovingAverage",
    "Observer",
    "Packed",
    "Params",
    "QuantSpec",
    "QuantizedTensor",
    "Stats",
    "adaround",
    "encode",
    "fake_quantize",
    "fit",
    "from_gptq",
    "gptq",
    "grid",
    "hadamard",
    "hadamard_block",
    "hadamard_transform",
    "hessian_error",
    "hqq",
    "kmeans",
    "lloyd",
    "lsq",
    "lsq_encode",
    "lsq_start",
    "mse",
    "near_optimal",
    "params_for",
    "quantile",
    "round_to_format",
    "rounding_and_clipping",
    "rtn",
    "rtn_clip",
    "sqnr_db",
    "squeezellm",
    "to_gptq",
    "values_of",
]
