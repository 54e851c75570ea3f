"""The floats against torch's own dtypes and ml_dtypes', and MXFP4 against gguf's."""

import numpy as np
import pytest
import torch

from labkit.quant import QuantSpec, encode, fit, round_to_format, values_of
from labkit.quant.formats import FLOATS, float_codes

DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SMALL = {"fp6_e2m3": "float6_e2m3fn", "fp6_e3m2": "float6_e3m2fn", "fp4_e2m1": "float4_e2m1fn"}


@pytest.mark.parametrize("name", DTYPES | HALVES)
def test_the_table_is_torchs_bit_pattern_by_bit_pattern(name: str) -> None:
    if name in DTYPES:
        theirs = torch.arange(256).to(torch.uint8).view(DTYPES[name]).float()
    else:
        theirs = torch.arange(-(2**15), 2**15).to(torch.int16).view(HALVES[name]).float().roll(2**15)
    number = ~theirs.isnan()
    assert torch.equal(~values_of(name).isnan(), number)
    assert torch.equal(values_of(name)[number], theirs[number])


@pytest.mark.parametrize("name", SMALL)
def test_table_and_rounding_of_the_smaller_ones_are_ml_dtypes(name: str) -> None:
    """torch has no fp6, and its fp4 cannot be converted. ml_dtypes saturates at no number but infinity's."""
    dtype = getattr(pytest.importorskip("ml_dtypes"), SMALL[name])
    values = values_of(name)
    theirs = np.arange(len(values), dtype=np.uint8).view(dtype).astype(np.float32)
    assert np.array_equal(values.numpy(), theirs)
    x = torch.linspace(-FLOATS[name].largest, FLOATS[name].largest, 20_001)
    ours, wanted = round_to_format(x, name), x.numpy().astype(dtype)
    assert np.array_equal(ours.numpy(), wanted.astype(np.float32))
    assert np.array_equal(float_codes(ours, name).numpy(), wanted.view(np.uint8))


@pytest.mark.parametrize("name", HALVES)
def test_rounding_to_halves_is_torchs(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(100_000) * 10 ** (12 * torch.randn(100_000)).clamp(-44, 37)
    wanted = x.to(HALVES[name]).float()
    beyond = wanted.isinf()
    assert torch.equal(round_to_format(x, name)[~beyond], wanted[~beyond])
    largest = torch.finfo(HALVES[name]).max
    assert torch.equal(round_to_format(x, name)[beyond], x[beyond].sign() * largest)
    assert beyond.any() or name == "bf16"


@pytest.mark.parametrize("name", DTYPES)
def test_rounding_is_torchs_on_every_bfloat16_in_range(name: str) -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    x = x[x.isfinite() & (x.abs() <= FLOATS[name].largest)]
    theirs = x.to(DTYPES[name])
    ours = round_to_format(x, name)
    assert torch.equal(ours, theirs.float())
    assert torch.equal(float_codes(ours, name), theirs.view(torch.uint8))


@pytest.mark.parametrize("name", DTYPES)
def test_rounding_is_torchs_at_and_beside_every_midpoint(name: str) -> None:
    values = values_of(name)
    values = values[values.isfinite()].unique()
    middles = (values[:-1] + values[1:]) / 2
    x = torch.cat([middles, torch.nextafter(middles, middles - 1), torch.nextafter(middles, middles + 1)])
    assert torch.equal(round_to_format(x, name), x.to(DTYPES[name]).float())


def test_e8m0_is_torchs() -> None:
    theirs = torch.arange(256).to(torch.uint8).view(torch.float8_e8m0fnu).float()
    assert torch.equal(values_of("e8m0")[:255], theirs[:255])
    assert torch.equal(round_to_format(theirs[:255], "e8m0"), theirs[:255])


def test_fp8_per_tensor_is_torchs_scaled_cast() -> None:
    torch.manual_seed(0)
    x, spec = torch.randn(32, 48), QuantSpec.parse("fp8_e4m3 tensor scale=fp32")
    q = encode(x, spec, fit(x, spec))
    scale = x.abs().max() / 448
    assert q.scale.item() == scale.item()
    assert torch.equal(q.codes, (x / scale).to(torch.float8_e4m3fn).view(torch.uint8))


def test_mxfp4_is_ggufs() -> None:
    """gguf takes the smaller of two equally near values, we the even one, so x holds no ties."""
    quants = pytest.importorskip("gguf.quants")
    torch.manual_seed(0)
    x, spec = torch.randn(40, 96) * torch.logspace(-4, 4, 40)[:, None], QuantSpec.parse("mxfp4")
    x[3, 32:64] = 0
    q = encode(x, spec, fit(x, spec))
    blocks = quants.MXFP4.quantize_blocks(x.reshape(-1, 32).numpy())
    used = x.reshape(-1, 32).any(dim=1)  # the exponent of an all-zero block says nothing
    exponents = torch.from_numpy(blocks[:, 0].copy())
    assert torch.equal(q.scale.view(torch.uint8).flatten()[used], exponents[used])
    theirs = torch.from_numpy(quants.MXFP4.dequantize_blocks(blocks))
    assert torch.equal(q.dequantize().reshape(-1, 32), theirs)
