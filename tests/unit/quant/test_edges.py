"""Input that has no ordinary answer: a clear error or the exact result, never a silent NaN."""

import math

import pytest
import torch
from torch import Tensor

from labkit.quant import Params, QuantSpec, encode, fake_quantize, fit, gptq, rtn

SPECS = [
    "int2 g4",
    "int4 g4 narrow",
    "int4 g4 asym",
    "int4 channel asym-float",
    "int8 tensor",
    "nf4 b4",
    "fp8_e4m3 tensor",
    "fp6_e2m3 g4",
    "mxfp4",
    "mxint8",
    "nvfp4",
    "int4 g4 scale=e8m0 asym",
    "nf4 b4 scale=(int8 b256 asym scale=fp32)",
    "nf4 b4 scale=(dynamic8 b256 mean scale=fp32)",
    "fp6_e3m2 g4 scale=e8m0-ceil",
    "fp8_e4m3 g4 scale=e8m0-even",
]


def both_ways(x: Tensor, text: str) -> Tensor:
    spec = QuantSpec.parse(text)
    return encode(x, spec, fit(x, spec)).dequantize()


@pytest.mark.parametrize("text", SPECS)
def test_all_zeros_stay_zeros(text: str) -> None:
    assert torch.equal(both_ways(torch.zeros(3, 10), text), torch.zeros(3, 10))


@pytest.mark.parametrize("text", SPECS)
def test_a_zero_block_beside_others_stays_zero(text: str) -> None:
    x = torch.zeros(3, 64)
    x[1] = torch.linspace(-1, 1, 64)
    back = both_ways(x, text)
    assert torch.equal(back[[0, 2]], torch.zeros(2, 64)) and bool(back.isfinite().all())


@pytest.mark.parametrize(
    "text", [text for text in SPECS if "scale=" not in text and text[:2] not in ("mx", "nv")]
)
@pytest.mark.parametrize("constant", [1.0, -1.0, 0.375, -1000.0, 3.0])
def test_constants_that_the_scale_can_hold_are_exact(text: str, constant: float) -> None:
    x = torch.full((3, 10), constant)
    assert torch.equal(both_ways(x, text), x)


@pytest.mark.parametrize(
    "text", ["int4 g4", "int4 g4 asym", "int4 g4 asym-float", "nf4 b4", "fp4_e2m1 tensor"]
)
def test_any_constant_is_exact_with_fp32_scales(text: str) -> None:
    for constant in (0.1, -math.pi, 1e-30, 3e38):
        x = torch.full((2, 6), constant)
        assert torch.equal(both_ways(x, f"{text} scale=fp32"), x)


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (0, 0), (2, 0, 3)])
def test_empty_tensors_give_empty_tensors(text: str, shape: tuple[int, ...]) -> None:
    spec = QuantSpec.parse(text)
    q = encode(torch.zeros(shape), spec, fit(torch.zeros(shape), spec))
    assert q.codes.shape == shape and q.dequantize().shape == shape
    assert q.scale.shape.numel() == 0
    assert math.isnan(q.bits_per_weight)
    assert type(q).unpack(q.pack()).dequantize().shape == shape


@pytest.mark.parametrize("call", ["fit", "encode"])
def test_nan_and_infinity_are_counted_and_placed(call: str) -> None:
    x = torch.zeros(4, 6)
    x[2, 3], x[3, 0], x[3, 1] = math.inf, math.nan, -math.inf
    spec = QuantSpec.parse("int4 g2")
    with pytest.raises(ValueError, match=r"1 NaN and 2 infinite of 24, the first at index \(2, 3\)"):
        if call == "fit":
            fit(x, spec)
        else:
            encode(x, spec, fit(torch.ones(4, 6), spec))


def test_a_scale_too_large_for_its_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="too large for fp16"):
        fit(torch.tensor([[1e9, 0.0]]), QuantSpec("int4"))
    assert both_ways(torch.tensor([[1e9, 0.0]]), "int4 tensor scale=bf16")[0, 0] == pytest.approx(
        1e9, rel=0.1
    )


def test_a_scale_too_small_for_its_dtype_does_not_erase_the_block() -> None:
    x = torch.tensor([[2e-7, -2e-7, 0.0]])  # absmax / 7.5 is below half the smallest fp16
    back = both_ways(x, "int4 tensor")
    assert float((back - x).abs().max()) <= 2**-25  # half a step of the smallest scale, 2^-24


def test_the_largest_float32_numbers_do_not_overflow_on_the_way() -> None:
    x = torch.tensor([[3e38, -3e38, 1e38]])
    back = both_ways(x, "int8 tensor asym scale=fp32")
    assert bool(back.isfinite().all()) and float((back / x - 1).abs().max()) < 0.02


def test_a_float_zero_point_out_of_reach_is_refused() -> None:
    with pytest.raises(ValueError, match="too large"):
        fit(torch.tensor([[1000.0, 1000.001]]), QuantSpec("int4", zero="float"))


def test_shapes_and_names_that_do_not_fit_are_named() -> None:
    x, spec = torch.randn(4, 8), QuantSpec.parse("int4 g4 asym")
    with pytest.raises(ValueError, match=r"scales of shape \(4, 2\), found \(4, 1\)"):
        encode(x, spec, Params(torch.ones(4, 1), torch.zeros(4, 1)))
    with pytest.raises(ValueError, match="takes zero points, found none"):
        encode(x, spec, Params(torch.ones(4, 2)))
    with pytest.raises(ValueError, match="whole-numbered"):
        encode(x, spec, Params(torch.ones(4, 2), torch.full((4, 2), 0.5)))
    with pytest.raises(ValueError, match="observer must be"):
        fit(x, spec, observer="mimax")
    with pytest.raises(ValueError, match=r"must return lo and hi of shape \(8,\)"):
        fit(x, spec, observer=lambda blocks, spec, weight=None: (blocks.min(), blocks.max()))
    with pytest.raises(ValueError, match="weight must have the shape"):
        fit(x, spec, weight=torch.ones(4))
    with pytest.raises(ValueError, match="floating-point"):
        fit(torch.ones(3, dtype=torch.int32), spec)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_learned_codebook_needs_its_table(bits: int) -> None:
    spec = QuantSpec(f"table{bits}", scale="fp32")
    with pytest.raises(ValueError, match=f"table{bits} has no table yet"):
        fit(torch.ones(1, 4), spec)
    for method in (rtn, gptq):
        with pytest.raises(ValueError, match=f"table{bits} has no table yet"):
            method.check(spec)
    with pytest.raises(ValueError, match=f"needs its codebook.*{2**bits} ascending values"):
        encode(torch.ones(1, 4), spec, Params(torch.ones(1, 1)))
    for wrong in (torch.zeros(2**bits + 1), torch.zeros(1, 1, 2**bits), -torch.arange(2.0**bits)):
        with pytest.raises(ValueError, match=f"must be {2**bits} ascending values"):
            encode(torch.ones(1, 4), spec, Params(torch.ones(1, 1), table=wrong))
    with pytest.raises(ValueError, match=r"as many as .* rows, 1; found 2"):
        encode(torch.ones(1, 4), spec, Params(torch.ones(1, 1), table=torch.zeros(2, 2**bits)))


def test_a_table_for_all_and_one_for_each_row() -> None:
    spec = QuantSpec("table2", scale="fp32")
    x = torch.tensor([[0.1, 0.9, -2.0, 0.4], [9.0, 21.0, 0.0, 14.0]])
    tables = torch.tensor([[-1.0, 0.0, 0.5, 1.0], [5.0, 10.0, 15.0, 20.0]])
    q = encode(x, spec, Params(torch.ones(1, 1), table=tables))
    assert q.codes.tolist() == [[1, 3, 0, 2], [1, 3, 0, 2]]
    assert q.dequantize().tolist() == [[0.0, 1.0, -1.0, 0.5], [10.0, 20.0, 5.0, 15.0]]
    assert torch.equal(fake_quantize(x, spec, q.params), q.dequantize())
    x.requires_grad_()
    fake_quantize(x, spec, q.params).sum().backward()
    assert x.grad.tolist() == [[1, 1, 0, 1], [1, 0, 0, 1]]  # 0 where it is clipped
    one = encode(x.detach(), spec, Params(torch.ones(1, 1), table=tables[0]))
    assert one.codes.tolist() == [[1, 3, 0, 2], [3, 3, 1, 3]]


def test_a_table_of_sixteen_values() -> None:
    spec = QuantSpec("table4", scale="fp32")
    table = torch.linspace(-1, 1, 16) ** 3
    x = torch.linspace(-2, 2, 40)[None]
    q = encode(x, spec, Params(torch.full((1, 1), 2.0), table=table))
    nearest = 2 * table[(x[0, :, None] / 2 - table).abs().argmin(1)]
    assert torch.allclose(q.dequantize()[0], nearest) and q.nbytes == 20 + 4 + 64
