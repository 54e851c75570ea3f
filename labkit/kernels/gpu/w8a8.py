"""int8 activations times int8 weights: whole numbers on the tensor cores, summed in int32 and so without rounding.

Only then come the scales, one for each row of activations and one for each output, in float32. (LLM.int8(), arXiv
2208.07339, calls this vector-wise; SmoothQuant, arXiv 2211.10438, makes activations that bear it.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from labkit.kernels.gpu.activations import quantize_rows

# Timed on an H100, as those of product.
FEW = {"OUT": 32, "ROWS": 16, "K": 256, "num_warps": 2, "num_stages": 4}  # up to 16 rows
MANY = {"OUT": 128, "ROWS": 64, "K": 128, "num_warps": 4, "num_stages": 4}


def w8a8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, narrow: bool = False
) -> Tensor:
    """x (rows, columns), rounded row by row to int8, times int8 codes (out, columns): (rows, out), dtype of x.

    ``scale`` (out,) float32 is the weight's, ``bias`` (out,); ``narrow`` is the activations' grid. Sums are exact for
    up to 2**17 columns.
    """
    rounded = quantize_rows(x, "int8", narrow)
    assert isinstance(rounded.scale, Tensor)
    return scaled_product(rounded.codes, rounded.scale[:, 0], weight, scale, bias, x.dtype)


def scaled_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """int8 x (rows, columns) and weight (out, columns), float32 scales (rows,) and (out,), to (rows, out) ``dtype``."""
    (rows, columns), out = x.shape, len(weight)
    y = torch.empty(rows, out, dtype=dtype, device=x.device)
    if y.numel():
        config = FEW if rows <= FEW["ROWS"] else MANY
        grid = (triton.cdiv(out, config["OUT"]), triton.cdiv(rows, config["ROWS"]))
        _int8_tiles[grid](x, x_scale, weight, scale, bias, y, rows, out, columns, **config)
    return y


@triton.jit
def _int8_tiles(
    x: tl.tensor, x_scale: tl.tensor, weight: tl.tensor, scale: tl.tensor, bias: tl.tensor, y: tl.tensor,
    rows: int, out: int, columns: int, OUT: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr,
) -> None:  # fmt: skip
    o = (tl.program_id(0) * OUT + tl.arange(0, OUT)).to(tl.int64)
    r = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    sums = tl.zeros((OUT, ROWS), tl.int32)
    for start in range(0, columns, K):
        k = start + tl.arange(0, K)
        left = (o < out)[:, None] & (k < columns)[None, :]
        right = (r < rows)[None, :] & (k < columns)[:, None]
        codes = tl.load(weight + o[:, None] * columns + k[None, :], mask=left, other=0)  # (OUT, K)
        numbers = tl.load(x + r[None, :] * columns + k[:, None], mask=right, other=0)  # (K, ROWS)
        sums = tl.dot(codes, numbers, sums, out_dtype=tl.int32)
    of_rows = tl.load(x_scale + r, mask=r < rows, other=0.0)
    of_outputs = tl.load(scale + o, mask=o < out, other=0.0)
    total = sums.to(tl.float32) * of_rows[None, :] * of_outputs[:, None]
    if bias is not None:
        total += tl.load(bias + o, mask=o < out, other=0.0).to(tl.float32)[:, None]
    tl.store(y + r[None, :] * out + o[:, None], total, mask=(o < out)[:, None] & (r < rows)[None, :])
