"""QuantizedTensor: to bytes and back, and how many there are."""

import json
from dataclasses import replace

import pytest
import torch
from brute_force import pack_row
from safetensors.torch import load, save

from labkit.quant import Packed, Params, QuantizedTensor, QuantSpec, encode, fit, values_of

SPECS = [
    *(f"int{bits} g5 {kind}" for bits in range(2, 9) for kind in ("sym", "asym")),
    "int4 channel asym-float scale=bf16",
    "nf4 b64 scale=fp32",
    "nf4 b8 scale=(int8 b256 asym scale=fp32)",
    "nf4 b8 scale=(dynamic8 b3 mean scale=fp32)",
    "dynamic8 b16 mean",
    "mxfp6_e3m2",
    "fp4_e2m1 g32 scale=e8m0-even",
    "fp8_e5m2 2x4",
    "fp6_e3m2 *x1",
    "mxfp4",
    "mxfp6_e2m3",
    "nvfp4",
]


def quantized(text: str, shape: tuple[int, ...] = (6, 23)) -> QuantizedTensor:
    torch.manual_seed(0)
    x, spec = torch.randn(shape), QuantSpec.parse(text)
    return encode(x, spec, fit(x, spec))


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("shape", [(6, 23), (7,), (2, 3, 8)])
def test_through_a_file_and_back(text: str, shape: tuple[int, ...]) -> None:
    q = quantized(text, shape)
    packed = q.pack()
    again = Packed(load(save(packed.tensors)), json.loads(json.dumps(packed.metadata)))
    back = QuantizedTensor.unpack(again)
    assert back.spec == q.spec and back.shape == q.shape and back.codes.dtype == q.codes.dtype
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.dequantize(), q.dequantize())
    assert q.nbytes == packed.nbytes == sum(t.numel() * t.element_size() for t in again.tensors.values())


def test_the_bytes_of_symmetric_codes_carry_an_offset() -> None:
    q = quantized("int3 tensor")
    assert q.pack().tensors["codes"].tolist() == [
        pack_row([c + 4 for c in row], 3) for row in q.codes.tolist()
    ]


def test_the_bytes_of_affine_codes_and_zero_points() -> None:
    q = quantized("int5 g5 asym")
    tensors = q.pack().tensors
    assert tensors["codes"].tolist() == [pack_row(row, 5) for row in q.codes.tolist()]
    assert tensors["zero"].tolist() == pack_row(q.zero.flatten().tolist(), 5)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("int4 g64", 4 + 16 / 64),
        ("int4 g64 asym", 4 + (16 + 4) / 64),
        ("int3 g32 asym", 3 + (16 + 3) / 32),
        ("int8 channel scale=fp32", 8 + 32 / 256),
        ("nf4 b64 scale=fp32", 4.5),
        ("mxfp4", 4.25),
        ("mxfp8_e4m3", 8.25),
        ("nvfp4", 4.5 + 32 / (16 * 256)),
        ("nf4 b64 scale=(int8 b256 scale=fp32)", 4 + 8 / 64 + 32 / (16 * 256)),
        ("nf4 b64 scale=(dynamic8 b256 mean scale=fp32)", 4 + 8 / 64 + (32 + 32) / (16 * 256)),
    ],
)
def test_bits_per_weight_by_hand(text: str, bits: float) -> None:
    assert quantized(text, (16, 256)).bits_per_weight == bits


def test_g_idx_sends_each_column_to_its_group() -> None:
    spec = QuantSpec.parse("int8 g2 scale=fp32")
    params = Params(torch.tensor([[1.0, 10.0], [2.0, 20.0]]))
    q = encode(torch.tensor([[3.0, 4.0, 50.0, 60.0], [6.0, 8.0, 100.0, 120.0]]), spec, params)
    order = torch.tensor([2, 0, 3, 1])
    scattered = replace(q, codes=q.codes[:, order], g_idx=torch.tensor([1, 0, 1, 0], dtype=torch.int32))
    assert scattered.dequantize().tolist() == [[50.0, 3.0, 60.0, 4.0], [100.0, 6.0, 120.0, 8.0]]
    back = QuantizedTensor.unpack(scattered.pack())
    assert torch.equal(back.dequantize(), scattered.dequantize())
    assert scattered.nbytes == q.nbytes + 4 * 4 == scattered.pack().nbytes


def test_outliers_replace_what_the_codes_say() -> None:
    q = quantized("int4 g5")
    kept = torch.tensor([99.0, -99.0], dtype=torch.float16)
    with_outliers = replace(q, outliers=(torch.tensor([0, 24]), kept))
    wanted = q.dequantize()
    wanted[0, 0], wanted[1, 1] = 99, -99
    assert torch.equal(with_outliers.dequantize(), wanted)
    assert torch.equal(QuantizedTensor.unpack(with_outliers.pack()).dequantize(), wanted)
    assert with_outliers.nbytes == q.nbytes + 2 * (8 + 2) == with_outliers.pack().nbytes


def test_double_quantized_scales_are_those_of_the_inner_grid() -> None:
    torch.manual_seed(1)
    x = torch.randn(8, 256)
    inner = QuantSpec.parse("int8 b256 asym scale=fp32")
    nested = QuantSpec("nf4", 64, scale=inner)
    q = encode(x, nested, fit(x, nested))
    absmax = x.reshape(-1, 64).abs().amax(1)
    assert torch.equal(q.scale.codes, encode(absmax, inner, fit(absmax, inner)).codes)
    # Codes belong to the scales as stored: encoding with those, given plainly, changes nothing.
    plain = QuantSpec("nf4", 64, scale="fp32")
    assert torch.equal(encode(x, plain, Params(q.scale.dequantize())).codes, q.codes)


@pytest.mark.parametrize("seed", range(5))
def test_nvfp4_by_its_definition(seed: int) -> None:
    """One fp32 scale, amax / (448 * 6), so that the block scales, absmax / 6, reach 448 in fp8_e4m3."""
    torch.manual_seed(seed)
    x, spec = torch.randn(4, 64), QuantSpec.parse("nvfp4")
    q = encode(x, spec, fit(x, spec))
    whole = (x.abs().max().double() / (448 * 6)).float()
    blocks = x.reshape(4, 4, 16).abs().amax(2) / 6
    wanted = (blocks / whole).to(torch.float8_e4m3fn)
    assert q.scale.scale.dtype == torch.float32 and q.scale.scale.item() == whole.item()
    assert torch.equal(q.scale.codes, wanted.view(torch.uint8))
    assert q.scale.dequantize().max() == 448 * whole
    block_scale = (wanted.float() * whole).repeat_interleave(16, dim=1)
    values = values_of("fp4_e2m1")
    nearest = (x[..., None] / block_scale[..., None] - values).abs().amin(dim=-1)
    torch.testing.assert_close((q.dequantize() - x).abs(), nearest * block_scale, atol=1e-6, rtol=1e-5)


def test_nvfp4_of_a_zero_tensor_and_of_zero_blocks() -> None:
    spec = QuantSpec.parse("nvfp4")
    x = torch.zeros(2, 48)
    q = encode(x, spec, fit(x, spec))
    assert torch.equal(q.dequantize(), x) and q.scale.scale.item() == 0
    x[0, :16] = torch.linspace(-6, 6, 16)
    q = encode(x, spec, fit(x, spec))
    assert torch.equal(q.dequantize()[:, 16:], x[:, 16:]) and q.scale.codes[0, 1] == 0
    assert q.dequantize()[0, [0, 15]].tolist() == [-6, 6]


def test_damaged_parts_are_refused() -> None:
    packed = quantized("int4 g5").pack()
    with pytest.raises(ValueError, match="'codes'"):
        QuantizedTensor.unpack(Packed({}, packed.metadata))
    with pytest.raises(ValueError, match=r"must be \(6, 12\) bytes, found \(6, 11\)"):
        QuantizedTensor.unpack(
            Packed({**packed.tensors, "codes": packed.tensors["codes"][:, 1:]}, packed.metadata)
        )


def test_repr_says_what_it_is() -> None:
    assert (
        repr(quantized("int4 g64", (2, 64)))
        == "QuantizedTensor(int4 g64, shape=(2, 64), 4.25 bits per weight)"
    )
