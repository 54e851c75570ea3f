"""What the tests of this folder share: the device, and tensors and errors on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from labkit.quant import QuantizedTensor, QuantSpec, encode, fit

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# What a sum may be off by, in units of the sizes of what is added up: the rounding of the result, and of reals in
# tables, zero points and attention's weights. The interpreter's tl.dot multiplies bfloat16's bit patterns, without a
# word, so there all is float32.
DTYPES = {torch.float32: 5e-6} | ({} if INTERPRETED else {torch.float16: 1e-3, torch.bfloat16: 8e-3})


@contextmanager
def of_programs(count: int) -> Iterator[None]:
    """How many programs a product shall have: with few each takes many steps, with many each takes one."""
    from labkit.kernels.gpu import product

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "PROGRAMS", count)
        yield


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Drawn on the CPU, so that a seed means the same everywhere."""
    return torch.randn(shape).to(DEVICE, dtype)


def quantized(text: str, *shape: int) -> QuantizedTensor:
    x, spec = torch.randn(shape), QuantSpec.parse(text)
    return there(encode(x, spec, fit(x, spec)))


def there(x: QuantizedTensor) -> QuantizedTensor:
    """``x`` on the device that the kernels run on."""
    scale = there(x.scale) if isinstance(x.scale, QuantizedTensor) else x.scale.to(DEVICE)
    parts = {name: getattr(x, name) for name in ("zero", "table", "g_idx")}
    moved = {name: None if part is None else part.to(DEVICE) for name, part in parts.items()}
    return replace(x, codes=x.codes.to(DEVICE), scale=scale, **moved)


def exact(x: QuantizedTensor) -> Tensor:
    return x.dequantize(torch.float64)


def off(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """The largest error of ``y`` = x @ weight.T, each in units of the sizes of what is added up to it."""
    x, weight = x.double(), weight.double()
    return float(((y.double() - x @ weight.T).abs() / (x.abs() @ weight.abs().T + 1e-30)).max())
