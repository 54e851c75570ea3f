"""Learned codebooks against the exact optimum of one dimension, numpy's quantiles and bytes by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from labkit.quant import (
    QuantizedTensor,
    QuantSpec,
    Stats,
    kmeans,
    lloyd,
    near_optimal,
    quantile,
    squeezellm,
)

METHODS = {"kmeans": kmeans, "squeezellm": squeezellm, "quantile": quantile}
KINDS = ["normal", "heavy", "two humps", "outlier", "few values"]


def numbers(kind: str, rows: int, n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = {
        "normal": lambda: rng.normal(size=(rows, n)),
        "heavy": lambda: rng.standard_t(2, size=(rows, n)),
        "two humps": lambda: rng.normal(size=(rows, n)) * 0.1 + rng.choice([-1, 1], size=(rows, n)),
        "outlier": lambda: rng.normal(size=(rows, n)) + 1e5 * (np.arange(n) == 5),
        "few values": lambda: rng.integers(0, 6, size=(rows, n)) / 4,
    }[kind]()
    return x.astype(np.float32)


def importances(kind: str, shape: tuple[int, int], seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return {
        "alike": lambda: np.ones(shape),
        "squares": lambda: rng.normal(size=shape) ** 2,
        "wild": lambda: np.exp(4 * rng.normal(size=shape)),
        "mostly none": lambda: rng.normal(size=shape) ** 2 * (rng.random(shape) < 0.2),
    }[kind]()


def least_error(x: np.ndarray, w: np.ndarray, k: int) -> float:
    """The least ``sum w (x - c)^2`` over all choices of k centres: of sorted numbers the best clusters are
    runs of neighbours, and the best k runs of the first j numbers end with one run after the best k - 1.
    """
    order = np.argsort(x, kind="stable")
    x, w = x[order].astype(np.float64), w[order]
    n = len(x)
    one = np.full((n + 1, n + 1), np.inf)  # one[i, j]: the error of the numbers i to j - 1 as one cluster
    for i in range(n + 1):
        mass, moment, square = (np.concatenate([[0], np.cumsum(w[i:] * x[i:] ** e)]) for e in range(3))
        mean = np.divide(moment, mass, out=np.zeros_like(mass), where=mass > 0)
        one[i, i:] = np.maximum(square - mean * moment, 0)
    best = one[0]
    for _ in range(k - 1):
        best = (best[:, None] + one).min(axis=0)
    return float(best[n])


def error_of(x: np.ndarray, w: np.ndarray, centres: np.ndarray) -> float:
    return float((w * ((x[:, None] - centres[None, :]) ** 2).min(axis=1)).sum())


@pytest.mark.parametrize("weights", ["alike", "squares", "wild", "mostly none"])
@pytest.mark.parametrize("kind", KINDS)
def test_within_two_percent_of_the_exact_optimum(kind: str, weights: str) -> None:
    x = numbers(kind, 6, 576)
    w = importances(weights, x.shape)
    for k in (4, 8, 16):
        found = near_optimal(torch.from_numpy(x), k, torch.from_numpy(w)).numpy()
        for row, importance, centres in zip(x, w, found, strict=True):
            least, error = least_error(row, importance, k), error_of(row, importance, centres)
            slack = 1e-12 * float((importance * row.astype(np.float64) ** 2).sum())
            assert least - slack <= error <= 1.02 * least + slack
            assert (np.diff(centres) >= 0).all()


@pytest.mark.parametrize("n", [1, 3, 16, 17, 100, 127, 128, 129, 130])
def test_any_number_of_numbers(n: int) -> None:
    x = numbers("heavy", 5, n)
    found = near_optimal(torch.from_numpy(x), 16).numpy()
    for row, centres in zip(x, found, strict=True):
        assert error_of(row, np.ones(n), centres) <= 1.02 * least_error(row, np.ones(n), 16) + 1e-12


def test_many_problems_are_as_many_single_ones() -> None:
    x = torch.from_numpy(numbers("heavy", 150, 70))
    w = torch.from_numpy(importances("squares", (150, 70)))
    together = near_optimal(x, 8, w)
    for i in (0, 63, 64, 127, 128, 149):
        assert torch.equal(near_optimal(x[i : i + 1], 8, w[i : i + 1])[0], together[i])


def test_a_whole_matrix_as_one_problem() -> None:
    """Too large for the exact optimum: a fine histogram's is a lower bound, by the width of its bins."""
    x = numbers("normal", 1, 200_000)
    found = near_optimal(torch.from_numpy(x), 16).numpy()[0]
    counts, edges = np.histogram(x[0], bins=600)
    centres = (edges[1:] + edges[:-1]) / 2
    inside = (edges[1] - edges[0]) ** 2 / 12 * counts.sum()
    assert error_of(x[0], np.ones(x.shape[1]), found) <= 1.02 * (least_error(centres, counts, 16) + inside)


def test_lloyd_by_hand() -> None:
    x = torch.tensor([[11.0, 0.0, 10.0, 1.0, 6.0, 12.0]])
    # The middle of 0 and 12 is 6, which goes to the lower: means 7/3 and 11; their middle, 6.67, changes nothing.
    assert lloyd(x, torch.tensor([[0.0, 12.0]])).tolist() == [[pytest.approx(7 / 3), 11.0]]
    # A heavy 6 draws the mean to itself: (0 + 1 + 6 * 10) / 12.
    heavy = torch.tensor([[1.0, 1.0, 1.0, 1.0, 10.0, 1.0]])
    assert lloyd(x, torch.tensor([[0.0, 12.0]]), heavy).tolist() == [[pytest.approx(61 / 12), 11.0]]
    # Nothing is nearest to 100: it stays. One iteration is one assignment and one mean.
    assert lloyd(x, torch.tensor([[0.0, 12.0, 100.0]])).tolist() == [[pytest.approx(7 / 3), 11.0, 100.0]]
    assert lloyd(x, torch.tensor([[0.0, 1.0]]), iterations=1).tolist() == [[0.0, 8.0]]
    # From there: 0 and 1 | 6 to 12, middle 5.1; then nothing moves.
    assert lloyd(x, torch.tensor([[0.0, 1.0]])).tolist() == [[0.5, 9.75]]
    # In float64 a sum over both loses half of the small weight; the centre still lies on its number.
    assert lloyd(
        torch.tensor([[1.0, 5.0]]), torch.tensor([[1.0, 5.0]]), torch.tensor([[1e16, 3.0]])
    ).tolist() == [[1.0, 5.0]]


def table_error(q: QuantizedTensor, W: Tensor, w: np.ndarray) -> float:
    return float((w * (q.dequantize(torch.float64) - W.double()).numpy() ** 2).sum())


@pytest.mark.parametrize("weights", ["alike", "squares"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_row_has_its_own_near_optimal_values(bits: int, weights: str) -> None:
    x = numbers("heavy", 5, 200)
    w = importances(weights, x.shape)
    spec = QuantSpec.parse(f"table{bits} tensor scale=fp32")
    method = kmeans if weights == "alike" else squeezellm
    q = method(torch.from_numpy(x), spec, Stats(torch.zeros(0), 0, fisher=torch.from_numpy(w)))
    assert q.table is not None and q.table.shape == (5, 2**bits)
    least = sum(least_error(row, importance, 2**bits) for row, importance in zip(x, w, strict=True))
    assert least * (1 - 1e-5) <= table_error(q, torch.from_numpy(x), w) <= 1.02 * least


@pytest.mark.parametrize("weights", ["alike", "squares"])
def test_groups_count_by_the_squares_of_their_scales(weights: str) -> None:
    """The optimum over values in units of the scales, of the error in units of the weights."""
    x = numbers("normal", 4, 48) * np.repeat(np.float32([1, 30, 0.1, 5]), 12)
    w = importances(weights, x.shape)
    spec = QuantSpec.parse("table3 g12 scale=fp32")
    method = kmeans if weights == "alike" else squeezellm
    stats = Stats(torch.zeros(0), 0, fisher=torch.from_numpy(w))
    q = method(torch.from_numpy(x), spec, stats, codebook="tensor")
    assert q.table is not None and q.table.shape == (8,)
    scale = np.abs(x.reshape(4, 4, 12)).max(axis=2).repeat(12).reshape(x.shape)
    assert np.array_equal(q.scale.numpy().repeat(12).reshape(x.shape), scale)
    least = least_error((x / scale).ravel(), (w * scale.astype(np.float64) ** 2).ravel(), 8)
    assert least * (1 - 1e-5) <= table_error(q, torch.from_numpy(x), w) <= 1.02 * least


def test_sensitivity_pays() -> None:
    W = torch.from_numpy(numbers("normal", 8, 576))
    w = importances("wild", W.shape)
    spec = QuantSpec.parse("table3 tensor")
    plain, sensitive = kmeans(W, spec), squeezellm(W, spec, Stats(torch.zeros(0), 0, torch.from_numpy(w)))
    assert table_error(sensitive, W, w) < table_error(plain, W, w) / 5
    assert table_error(sensitive, W, np.ones(W.shape)) > table_error(plain, W, np.ones(W.shape))


def test_a_row_without_sensitivity_is_learned_plainly() -> None:
    W = torch.from_numpy(numbers("normal", 3, 64))
    fisher = torch.ones(3, 64)
    fisher[1] = 0
    spec = QuantSpec.parse("table2 tensor scale=fp32")
    found = squeezellm(W, spec, Stats(torch.zeros(0), 0, fisher))
    assert torch.equal(found.dequantize(), kmeans(W, spec).dequantize())


@pytest.mark.parametrize("codebook", ["row", "tensor"])
def test_quantiles_are_numpys(codebook: str) -> None:
    x = numbers("heavy", 3, 77)
    q = quantile(torch.from_numpy(x), QuantSpec.parse("table3 tensor scale=fp32"), codebook=codebook)
    assert q.table is not None
    wanted = np.quantile(
        x.astype(np.float64), (np.arange(8) + 0.5) / 8, axis=1 if codebook == "row" else None
    ).T
    assert np.allclose((q.table.double() * q.scale.double()).numpy(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("text", "codebook"),
    [
        ("table4 tensor", "row"),
        ("table3 g5 scale=bf16", "tensor"),
        ("table2 b9", "tensor"),
        ("table3 2x4", "row"),
    ],
)
def test_every_weight_goes_to_the_nearest_value_and_through_bytes(
    method: str, text: str, codebook: str
) -> None:
    W = torch.from_numpy(numbers("heavy", 6, 23))
    spec = QuantSpec.parse(text)
    fisher = torch.from_numpy(importances("squares", W.shape))
    q = METHODS[method](W, spec, Stats(torch.zeros(0), 0, fisher), codebook=codebook)
    assert q.table is not None and bool((q.table[..., 1:] >= q.table[..., :-1]).all())
    # Every value that a weight could have had, one after the other.
    each = [
        QuantizedTensor(torch.full_like(q.codes, code), q.scale, spec, table=q.table).dequantize(
            torch.float64
        )
        for code in range(spec.levels)
    ]
    nearest = (torch.stack(each) - W.double()).abs().amin(dim=0)
    torch.testing.assert_close(
        (q.dequantize(torch.float64) - W.double()).abs(), nearest, atol=1e-6, rtol=1e-6
    )
    packed = q.pack()
    back = QuantizedTensor.unpack(packed)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.dequantize(), q.dequantize())
    assert back.table is not None and torch.equal(back.table, q.table)
    assert q.nbytes == packed.nbytes


def test_codebooks_are_counted() -> None:
    W = torch.from_numpy(numbers("normal", 6, 40))
    by_row = kmeans(W, QuantSpec.parse("table3 tensor"))
    assert by_row.nbytes == 6 * 15 + 2 + 6 * 8 * 2  # codes, one fp16 scale, 6 tables of 8 fp16 values
    assert by_row.bits_per_weight == 8 * by_row.nbytes / 240
    assert kmeans(W, QuantSpec.parse("table3 tensor"), codebook="tensor").nbytes == 6 * 15 + 2 + 8 * 2
    assert kmeans(W, QuantSpec.parse("table2 g8 scale=fp32")).nbytes == 6 * 10 + 6 * 5 * 4 + 6 * 4 * 4


@pytest.mark.parametrize("method", METHODS)
def test_zeros_constants_few_values_and_nothing(method: str) -> None:
    spec = QuantSpec.parse("table2 g8 scale=fp32")
    W = torch.zeros(3, 16)
    W[1], W[2] = -0.375, torch.tensor([0.0, 1.0, -3.0, 2.0]).repeat(4)

    def run(W: Tensor) -> Tensor:
        stats = Stats(torch.zeros(0), 0, torch.ones_like(W))
        return METHODS[method](W, spec, stats).dequantize()

    assert torch.equal(run(torch.zeros(2, 16)), torch.zeros(2, 16))
    found = run(W)
    assert torch.equal(found[:2], W[:2])
    if method != "quantile":
        torch.testing.assert_close(found, W)
    assert run(torch.zeros(0, 16)).shape == (0, 16) and run(torch.zeros(2, 0)).shape == (2, 0)


@pytest.mark.parametrize(
    ("text", "codebook", "message"),
    [
        ("int4 g64", "row", "learned for table2, table3, table4; found int4 g64"),
        ("table4 b64", "row", "codebook='tensor'"),
        ("table4 g64", "column", "'row' or 'tensor', found 'column'"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_done_is_refused(method: str, text: str, codebook: str, message: str) -> None:
    W = torch.ones(2, 64)
    with pytest.raises(ValueError, match=message):
        METHODS[method](
            W, QuantSpec.parse(text), Stats(torch.zeros(0), 0, torch.ones_like(W)), codebook=codebook
        )
    with pytest.raises(ValueError, match=message):
        METHODS[method].check(QuantSpec.parse(text), codebook=codebook)


def test_bad_weights_and_bad_sensitivities_are_refused() -> None:
    spec, W = QuantSpec.parse("table4 tensor"), torch.ones(2, 4)
    with pytest.raises(ValueError, match="1 NaN"):
        kmeans(torch.tensor([[1.0, torch.nan]]), spec)
    for stats in (None, Stats.empty(4)):
        with pytest.raises(ValueError, match="needs stats with the fisher"):
            squeezellm(W, spec, stats)
    with pytest.raises(ValueError, match=r"shape \(2, 4\); found shape \(4, 2\)"):
        squeezellm(W, spec, Stats(torch.zeros(0), 0, torch.ones(4, 2)))
    for bad in (-1.0, torch.nan, torch.inf):
        fisher = torch.ones(2, 4)
        fisher[0, 1] = bad
        with pytest.raises(ValueError, match="1 negative, infinite or NaN"):
            squeezellm(W, spec, Stats(torch.zeros(0), 0, fisher))
