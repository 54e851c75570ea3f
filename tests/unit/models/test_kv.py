from __future__ import annotations

import pytest
import torch

from labkit.models import KVSpec
from labkit.quant import QuantSpec, encode, fit


def test_rounding_is_that_of_the_format() -> None:
    k, v = torch.randn(2, 3, 2, 5, 40)
    assert all(torch.equal(a, b) for a, b in zip(KVSpec().round(k, v), (k, v), strict=True))
    assert torch.equal(KVSpec(key="bf16").round(k, v)[0], k.bfloat16().float())
    for text in ("int8 channel", "int4 g32", "int4 g32 asym scale=fp32", "int2 g8 narrow"):
        spec = QuantSpec.parse(text)
        found = KVSpec("fp16", text).round(k, v)
        assert torch.equal(found[0], k.half().float())
        assert torch.equal(found[1], encode(v, spec, fit(v, spec)).dequantize())
        alone = KVSpec("fp16", text).round(k[1:2, :, 3:4], v[1:2, :, 3:4])[1]
        assert torch.equal(alone, found[1][1:2, :, 3:4])  # a token's scales are its own
    assert KVSpec("int8 channel").round(k.double(), v)[0].dtype == torch.float64


def test_the_gradient_is_straight_through() -> None:
    v = torch.randn(1, 1, 4, 8, requires_grad=True)
    KVSpec(value="int4 channel asym").round(v, v)[1].sum().backward()
    assert v.grad is not None and torch.equal(v.grad, torch.ones_like(v))


def test_one_format_has_one_name() -> None:
    assert KVSpec("int8  1x*", "int4 asym g32 scale=fp16") == KVSpec("int8 channel", "int4 g32 asym")
    assert KVSpec("int8 channel", "int4 g32 asym").bits(64) == (8 + 16 / 64 + 4 + 24 / 32) / 2
    assert KVSpec("fp32", "bf16").bits(64) == 24


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fp8", "kv.value must be one of fp32, fp16, bf16 or a spec of integers: .*'fp8'"),
        ("nf4 g32", "kv.value must be fp32, fp16, bf16, or integers, .* found 'nf4 g32'"),
        ("int4 g32 asym-float", "symmetric or asym"),
        ("int4 g32 scale=e8m0", "with scales in fp32, fp16, bf16"),
        ("int4 g32 scale=(fp8_e4m3 tensor)", "with scales in fp32, fp16, bf16"),
        ("int8 tensor", "a token is written once, .* found 'int8 tensor', whose blocks span several tokens"),
        ("int8", "span several tokens"),
        ("int4 32x1", "span several tokens"),
        ("int4 b64", "span several tokens"),
        (8, "kv.value must be one of"),
        (["int8", "channel"], "kv.value must be one of"),
    ],
)
def test_what_cannot_be_kept_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        KVSpec("fp16", text)
