"""GPTQ by the native loop over columns: the plain loop's codes, on every grid and shape."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from labkit.kernels import build, columns
from labkit.kernels.columns import faster, round_columns
from labkit.quant import METHODS, QuantizedTensor, QuantSpec, Stats, gptq, hessian_error, rtn

GRIDS = ["int4 g64 asym", "int2 g16", "int8 channel", "int3 g24 asym-float", "int4 g1 asym scale=fp32", "int5 8x32"]


def layer(rows: int, in_features: int, seed: int) -> tuple[torch.Tensor, Stats]:
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(in_features, in_features, generator=g) / in_features**0.5
    inputs = torch.randn(4 * in_features, in_features, generator=g) @ (mixed + torch.eye(in_features))
    return torch.randn(rows, in_features, generator=g), Stats.of(inputs)


def assert_alike(
    found: QuantizedTensor, plain: QuantizedTensor, weight: torch.Tensor, stats: Stats
) -> None:
    """The same codes but for a row in fifty, in which a weight stood between two codes and went the other way."""
    other = (found.codes != plain.codes).any(dim=1)
    assert other.sum() <= max(1, len(other) // 50)
    scores = [hessian_error(weight, q, stats.hessian) for q in (found, plain)]
    assert scores[0] == pytest.approx(scores[1], rel=0.05)


@given(
    st.integers(1, 70), st.integers(1, 150), st.integers(0, 10**6), st.sampled_from([1, 7, 128, 200]),
    st.sampled_from(GRIDS), st.booleans(), st.booleans(), st.sampled_from([1, 2]),
)  # fmt: skip
def test_equals_the_plain_loop(
    rows: int,
    in_features: int,
    seed: int,
    block_size: int,
    text: str,
    act_order: bool,
    static: bool,
    threads: int,
):
    weight, stats = layer(rows, in_features, seed)
    weight[: rows // 3, : in_features // 2] = 0  # whole blocks whose scale is 0
    run = partial(
        gptq,
        weight,
        QuantSpec.parse(text),
        stats,
        block_size=block_size,
        act_order=act_order,
        static_groups=static,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_alike(run(columns=round_columns), run(), weight, stats)
    finally:
        torch.set_num_threads(before)


def test_it_is_the_native_loop_that_runs(monkeypatch: pytest.MonkeyPatch):
    weight, stats = layer(20, 300, 0)
    spec = QuantSpec.parse("int4 g64 asym")
    expected = gptq(weight, spec, stats)
    monkeypatch.setattr(columns, "plain", None)
    assert_alike(gptq(weight, spec, stats, columns=round_columns), expected, weight, stats)


@pytest.mark.parametrize("text", ["nf4 g64", "fp4_e2m1 g32"])
def test_other_grids_are_the_plain_loops(text: str):
    weight, stats = layer(20, 96, 0)
    run = partial(gptq, weight, QuantSpec.parse(text), stats)
    assert torch.equal(run(columns=round_columns).codes, run().codes)


def test_so_is_float64():
    weight, stats = layer(20, 96, 0)
    run = partial(gptq, weight.double(), QuantSpec.parse("int4 g32"), stats)
    assert torch.equal(run(columns=round_columns).codes, run().codes)


def test_so_is_everything_without_a_compiler(monkeypatch: pytest.MonkeyPatch):
    weight, stats = layer(20, 96, 0)
    monkeypatch.setattr(columns, "build", SimpleNamespace(why_not=lambda: "no compiler", library=None))
    run = partial(gptq, weight, QuantSpec.parse("int4 g32"), stats)
    assert torch.equal(run(columns=round_columns).codes, run().codes)


def test_only_gptq_has_something_faster():
    assert build.why_not() is None
    for name, found in METHODS.items():
        assert (faster(found) is found) == (name != "gptq")
    assert faster(rtn) is rtn
    made = faster(gptq)
    weight, stats = layer(20, 96, 0)
    spec = QuantSpec.parse("int4 g32")
    assert_alike(
        made(weight, spec, stats, act_order=True), gptq(weight, spec, stats, act_order=True), weight, stats
    )


def test_an_update_of_ones_own_and_other_columns_do_not_go_together():
    weight, stats = layer(4, 32, 0)
    with pytest.raises(ValueError, match="give one of update and columns"):
        gptq(
            weight,
            QuantSpec.parse("int4 g32"),
            stats,
            update=lambda right, err, row: right,
            columns=round_columns,
        )
