"""In the interpreter, no kernel reads or writes behind its arguments: a page that may not be touched lies there."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from on_gpu import of_programs, quantized, randn
from torch import Tensor

from labkit.kernels.gpu.activations import quantize_rows
from labkit.kernels.gpu.attention import Held, attend
from labkit.kernels.gpu.packing import pack, unpack
from labkit.kernels.triton_gpu import TritonGpu
from labkit.quant import QuantizedTensor, QuantSpec

pytestmark = pytest.mark.gpu


def at_the_edge(x: Tensor) -> Tensor:
    """``x`` at the end of its pages; whoever goes on ends the process by a segmentation fault."""
    whole = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, whole + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + whole), mmap.PAGESIZE, 0) == 0
    y = torch.frombuffer(region, dtype=x.dtype, count=x.numel(), offset=whole - x.nbytes).view(x.shape)
    return y.copy_(x)


@pytest.fixture(autouse=True)
def new_tensors_at_the_edge(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the launchers make for results too."""

    def empty(*shape: Any, dtype: torch.dtype = torch.float32, device: object = None) -> Tensor:
        return at_the_edge(torch.full(shape[0] if isinstance(shape[0], tuple) else shape, 0, dtype=dtype))

    def empty_like(x: Tensor, **options: object) -> Tensor:
        return at_the_edge(torch.zeros_like(x))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "zeros", empty)
        patch.setattr(torch, "empty_like", empty_like)
        yield


def codes_at_the_edge(x: QuantizedTensor) -> QuantizedTensor:
    assert isinstance(x.scale, Tensor)
    zero = None if x.zero is None else at_the_edge(x.zero)
    return replace(x, codes=at_the_edge(x.codes), scale=at_the_edge(x.scale), zero=zero)


@pytest.mark.parametrize("text", ["int4 g32", "int4 g32 asym", "int8 g16 asym", "nf4 channel"])
@pytest.mark.parametrize("rows", [1, 5, 17])
@pytest.mark.parametrize("inputs", [1, 37, 512])
def test_products(text: str, rows: int, inputs: int) -> None:
    kernel = TritonGpu(quantized(text, 35, inputs))
    words = kernel._words
    assert words is not None
    parts = {name: getattr(words, name) for name in ("words", "scale", "zero", "table")}
    kernel._words = replace(
        words, **{name: None if part is None else at_the_edge(part) for name, part in parts.items()}
    )
    x, bias = at_the_edge(randn(rows, inputs)), at_the_edge(randn(35))
    for programs in (1, 256):
        with of_programs(programs):
            assert kernel(x, bias).isfinite().all()


@pytest.mark.parametrize("rows", [1, 17])
def test_int8_products_and_rows(rows: int) -> None:
    spec = QuantSpec("int8", (1, None), scale="fp32")
    kernel = TritonGpu(codes_at_the_edge(quantized("int8 channel scale=fp32", 35, 37)), spec)
    assert kernel._int8 is not None
    kernel._int8 = kernel._int8[0], at_the_edge(kernel._int8[1])
    x = at_the_edge(randn(rows, 37))
    assert kernel(x, at_the_edge(randn(35))).isfinite().all()
    assert quantize_rows(x, "fp8_e4m3").codes.shape == x.shape


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing(bits: int) -> None:
    codes = at_the_edge(torch.randint(0, 2**bits, (3, 37)).byte())
    assert torch.equal(unpack(pack(codes, bits), bits, 37), codes)


@pytest.mark.parametrize(
    ("grid", "tokens"),
    [*((grid, 45) for grid in ("int8 channel scale=fp32", "int4 g8 asym scale=fp32")),
     *(("int4 32x1 scale=fp32", tokens) for tokens in (45, 64))],
)
def test_attention(grid: str, tokens: int) -> None:
    k, v = (Held.of(codes_at_the_edge(quantized(grid, 2, 3, tokens, 24))) for _ in range(2))
    q, lengths = at_the_edge(randn(2, 9, 24)), at_the_edge(torch.tensor([tokens, 20], dtype=torch.int32))
    assert k.words.shape[0] == math.prod((2, 3, tokens))
    assert attend(q, k, v, lengths).isfinite().all() and attend(q, k, v).isfinite().all()
