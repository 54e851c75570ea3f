"""fake_quantize: the values of encode, and the straight-through gradient."""

import pytest
import torch

from labkit.quant import Params, QuantSpec, encode, fake_quantize, fit

SPECS = [
    "int2 channel",
    "int4 g5 asym",
    "int4 b7 narrow",
    "int3 tensor asym-float",
    "nf4 b8",
    "fp8_e4m3 tensor",
    "mxfp4",
]


@pytest.mark.parametrize("text", [*SPECS, "nvfp4", "int8 *x1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gives_the_values_of_encode(text: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, spec = torch.randn(6, 23).to(dtype), QuantSpec.parse(text)
    params = fit(x, spec)
    out = fake_quantize(x, spec, params)
    assert out.dtype == dtype
    assert torch.equal(out, encode(x, spec, params).dequantize(dtype))


@pytest.mark.parametrize("text", SPECS)
def test_gradient_passes_inside_and_stops_outside(text: str) -> None:
    torch.manual_seed(0)
    spec = QuantSpec.parse(text)
    inside = torch.randn(2, 16)
    params = fit(inside, spec)
    x = (inside * 0.8).requires_grad_()
    fake_quantize(x, spec, params).backward(torch.full_like(x, 3.0))
    assert torch.equal(x.grad, torch.full_like(x, 3.0))
    far = (100 * inside.sign()).requires_grad_()
    fake_quantize(far, spec, params).sum().backward()
    assert torch.equal(far.grad, torch.zeros_like(far))


@pytest.mark.parametrize("zero", [None, 3])
def test_equals_torchs_own(zero: int | None) -> None:
    torch.manual_seed(0)
    spec = QuantSpec("int4", (1, None), zero="none" if zero is None else "int", scale="fp32")
    low, high = spec.code_range
    scale = torch.rand(5) + 0.1
    x = (4 * torch.randn(5, 40)).requires_grad_()
    y = x.detach().clone().requires_grad_()
    zeros = torch.full((5,), zero or 0, dtype=torch.int32)
    params = Params(scale[:, None], None if zero is None else zeros[:, None])
    ours = fake_quantize(x, spec, params)
    torchs = torch.fake_quantize_per_channel_affine(y, scale, zeros, 0, low, high)
    assert torch.allclose(ours, torchs, atol=0, rtol=1e-6)
    ours.sum().backward()
    torchs.sum().backward()
    assert 0 < x.grad.sum() < x.numel() and torch.equal(x.grad, y.grad)


def test_a_learned_step_gets_the_gradient_of_lsq() -> None:
    """LSQ, equation 3: round(v/s) - v/s inside, -Q_N or Q_P outside."""
    scale = torch.full((1, 1), 0.5, requires_grad=True)
    x = torch.tensor([[0.6, -0.9, 9.0, -9.0]])
    fake_quantize(x, QuantSpec("int4", scale="fp32"), Params(scale)).sum().backward()
    assert scale.grad.item() == pytest.approx((1 - 1.2) + (-2 + 1.8) + 7 - 8)
