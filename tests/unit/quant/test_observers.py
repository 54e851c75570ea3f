"""Each observer's criterion against a brute force written in numpy, block by block and range by range."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from labkit.quant import OBSERVERS, QuantSpec, encode, fit, mse, rtn, values_of
from labkit.quant.observers import entropy, minmax, percentile
from labkit.quant.observers import mse as mse_observer

RATIOS = [r / 100 for r in range(1, 101)]


def blocks_of(kind: str, count: int, size: int, seed: int = 0) -> Tensor:
    """float64 blocks of both signs: (count, size)."""
    rng = np.random.default_rng(seed)
    x = {
        "normal": lambda: rng.normal(size=(count, size)),
        "heavy": lambda: rng.standard_t(2, size=(count, size)),
        "shifted": lambda: rng.normal(size=(count, size)) + 1.5,
        "outlier": lambda: rng.normal(size=(count, size)) + 30 * (np.arange(size) == 5),
    }[kind]()
    return torch.from_numpy(x * np.exp(rng.normal(size=(count, 1))))


def by_hand(x: np.ndarray, lo: float, hi: float, spec: QuantSpec) -> np.ndarray:
    """x on the grid that covers lo to hi, from the definitions: scales in fp16, half to even."""
    if spec.format == "nf4":
        table = values_of("nf4").double().numpy()
        scale = float(np.float16(max(-lo, hi)))
        return table[np.abs(x[:, None] / scale - table).argmin(axis=1)] * scale
    bits = spec.bits
    if spec.zero == "none":
        steps = 2 ** (bits - 1) - 1 if spec.narrow else (2**bits - 1) / 2
        scale, zero = float(np.float16(max(-lo, hi) / steps)), 0.0
        lowest, highest = -(2 ** (bits - 1)) + spec.narrow, 2 ** (bits - 1) - 1
    else:
        lo, hi, lowest, highest = min(lo, 0), max(hi, 0), 0, 2**bits - 1
        scale = float(np.float16((hi - lo) / highest))
        zero = float(np.clip(np.round(-lo / scale), 0, highest))
    return (np.clip(np.round(x / scale) + zero, lowest, highest) - zero) * scale


def squared_error(x: np.ndarray, lo: float, hi: float, spec: QuantSpec, weight: np.ndarray) -> float:
    return float((weight * (x - by_hand(x, lo, hi, spec)) ** 2).sum())


def clipped(x: np.ndarray, a: float) -> tuple[float, float]:
    return float(np.clip(x.min(), -a, a)), float(np.clip(x.max(), -a, a))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted", "outlier"])
@pytest.mark.parametrize(
    "text", ["int2 g64", "int4 g64", "int4 g64 narrow", "int4 g64 asym", "int8 g64", "nf4 g64"]
)
def test_mse_is_the_least_of_a_brute_force(text: str, kind: str, weighted: bool):
    spec = QuantSpec.parse(text)
    x = blocks_of(kind, 4, 64)
    weight = torch.rand(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) ** 4
    los, his = mse_observer(x, spec, weight if weighted else None)
    for row, importance, lo, hi in zip(x.numpy(), weight.numpy(), los, his, strict=True):
        importance = importance if weighted else np.ones_like(row)
        tried = [squared_error(row, *clipped(row, r * np.abs(row).max()), spec, importance) for r in RATIOS]
        assert squared_error(row, float(lo), float(hi), spec, importance) <= min(tried) * (1 + 1e-6)


@pytest.mark.parametrize("text", ["int3 g256", "int4 g256", "int4 g256 asym"])
def test_a_finer_search_finds_little_more(text: str):
    # RATIOS are steps of 1 %: how much is lost to a search in steps of 0.02 %?
    spec, total, best = QuantSpec.parse(text), 0.0, 0.0
    x = blocks_of("normal", 4, 256)
    for row, lo, hi in zip(x.numpy(), *mse_observer(x, spec), strict=True):
        one = np.ones_like(row)
        total += squared_error(row, float(lo), float(hi), spec, one) / np.square(row).sum()
        tried = [
            squared_error(row, *clipped(row, r * np.abs(row).max()), spec, one)
            for r in np.linspace(0.2, 1, 4001)
        ]
        best += min(tried) / np.square(row).sum()
    assert best <= total <= 1.02 * best


def divergence(x: np.ndarray, a: float, spec: QuantSpec, bins: int) -> float:
    """Migacz's criterion for the range of x clipped to [-a, a], in loops over the histogram."""
    folded = spec.zero == "none"
    values = np.abs(x) if folded else x
    start, stop = (0 if folded else values.min()), values.max()
    counts, edges = np.histogram(values[values != 0], bins=bins, range=(start, stop))
    centres = (edges[:-1] + edges[1:]) / 2
    lo, hi = max(start, -a), min(stop, a)
    inside = [i for i in range(bins) if lo <= centres[i] <= hi]
    if len(inside) < (2 ** (spec.bits - 1) if folded else 2**spec.bits):
        return np.inf
    p = {i: float(counts[i]) for i in inside}
    p[inside[-1]] += counts[inside[-1] + 1 :].sum()
    p[inside[0]] += counts[: inside[0]].sum()
    rounded = by_hand(centres, -hi if folded else lo, hi, spec)
    q = {}
    for value in set(rounded[inside]):
        sharing = [i for i in inside if rounded[i] == value]
        occupied = [i for i in sharing if p[i] > 0]
        q |= {i: counts[sharing].sum() / len(occupied) for i in occupied}
    norm_p, norm_q = sum(p.values()), sum(q.values())
    terms = [
        (p[i] / norm_p) * np.log((p[i] / norm_p) / (q[i] / norm_q)) if q[i] > 0 else np.inf
        for i in inside
        if p[i] > 0
    ]
    return float(sum(terms))


@pytest.mark.parametrize("kind", ["normal", "heavy", "shifted", "outlier", "relu"])
@pytest.mark.parametrize("text", ["int4 channel", "int8 channel narrow", "int4 channel asym"])
def test_entropy_is_the_least_of_a_brute_force(text: str, kind: str):
    spec, bins = QuantSpec.parse(text), 512
    x = blocks_of("normal" if kind == "relu" else kind, 2, 5000, seed=3)
    if kind == "relu":
        x = x.clamp(min=0)
    los, his = entropy(x, spec, bins=bins)
    for row, lo, hi in zip(x.numpy(), los, his, strict=True):
        absmax = np.abs(row).max()
        tried = {r: divergence(row, r * absmax, spec, bins) for r in RATIOS}
        chosen = float(max(-lo, hi)) / absmax
        found = tried[min(RATIOS, key=lambda r: abs(r - chosen))]
        assert found <= min(tried.values()) * (1 + 1e-6)


def test_entropy_clips_a_lone_outlier_and_counts_weights():
    x = blocks_of("outlier", 4, 4000)
    spec = QuantSpec.parse("int8 channel")
    body = x.clone()
    body[:, 5] = 0
    assert (entropy(x, spec)[1] < 1.3 * body.abs().amax(dim=1)).all()
    heavy = torch.ones_like(x)
    heavy[:, 5] = 4000  # half of all: now it matters
    assert torch.equal(entropy(x, spec, heavy)[1], x.abs().amax(dim=1))


@pytest.mark.parametrize("keep", [50.0, 90.0, 99.9, 100.0])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_percentile_is_numpys(keep: float, size: int):
    x = blocks_of("heavy", 5, size)
    lo, hi = percentile(x, QuantSpec.parse("int4 channel"), keep=keep)
    a = torch.maximum(lo.abs(), hi.abs())
    np.testing.assert_allclose(a, np.percentile(np.abs(x.numpy()), keep, axis=1), rtol=1e-12)
    lo, hi = percentile(x, QuantSpec.parse("int4 channel asym"), keep=keep)
    np.testing.assert_allclose(hi, np.percentile(x.numpy(), keep, axis=1), rtol=1e-12)
    np.testing.assert_allclose(lo, np.percentile(x.numpy(), 100 - keep, axis=1), rtol=1e-12, atol=1e-12)


def test_percentile_keeps_99_9_percent_by_default():
    x = torch.arange(10_001, dtype=torch.float64)[None]
    assert float(percentile(x, QuantSpec.parse("int8 tensor"))[1]) == pytest.approx(9991 - 1, abs=1e-6)


def test_minmax():
    x = torch.tensor([[1.0, -3.0, 2.0], [5.0, 5.0, 5.0]])
    lo, hi = minmax(x, QuantSpec.parse("int4 channel"))
    assert (lo.tolist(), hi.tolist()) == ([-3, 5], [2, 5])


@pytest.mark.parametrize("observer", [minmax, percentile])
def test_an_importance_that_would_be_ignored_is_an_error(observer: Callable):
    with pytest.raises(ValueError, match=f"'{observer.__name__}' takes no importance weight"):
        fit(torch.ones(2, 4), QuantSpec.parse("int4 channel"), observer, weight=torch.ones(4))


@pytest.mark.parametrize(
    "text",
    ["int4 g48", "int4 g48 asym", "int4 g48 asym-float", "nf4 b48", "nvfp4"],
)
def test_mse_through_fit_is_never_worse_than_minmax(text: str):
    # 100 columns: the last group is ragged
    spec, x = QuantSpec.parse(text), blocks_of("heavy", 6, 100)
    assert mse(x, rtn(x, spec, observer="mse")) < mse(x, rtn(x, spec))


def test_importance_moves_the_range_to_what_matters():
    spec, x = QuantSpec.parse("int3 tensor"), torch.tensor([[10.0, 0.9, -1.1, 0.3, -0.8, 1.0, -0.2, 0.6]])
    importance = torch.tensor([1e-6, 1, 1, 1, 1, 1, 1, 1])
    plain = encode(x, spec, fit(x, spec, "mse")).dequantize()
    weighted = encode(x, spec, fit(x, spec, "mse", weight=importance)).dequantize()
    assert abs(float(plain[0, 0]) - 10) < 2
    assert float((weighted - x)[0, 1:].abs().max()) < float((plain - x)[0, 1:].abs().max()) / 2


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("text", ["int4 channel", "int4 channel asym", "int4 channel asym-float"])
def test_constant_and_zero_blocks_are_exact(name: str, text: str):
    x = torch.tensor([[0.0] * 6, [2.5] * 6, [-0.75] * 6])
    spec = QuantSpec.parse(text)
    assert torch.equal(rtn(x, spec, observer=name).dequantize(), x)


@pytest.mark.parametrize("name", OBSERVERS)
def test_blocks_do_not_see_each_other(name: str):
    spec = QuantSpec.parse("int4 channel asym")
    x = blocks_of("heavy", 258, 100)  # more than entropy takes at once
    observer = partial(entropy, bins=100) if name == "entropy" else OBSERVERS[name]
    lo, hi = observer(x, spec)
    for row in (0, 77, 257):
        alone = observer(x[row : row + 1], spec)
        assert (float(alone[0]), float(alone[1])) == (float(lo[row]), float(hi[row]))


def test_an_observer_of_ones_own():
    spec, x = QuantSpec.parse("int4 g8"), blocks_of("normal", 4, 16)
    assert torch.equal(
        fit(x, spec, partial(percentile, keep=100.0)).scale,
        fit(x, spec, lambda b, s, w=None: (b.amin(1), b.amax(1))).scale,
    )
    with pytest.raises(ValueError, match="entropy"):
        fit(x, spec, "entorpy")
