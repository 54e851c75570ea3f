"""Integer grids: every code, scale and zero point against plain Python numbers."""

import pytest
import torch
from brute_force import dequantize_block, quantize_block
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from labkit.quant import Params, QuantSpec, encode, fit

BITS = range(2, 9)
KINDS = ["sym", "narrow", "asym"]
NUMBERS = st.floats(-100, 100, width=32, allow_subnormal=False).map(lambda x: x if abs(x) > 1e-3 else 0.0)


def blocks_of(x: Tensor, spec: QuantSpec) -> list[Tensor]:
    """The blocks in the order of the scales, by slicing."""
    if isinstance(spec.block, int):
        return list(x.flatten().split(spec.block))
    rows = spec.block[0] or x.shape[0]
    columns = spec.block[1] or x.shape[1]
    return [part for band in x.split(rows, 0) for part in band.split(columns, 1)]


def check(x: Tensor, spec: QuantSpec) -> None:
    q = encode(x, spec, fit(x, spec))
    scales = q.scale.flatten().tolist()
    zeros = [0] * len(scales) if q.zero is None else q.zero.flatten().tolist()
    wanted = [quantize_block(block.flatten().tolist(), spec) for block in blocks_of(x, spec)]
    assert scales == [scale for scale, _, _ in wanted]
    assert zeros == [zero for _, zero, _ in wanted]
    for block, numbers, (scale, zero, codes) in zip(
        blocks_of(q.codes, spec), blocks_of(q.dequantize(), spec), wanted, strict=True
    ):
        assert block.flatten().tolist() == codes
        assert numbers.flatten().tolist() == dequantize_block(scale, zero, codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", ["tensor", "channel", "g8", "b8", "2x3", "*x1"])
def test_equals_brute_force(bits: int, kind: str, block: str) -> None:
    torch.manual_seed(bits)
    x = torch.randn(5, 27) * torch.logspace(-2, 2, 5)[:, None]  # 27 is no multiple of 8: ragged groups
    for scale in ("fp16", "fp32"):
        check(x, QuantSpec.parse(f"int{bits} {block} {kind} scale={scale}"))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60)
@given(data=st.data())
def test_equals_brute_force_on_any_numbers(kind: str, data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    numbers = data.draw(st.lists(NUMBERS, min_size=rows * columns, max_size=rows * columns))
    bits, block = data.draw(st.integers(2, 8)), data.draw(st.sampled_from(["g4", "b3", "channel", "2x2"]))
    check(torch.tensor(numbers).reshape(rows, columns), QuantSpec.parse(f"int{bits} {block} {kind}"))


def test_halves_go_to_the_even_code() -> None:
    x = torch.tensor([[0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5]])
    symmetric = encode(x, QuantSpec("int8", scale="fp32"), Params(torch.ones(1, 1)))
    assert symmetric.codes.tolist() == [[0, 2, 2, 4, 0, -2, -2]]
    affine = encode(
        x, QuantSpec("int8", zero="int", scale="fp32"), Params(torch.ones(1, 1), torch.tensor([[5]]))
    )
    assert affine.codes.tolist() == [[5, 7, 7, 9, 5, 3, 3]]


def test_numbers_beyond_the_grid_are_clamped() -> None:
    x, one = torch.tensor([[9.0, -9.0, 1e30, -1e30]]), torch.ones(1, 1)
    assert encode(x, QuantSpec("int4", scale="fp32"), Params(one)).codes.tolist() == [[7, -8, 7, -8]]
    narrow = QuantSpec("int4", scale="fp32", narrow=True)
    assert encode(x, narrow, Params(one)).codes.tolist() == [[7, -7, 7, -7]]
    affine = QuantSpec("int4", zero="int", scale="fp32")
    assert encode(x, affine, Params(one, one)).codes.tolist() == [[10, 0, 15, 0]]


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=40)
@given(numbers=st.lists(NUMBERS, min_size=1, max_size=12))
def test_affine_zero_is_exactly_zero_and_the_error_at_most_half_a_step(
    bits: int, numbers: list[float]
) -> None:
    x = torch.tensor([[*numbers, 0.0]])
    q = encode(
        x,
        QuantSpec(f"int{bits}", zero="int", scale="fp32"),
        fit(x, QuantSpec(f"int{bits}", zero="int", scale="fp32")),
    )
    assert q.dequantize()[0, -1] == 0.0
    # The rounded zero point shifts the range by up to half a step, which the outermost code may lose.
    assert float((q.dequantize() - x).abs().max()) <= float(q.scale) * 1.001


def test_a_float_zero_point_covers_a_range_far_from_zero() -> None:
    x = torch.linspace(10, 11, 16)[None]
    affine, real = (QuantSpec("int4", zero=zero, scale="fp32") for zero in ("int", "float"))
    assert float((encode(x, real, fit(x, real)).dequantize() - x).abs().max()) < 1e-5
    assert float((encode(x, affine, fit(x, affine)).dequantize() - x).abs().max()) > 0.3


def test_scales_are_rounded_before_the_codes_are_computed() -> None:
    spec = QuantSpec("int8", scale="bf16")
    q = encode(torch.tensor([[100.0]]), spec, Params(torch.tensor([[1.003]])))
    assert q.scale.dtype == torch.bfloat16 and q.scale.item() == 1.0  # bf16 has no 1.003
    assert q.codes.item() == 100  # and not round(100 / 1.003)
    x = torch.tensor([[1.003, 99.75 * 1.003]])
    assert encode(x, spec, Params(torch.tensor([[1.003]]))).dequantize()[0, 1] == 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_give_the_codes_of_their_values(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, spec = torch.randn(4, 32).to(dtype), QuantSpec.parse("int4 g8 asym")
    q, same = encode(x, spec, fit(x, spec)), encode(x.double(), spec, fit(x.double(), spec))
    assert torch.equal(q.codes, same.codes) and torch.equal(q.scale, same.scale)
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16
