"""fit: the scales and zero points of a tensor's blocks."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from labkit.quant import formats
from labkit.quant.blocks import Blocks
from labkit.quant.grid import Grid
from labkit.quant.observers import OBSERVERS, Observer
from labkit.quant.spec import QuantSpec
from labkit.quant.tensor import Params, QuantizedTensor


def fit(
    x: Tensor, spec: QuantSpec, observer: str | Observer = "minmax", weight: Tensor | None = None
) -> Params:
    """Scales and zero points for ``x`` of any shape, one per block, rounded to their stored dtype.

    ``observer`` chooses each block's range: a name from OBSERVERS or a function of that kind. ``weight`` is
    the importance of each element, same shape as ``x`` or (columns,). An empty tensor gives an empty grid
    of scales. Raises ValueError for NaN or infinity, and where a scale is too large for its dtype.
    """
    if spec.zero != "mean":
        return params_for(*ranges(x, spec, observer, weight), spec)
    check_finite(x)
    x = working(x)
    mean = store_zero(x.mean()[None] if x.numel() else x.new_zeros(1), spec)
    assert mean is not None
    return replace(params_for(*ranges(x - mean, spec, observer, weight), spec), zero=mean)


def ranges(
    x: Tensor, spec: QuantSpec, observer: str | Observer = "minmax", weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The lowest and highest number that each block's grid shall cover, both in the shape of the scales.

    Arguments and errors as in ``fit``.
    """
    check_finite(x)
    check_has_values(spec)
    observe = _observer(observer)
    x = working(x)
    blocks = Blocks(tuple(x.shape), spec.block)
    seen = (1, *blocks.grid) if isinstance(spec.block, int) else blocks.grid
    lo = torch.zeros(seen, dtype=x.dtype, device=x.device)
    hi = torch.zeros_like(lo)
    weights = None if weight is None else blocks.regions(_importance(weight, x))
    for where, part in blocks.regions(x):
        low, high = observe(part, spec, None if weights is None else next(weights)[1])
        _check_range(low, high, len(part), observer)
        lo[where] = low.reshape(lo[where].shape)
        hi[where] = high.reshape(hi[where].shape)
    return lo.reshape(blocks.grid), hi.reshape(blocks.grid)


def params_for(lo: Tensor, hi: Tensor, spec: QuantSpec) -> Params:
    """Scale and zero point of blocks that range from ``lo`` to ``hi``, both in the shape of the scales.

    Raises ValueError where a scale or zero point is too large for its stored dtype.
    """
    grid = Grid(spec)
    scale = store_scale(grid.scale_for(lo, hi), spec)
    dense, _ = Params(scale).dense(torch.float64)
    return Params(scale, store_zero(grid.zero_for(lo, dense), spec))


def store_scale(scale: Tensor, spec: QuantSpec) -> Tensor | QuantizedTensor:
    """Real-valued scales as ``spec`` stores them.

    A scale too small for its dtype becomes the smallest it has, not 0, which would erase the block.
    """
    if isinstance(spec.scale, QuantSpec):
        from labkit.quant.encode import encode  # encode stores scales too

        return encode(scale, spec.scale, fit(scale, spec.scale))
    dtype = formats.SCALE_DTYPES[spec.scale]
    if scale.dtype == dtype:
        return scale
    stored = scale.to(dtype)
    back = stored.double()
    if not bool(back.isfinite().all()):
        raise ValueError(
            f"a scale of {float(scale.max()):.4g} is too large for {spec.scale} ({spec}); "
            f"store the scales as fp32 or bf16"
        )
    vanished = (back == 0) & (scale > 0)
    if bool(vanished.any()):
        stored = torch.where(vanished, _smallest(dtype), back).to(dtype)
    return stored


def store_zero(zero: Tensor | None, spec: QuantSpec) -> Tensor | None:
    """Zero points as ``spec`` stores them: uint8 codes, or reals in ``real_dtype``."""
    if zero is None or spec.zero == "none":
        return None
    if spec.zero == "int":
        return zero.to(torch.uint8)
    dtype = real_dtype(spec)
    stored = zero.to(dtype)
    if not bool(stored.isfinite().all()):
        raise ValueError(
            f"a zero point of {float(zero.abs().max()):.4g} steps is too large for {dtype} ({spec}): "
            f"the range is far from 0 for its width; use scale=fp32 or an integer zero point"
        )
    return stored


def real_dtype(spec: QuantSpec) -> torch.dtype:
    """What zero points that are reals, and codebooks, are stored as: fp32 or bf16 as the scales, else fp16."""
    return formats.SCALE_DTYPES[spec.scale] if spec.scale in ("fp32", "bf16") else torch.float16


def check_has_values(spec: QuantSpec, **options: object) -> None:
    """Raises ValueError for a codebook that is still to be learned. ``options`` are not looked at."""
    if spec.format in formats.LEARNED:
        raise ValueError(
            f"{spec.format} has no table yet: the method kmeans learns one, or pass Params(scale, table=...) "
            f"to encode"
        )


def check_finite(x: Tensor) -> None:
    """Raises ValueError that counts NaN and infinite elements of ``x`` and names the first."""
    bad = ~torch.isfinite(x)
    if not bool(bad.any()):
        return
    first = tuple(int(i) for i in bad.nonzero()[0])
    raise ValueError(
        f"expected finite numbers, found {int(x.isnan().sum())} NaN and {int(x.isinf().sum())} infinite "
        f"of {prod(x.shape)}, the first at index {first}; mask or clip them before quantizing"
    )


def working(x: Tensor) -> Tensor:
    """``x`` in the dtype that arithmetic runs in: float64 stays, everything else becomes float32."""
    if not x.is_floating_point():
        raise ValueError(f"expected a floating-point tensor, found {x.dtype}")
    return x if x.dtype == torch.float64 else x.float()


def _observer(observer: str | Observer) -> Observer:
    if not isinstance(observer, str):
        return observer
    if observer not in OBSERVERS:
        raise ValueError(
            f"observer must be a function or one of {', '.join(OBSERVERS)}, found {observer!r}"
        )
    return OBSERVERS[observer]


def _importance(weight: Tensor, x: Tensor) -> Tensor:
    if weight.shape not in (x.shape, x.shape[-1:]):
        raise ValueError(
            f"weight must have the shape of x, {tuple(x.shape)}, or its columns, {tuple(x.shape[-1:])}; "
            f"found {tuple(weight.shape)}"
        )
    return weight.to(x).expand(x.shape)


def _check_range(lo: Tensor, hi: Tensor, count: int, observer: str | Observer) -> None:
    if lo.shape != (count,) or hi.shape != (count,):
        raise ValueError(
            f"observer {observer!r} must return lo and hi of shape ({count},), one per block; "
            f"found {tuple(lo.shape)} and {tuple(hi.shape)}"
        )
    if not bool((lo <= hi).all()):
        raise ValueError(f"observer {observer!r} returned a block with lo above hi, or NaN")


def _smallest(dtype: torch.dtype) -> float:
    info = torch.finfo(dtype)
    return info.smallest_normal * info.eps  # the smallest subnormal
