"""GPTQ's int32 layout: packed value by value as its readers unpack it, with either kind of zero point."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from labkit.quant import QuantizedTensor, QuantSpec, Stats, gptq, rtn
from labkit.quant.gptq_layout import from_gptq, to_gptq


def affine(zeros: list[int], bits: int = 4) -> QuantizedTensor:
    """(32, 64) in two groups of 32, row i with zero point zeros[i % len(zeros)]."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (32, 64), generator=g, dtype=torch.uint8)
    zero = torch.tensor(zeros, dtype=torch.uint8).repeat(32)[:32, None].repeat(1, 2)
    zero[:, 1] = zero[:, 1].flip(0)
    return QuantizedTensor(
        codes, torch.rand(32, 2, generator=g).half(), QuantSpec.parse(f"int{bits} g32 asym"), zero
    )


def read(tensors: dict[str, Tensor], bits: int, plus: int) -> Tensor:
    """The weight (out, in) as a reader computes it, in whole numbers of any length."""

    def numbers(words: list[int], count: int) -> list[int]:
        stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
        return [(stream >> (bits * i)) & (2**bits - 1) for i in range(count)]

    scales, g_idx = tensors["scales"].double(), tensors["g_idx"].tolist()
    inputs, outputs = len(g_idx), scales.shape[1]
    zeros = [numbers(row, outputs) for row in tensors["qzeros"].tolist()]  # (groups, out)
    weight = torch.empty(outputs, inputs, dtype=torch.float64)
    for o in range(outputs):
        for i, code in enumerate(numbers(tensors["qweight"][:, o].tolist(), inputs)):
            group = g_idx[i]
            weight[o, i] = (code - (zeros[group][o] + plus)) * scales[group, o]
    return weight


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_reader_finds_the_weight(bits: int, version: int) -> None:
    top = 2**bits - 1
    tensor = affine([1, top, 2, top - 1] if version == 1 else [0, top, 1, top - 1], bits)
    tensors = to_gptq(tensor, version)
    assert tensors["qweight"].dtype == tensors["qzeros"].dtype == tensors["g_idx"].dtype == torch.int32
    found = read(tensors, bits, plus=1 if version == 1 else 0)
    torch.testing.assert_close(found, tensor.dequantize(torch.float64))
    again = from_gptq(tensors, tensor.spec, version)
    assert torch.equal(again.codes, tensor.codes) and torch.equal(again.zero, tensor.zero)
    assert torch.equal(again.scale, tensor.scale) and again.g_idx is None


def test_words_by_hand() -> None:
    tensors = to_gptq(affine([15]), 1)
    assert tensors["qzeros"].tolist() == [[int.from_bytes(b"\xee" * 4, "little", signed=True)] * 4] * 2
    tensors = to_gptq(affine([15]), 2)
    assert tensors["qzeros"].tolist() == [[-1] * 4] * 2
    tensors = to_gptq(affine([0]), 2)
    assert tensors["qzeros"].tolist() == [[0] * 4] * 2
    codes = affine([1]).codes[5, :8].tolist()
    word = int(to_gptq(affine([1]))["qweight"][0, 5]) & 0xFFFFFFFF
    assert f"{word:08x}" == "".join(f"{code:x}" for code in reversed(codes))


def test_version_1_has_no_place_for_a_zero_point_of_0() -> None:
    with pytest.raises(ValueError, match="4 of 64 are 0: write version 2"):
        to_gptq(affine([0] + [7] * 15), 1)
    # 15 in a file of AutoGPTQ's is a 0 that went through the same subtraction
    tensors = to_gptq(affine([15]), 1)
    tensors["qzeros"][:] = -1
    assert bool((from_gptq(tensors, QuantSpec.parse("int4 g32 asym"), 1).zero == 0).all())


@pytest.mark.parametrize(("version", "stored"), [(1, 7), (2, 8)])
def test_a_symmetric_grid_has_its_zero_in_the_middle(version: int, stored: int) -> None:
    tensor = rtn(
        torch.randn(32, 64, generator=torch.Generator().manual_seed(1)), QuantSpec.parse("int4 g32")
    )
    tensors = to_gptq(tensor, version)
    assert {f"{word & 0xFFFFFFFF:08x}" for word in tensors["qzeros"].flatten().tolist()} == {
        f"{stored}" * 8
    }
    torch.testing.assert_close(read(tensors, 4, plus=2 - version), tensor.dequantize(torch.float64))
    again = from_gptq(tensors, tensor.spec, version)
    assert torch.equal(again.codes, tensor.codes) and again.zero is None
    with pytest.raises(ValueError, match="is it version"):
        from_gptq(tensors, tensor.spec, 3 - version)


def test_act_order_keeps_its_groups() -> None:
    g = torch.Generator().manual_seed(2)
    inputs = torch.randn(128, 64, generator=g) * torch.rand(64, generator=g)
    weight = torch.randn(32, 64, generator=g)
    tensor = gptq(weight, QuantSpec.parse("int4 g32 asym"), Stats.of(inputs), act_order=True)
    tensors = to_gptq(tensor, 2)
    assert torch.equal(tensors["g_idx"], tensor.g_idx)
    torch.testing.assert_close(read(tensors, 4, plus=0), tensor.dequantize(torch.float64))
    assert torch.equal(from_gptq(tensors, tensor.spec, 2).g_idx, tensor.g_idx)


def test_what_does_not_fit_is_refused() -> None:
    weight = torch.randn(32, 64)
    for text in ("nf4 b64", "int5 g32", "int4 g32 asym-float", "int4 2x32", "int4 g32 scale=bf16"):
        with pytest.raises(ValueError, match="the layout holds int2"):
            to_gptq(rtn(weight, QuantSpec.parse(text)))
    with pytest.raises(ValueError, match=r"whole int32 words, found shape \(30, 64\)"):
        to_gptq(rtn(weight[:30], QuantSpec.parse("int4 g32")))
    with pytest.raises(ValueError, match="versions 1 and 2, found 3"):
        to_gptq(affine([1]), 3)
    with pytest.raises(ValueError, match="expected qweight and qzeros of shape"):
        from_gptq(to_gptq(affine([1])), QuantSpec.parse("int4 g16 asym"))
