"""Attention over coded keys and values beside a softmax in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import DEVICE, DTYPES, exact, of_programs, quantized, randn, there
from torch import Tensor

from labkit.kernels.gpu.attention import Held, attend
from labkit.quant import QuantizedTensor, QuantSpec, encode, fit

pytestmark = pytest.mark.gpu

GRIDS = [
    "int8 channel",
    "int8 channel asym",
    "int4 channel",
    "int4 channel asym scale=fp32",
    "int4 g32 asym",
    "int8 g16",
    "int4 32x1 asym",
    "int4 tensor",
    "int4 channel narrow",
    "int8 channel narrow",
]


def reference(q: Tensor, keys: QuantizedTensor, values: QuantizedTensor, lengths: Tensor) -> Tensor:
    """One request and one head at a time, over no more than its own tokens."""
    k, v, (batch, heads, width) = exact(keys), exact(values), q.shape
    y = torch.zeros(batch, heads, width, dtype=torch.float64, device=q.device)
    for b in range(batch):
        n = int(lengths[b])
        for head in range(heads if n else 0):
            shared = head // (heads // k.shape[1])
            scores = k[b, shared, :n] @ q[b, head].double() / width**0.5  # (n,)
            y[b, head] = scores.softmax(dim=0) @ v[b, shared, :n]
    return y


def off(y: Tensor, wanted: Tensor, values: QuantizedTensor) -> float:
    return float((y.double() - wanted).abs().max() / exact(values).abs().max())


@pytest.mark.parametrize(("keys", "values"), zip(GRIDS, reversed(GRIDS), strict=True))
def test_every_grid(keys: str, values: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    k, v = quantized(keys, 2, 2, 75, 64), quantized(values, 2, 2, 75, 64)
    q, lengths = randn(2, 6, 64, dtype=dtype), torch.tensor([75, 40], dtype=torch.int32, device=DEVICE)
    y = attend(q, Held.of(k), Held.of(v), lengths)
    assert y.shape == (2, 6, 64) and y.dtype == dtype
    assert off(y, reference(q, k, v, lengths), v) < DTYPES[dtype]
    assert torch.equal(y, attend(q, Held.of(k), Held.of(v), lengths)), (
        "the same input must give the same bits"
    )


@settings(max_examples=15)
@given(
    grids=st.tuples(st.sampled_from(GRIDS), st.sampled_from(GRIDS)),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 7, 17]),
    context=st.integers(1, 140),
    width=st.sampled_from([8, 24, 64, 80]),
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=2),
    programs=st.sampled_from([1, 6, 256]),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_odd_shapes(
    grids: tuple[str, str], kv_heads: int, group: int, context: int, width: int, lengths: list[int],
    programs: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    torch.manual_seed(context)
    k, v = (quantized(text, len(lengths), kv_heads, context, width) for text in grids)
    q, taken = (
        randn(len(lengths), kv_heads * group, width, dtype=dtype),
        torch.tensor(lengths).clamp(max=context),
    )
    with of_programs(programs):
        y = attend(q, Held.of(k), Held.of(v), taken.int().to(DEVICE))
    assert off(y, reference(q, k, v, taken), v) < DTYPES[dtype]


@pytest.mark.parametrize(
    ("keys", "values"),
    [("int4 32x1 asym", "int4 channel asym"), ("int8 channel", "int8 channel asym"), ("int4 channel", "int4 32x1")],
)
@pytest.mark.parametrize(("width", "programs"), [(64, 1), (128, 6), (256, 256)])
def test_contexts_of_many_steps_and_parts(
    keys: str, values: str, width: int, programs: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    k, v = quantized(keys, 1, 2, 416, width), quantized(values, 1, 2, 416, width)
    q, lengths = randn(1, 4, width, dtype=dtype), torch.tensor([400], dtype=torch.int32, device=DEVICE)
    with of_programs(programs):
        y = attend(q, Held.of(k), Held.of(v), lengths)
    assert off(y, reference(q, k, v, lengths), v) < DTYPES[dtype]


def test_nothing_to_attend_to_and_other_dtypes() -> None:
    k, v = (Held.of(quantized("int8 channel", 1, 2, 8, 16)) for _ in range(2))
    q = randn(1, 4, 16)
    y = attend(q, k, v)
    for dtype in (torch.float16, torch.bfloat16):
        half = attend(q.to(dtype), k, v)
        assert half.dtype == dtype and float((half.float() - y).abs().max()) < 0.05
    assert attend(q[:0], replace(k, shape=(0, 2, 8, 16)), replace(v, shape=(0, 2, 8, 16))).shape == (0, 4, 16)


def test_more_parts_than_the_second_kernel_takes_at_once() -> None:
    torch.manual_seed(0)
    k, v, q = (
        quantized("int8 channel", 1, 1, 4500, 16),
        quantized("int8 channel", 1, 1, 4500, 16),
        randn(1, 1, 16),
    )
    assert off(attend(q, Held.of(k), Held.of(v)), reference(q, k, v, torch.tensor([4500])), v) < 5e-6


def test_one_token_far_above_the_others_gives_its_value_alone() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1, 100, 32)
    x[0, 0, 70] *= 200
    spec = QuantSpec.parse("int8 channel scale=fp32")
    k, v = there(encode(x, spec, fit(x, spec))), quantized("int8 channel", 1, 1, 100, 32)
    q = exact(k)[:, :, 70].float()
    y = attend(q, Held.of(k), Held.of(v), scale=1.0)
    assert off(y, exact(v)[:, :, 70], v) < 1e-6


def test_what_lies_behind_the_end_does_not_count() -> None:
    torch.manual_seed(0)
    k, v, q = (
        quantized("int8 channel", 1, 2, 90, 32),
        quantized("int8 channel", 1, 2, 90, 32),
        randn(1, 2, 32),
    )
    lengths = torch.tensor([50], dtype=torch.int32, device=DEVICE)
    before = attend(q, Held.of(k), Held.of(v), lengths)
    k.codes[:, :, 50:], v.codes[:, :, 50:] = 127, -128
    assert isinstance(v.scale, Tensor)
    v.scale.view(1, 2, 90)[:, :, 50:] = torch.inf
    assert torch.equal(attend(q, Held.of(k), Held.of(v), lengths), before)


def test_shapes_and_grids_that_do_not_fit_are_refused() -> None:
    k, v = Held.of(quantized("int8 channel", 1, 2, 8, 16)), Held.of(quantized("int8 channel", 1, 2, 9, 16))
    with pytest.raises(ValueError, match="does not fit"):
        attend(randn(1, 2, 16), k, v)
    with pytest.raises(ValueError, match="does not fit"):
        attend(randn(1, 3, 16), k, k)
    with pytest.raises(ValueError, match="int4 or int8"):
        Held.of(quantized("int3 channel", 1, 2, 8, 16))
    with pytest.raises(ValueError, match="int4 or int8"):
        Held.of(quantized("int8 channel", 8, 16))
