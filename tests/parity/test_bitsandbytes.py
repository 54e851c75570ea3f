"""nf4 against bitsandbytes: codes and scales equal, to the last bit."""

import pytest
import torch

from labkit.quant import QuantSpec, encode, fit

functional = pytest.importorskip("bitsandbytes.functional")

# Rows that are and are not multiples of 64; totals that are and are not; an odd total; a single element.
SHAPES = [(64, 64), (576, 576), (192, 100), (7, 90), (33, 65), (1, 130), (5, 13), (1, 1), (3, 4, 50)]


def codes_of(packed: torch.Tensor, count: int) -> torch.Tensor:
    """bitsandbytes keeps the first of two codes in the high half of the byte."""
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 0xF], dim=1).flatten()[:count]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_codes_scales_and_numbers_are_equal(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(shape) * 10 ** torch.randn(shape[:-1])[..., None]).to(dtype)
    for size in (64, 128):
        spec = QuantSpec("nf4", size, scale="fp32")
        ours = encode(x, spec, fit(x, spec))
        packed, state = functional.quantize_4bit(x, blocksize=size, quant_type="nf4")
        assert torch.equal(ours.scale, state.absmax)
        assert torch.equal(ours.codes.flatten(), codes_of(packed, x.numel()))
        # Not asked where it reads other scales than it wrote (0.50.2 with AVX-512: rows of 576, blocks of
        # 128) or compiles for minutes (odd rows).
        if size == 64 and shape[-1] % 2 == 0:
            theirs = functional.dequantize_4bit(packed, state).reshape(shape)
            assert torch.equal(ours.dequantize(dtype), theirs)


def test_blocks_of_zeros_and_single_outliers() -> None:
    x = torch.zeros(4, 64)
    x[1, 5], x[2] = -3.0, torch.linspace(-1, 1, 64)
    spec = QuantSpec("nf4", 64, scale="fp32")
    ours = encode(x, spec, fit(x, spec))
    packed, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4")
    assert torch.equal(ours.scale, state.absmax) and torch.equal(
        ours.codes.flatten(), codes_of(packed, 256)
    )


def test_double_quantization_costs_the_same_bits_and_as_little_error() -> None:
    """bitsandbytes puts the scales less their mean on a dynamic 8-bit map, we on 8-bit affine codes."""
    torch.manual_seed(0)
    x = torch.randn(64, 1024)
    packed, state = functional.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    theirs = functional.dequantize_4bit(packed, state)
    spec = QuantSpec.parse("nf4 b64 scale=(int8 b256 asym scale=fp32)")
    ours = encode(x, spec, fit(x, spec))
    their_bytes = sum(t.nbytes for t in (packed, state.absmax, state.state2.absmax))
    assert abs(ours.nbytes - their_bytes) <= 8
    error, their_error = (ours.dequantize() - x).norm(), (theirs - x).norm()
    assert float(error / their_error) == pytest.approx(1, abs=0.01)
