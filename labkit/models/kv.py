"""What a model's keys and values are kept in."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor

from labkit.quant import QuantSpec, fake_quantize, fit, formats

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_SCALES = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class KVSpec:
    """The format of the keys, after their rotation, and of the values. Attention computes in float32 with either.

    fp32, fp16, bf16, or a QuantSpec of integers: "int8 channel" has a scale for each token and head, "int4 g32 asym"
    a scale and a zero point for 32 numbers of a head. A token is written once, when it comes, so no block may span
    several; scales are fp32, fp16 or bf16. Raises ValueError for others.
    """

    key: str = "fp32"
    value: str = "fp32"

    def __post_init__(self) -> None:
        for f in fields(self):
            format = format_of(str(getattr(self, f.name)), f"kv.{f.name}")
            if isinstance(format, QuantSpec):
                object.__setattr__(self, f.name, str(format))

    def round(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (..., head_dim) as they come back from where they are kept, in their own dtypes.

        fp32 leaves them as they are, float64 too. The gradient is straight-through. Integers raise ValueError for NaN
        and infinity, and where a scale is too large for its dtype.
        """
        return _rounded(k, self.key), _rounded(v, self.value)

    def bits(self, head_dim: int) -> float:
        """Of a number, on average over keys and values, its share of scales and zero points among them."""
        return sum(_bits(format_of(name), head_dim) for name in (self.key, self.value)) / 2


@cache
def format_of(name: str, where: str = "kv") -> torch.dtype | QuantSpec:
    """What keys or values of this name are kept in. Raises ValueError, with ``where`` in front."""
    if name in DTYPES:
        return DTYPES[name]
    try:
        spec = QuantSpec.parse(name)
    except ValueError as error:
        raise ValueError(f"{where} must be one of {', '.join(DTYPES)} or a spec of integers: {error}") from None
    if not spec.is_integer or spec.zero not in ("none", "int") or spec.scale not in _SCALES:
        raise ValueError(
            f"{where} must be {', '.join(DTYPES)}, or integers, symmetric or asym, with scales in "
            f"{', '.join(_SCALES)}; found {name!r}"
        )
    if isinstance(spec.block, int) or spec.block[0] != 1:
        raise ValueError(
            f"{where}: a token is written once, when it comes, so its scales are its own: 'channel' or 'g32'; "
            f"found {name!r}, whose blocks span several tokens"
        )
    return spec


def _rounded(x: Tensor, name: str) -> Tensor:
    format = format_of(name)
    if isinstance(format, QuantSpec):
        return fake_quantize(x, format, fit(x.detach(), format))
    return x if format == torch.float32 else x.to(format).to(x.dtype)


def _bits(format: torch.dtype | QuantSpec, head_dim: int) -> float:
    """As the cache keeps them: a code has four bits or eight, a zero point eight."""
    if isinstance(format, torch.dtype):
        return 8 * format.itemsize
    assert isinstance(format.scale, str) and isinstance(format.block, tuple)
    groups = -(-head_dim // (format.block[1] or head_dim))
    scale = 8 * formats.SCALE_DTYPES[format.scale].itemsize
    return (8 if format.bits > 4 else 4) + groups * (scale + 8 * (format.zero != "none")) / head_dim
