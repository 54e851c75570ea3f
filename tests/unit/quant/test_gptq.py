"""GPTQ against RTN and against an Optimal Brain Quantizer that inverts H anew for each column."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from labkit.quant import GPTQWarning, QuantSpec, Stats, fit, gptq, hessian_error, rtn
from labkit.quant.methods import METHODS


def correlated(rows: int, columns: int, seed: int, samples: int = 256) -> tuple[Tensor, Tensor]:
    """A float64 weight and inputs that are correlated and of unequal size, as a layer's are."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=g, dtype=torch.float64) / columns**0.5
    size = torch.exp(0.7 * torch.randn(columns, generator=g, dtype=torch.float64))
    inputs = torch.randn(samples, columns, generator=g, dtype=torch.float64)
    return weight, (inputs @ mix + 0.3 * inputs) * size


def grid_of(weight: Tensor, bits: int, affine: bool) -> tuple[Tensor, Tensor, int, int]:
    """Scale and zero point of every row, by hand; the scale as the fp16 that is stored."""
    if affine:
        low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).half().double()
        return scale, torch.round(-low / scale).clamp(0, 2**bits - 1), 0, 2**bits - 1
    scale = (weight.abs().amax(1, keepdim=True) / ((2**bits - 1) / 2)).half().double()
    return scale, torch.zeros_like(scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def best_grid_of(weight: Tensor, bits: int, affine: bool) -> tuple[Tensor, Tensor, int, int]:
    """Of every row's grids for its weights clipped to 1.00, 0.99, ... of their largest, that with the least
    squared error.
    """
    best = grid_of(weight, bits, affine)
    scale, zero, low, high = best
    least = torch.full_like(scale, torch.inf)
    for percent in range(100, 0, -1):
        a = weight.abs().amax(1, keepdim=True) * (percent / 100)
        s, z, _, _ = grid_of(torch.minimum(torch.maximum(weight, -a), a), bits, affine)
        q = (torch.clamp(torch.round(weight / s) + z, low, high) - z) * s
        error = (q - weight).square().sum(1, keepdim=True)
        scale, zero = torch.where(error < least, s, scale), torch.where(error < least, z, zero)
        least = torch.minimum(error, least)
    return scale, zero, low, high


def optimal_brain_quantizer(
    weight: Tensor,
    hessian: Tensor,
    order: list[int],
    bits: int,
    affine: bool,
    group: int | None,
    grid_of: Callable[..., tuple[Tensor, Tensor, int, int]] = grid_of,
) -> Tensor:
    """Frantar & Alistarh 2022 (arXiv 2208.11580), section 5, in a fixed order and without its shortcut:
    before each column, H of the columns that are left is inverted anew.

    ``group`` columns that follow each other in ``order`` share a grid, fitted when the first is reached.
    """
    W = weight.clone()
    left = list(order)
    for step, column in enumerate(order):
        if step % (group or len(order)) == 0:
            scale, zero, low, high = grid_of(W[:, order[step : step + (group or len(order))]], bits, affine)
        inverse = torch.linalg.inv(hessian[left][:, left])  # of the columns not yet rounded
        w = W[:, [column]]
        q = (torch.clamp(torch.round(w / scale) + zero, low, high) - zero) * scale
        W[:, left] -= (w - q) / inverse[0, 0] * inverse[[0], :]  # also makes the column itself q
        W[:, column] = q[:, 0]
        left.remove(column)
    return W


def damped(hessian: Tensor, damp: float = 0.01) -> Tensor:
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "group", [None, 8, 6]
)  # the whole row, a divisor of 24 and of the block, a ragged one
@pytest.mark.parametrize("zero", ["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 4])
def test_equals_the_optimal_brain_quantizer(bits: int, zero: str, group: int | None, act_order: bool):
    columns = 22 if group == 6 else 24
    for seed in range(5):
        weight, inputs = correlated(7, columns, seed)
        stats = Stats.of(inputs)
        order = list(range(columns))
        if act_order:
            order.sort(key=lambda column: -float(inputs[:, column].square().sum()))
        expected = optimal_brain_quantizer(
            weight, damped(stats.hessian), order, bits, zero == "asym", group
        )
        spec = QuantSpec.parse(f"int{bits} {'channel' if group is None else f'g{group}'} {zero}")
        found = gptq(weight, spec, stats, act_order=act_order, block_size=8)
        torch.testing.assert_close(found.dequantize(torch.float64), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("zero", ["sym", "asym"])
def test_mse_grids_are_the_best_of_a_hundred(zero: str, static: bool):
    for seed in range(3):
        weight, inputs = correlated(7, 24, seed)
        weight = weight**3  # long tails, so that clipping pays
        stats, spec = Stats.of(inputs), QuantSpec.parse(f"int3 g12 {zero}")
        options = {"observer": "mse", "static_groups": static}
        found = gptq(weight, spec, stats, **options)
        if static:
            grids = [best_grid_of(weight[:, at : at + 12], 3, zero == "asym") for at in (0, 12)]
            turn = iter(grids)
            fitted = lambda *_, turn=turn: next(turn)  # noqa: E731
        else:
            fitted = best_grid_of
        order, hessian = list(range(24)), damped(stats.hessian)
        expected = optimal_brain_quantizer(weight, hessian, order, 3, zero == "asym", 12, fitted)
        torch.testing.assert_close(found.dequantize(torch.float64), expected, rtol=1e-9, atol=1e-9)
        assert not torch.equal(found.scale, gptq(weight, spec, stats, static_groups=static).scale)


def test_equals_the_optimal_brain_quantizer_on_a_wide_matrix():
    weight, inputs = correlated(3, 601, 0)
    stats = Stats.of(inputs)
    expected = optimal_brain_quantizer(weight, damped(stats.hessian), list(range(601)), 4, True, None)
    found = gptq(weight, QuantSpec.parse("int4 channel asym"), stats)
    torch.testing.assert_close(found.dequantize(torch.float64), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("columns", [1, 191, 192, 193, 601])
def test_the_hessian_is_the_mean_of_x_x_t_and_exactly_symmetric(columns: int):
    inputs = torch.randn(50, columns, generator=torch.Generator().manual_seed(columns)).double()
    H = Stats.of(inputs).hessian
    torch.testing.assert_close(H.numpy(), inputs.numpy().T @ inputs.numpy() / 50, rtol=1e-12, atol=1e-12)
    assert torch.equal(H, H.T)


def test_hand_worked():
    # H = [[2, 1], [1, 1]]: H^-1 = [[1, -1], [-1, 2]]. Rounding column 0 from 0.4 to 0 moves column 1 by
    # -(0.4 - 0) / 1 * -1 = +0.4: 1.2 becomes 1.6, which rounds to 2. Column 2 sets the scale to 1, apart.
    hessian = torch.tensor([[2.0, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.float64)
    weight = torch.tensor([[0.4, 1.2, 3.0]], dtype=torch.float64)
    spec = QuantSpec.parse("int3 channel narrow scale=fp32")
    assert rtn(weight, spec).codes.tolist() == [[0, 1, 3]]
    assert gptq(weight, spec, Stats(hessian, 1), damp=0).codes.tolist() == [[0, 2, 3]]


def test_beats_rtn_on_the_hessian_weighted_error():
    wins = 0
    spec = QuantSpec.parse("int4 g16 asym")
    for seed in range(500):
        g = torch.Generator().manual_seed(seed)
        rows, columns = (int(torch.randint(low, 65, (), generator=g)) for low in (16, 32))
        weight, inputs = correlated(rows, columns, seed)
        stats = Stats.of(inputs)
        scores = [
            hessian_error(weight, method, stats.hessian)
            for method in (gptq(weight, spec, stats, static_groups=True), rtn(weight, spec))
        ]
        wins += scores[0] < scores[1]
    assert wins >= 495, f"GPTQ is better in {wins} of 500 problems"


@pytest.mark.parametrize("text", ["int4 g16 asym", "int3 g10", "int4 channel", "nf4 g16", "4x16", "b48"])
@pytest.mark.parametrize(
    "options", [{}, {"act_order": True}, {"static_groups": True, "act_order": True}], ids=str
)
def test_block_size_has_no_effect(text: str, options: dict):
    spec = QuantSpec.parse(text if text[0] in "in" else f"int4 {text}")
    weight, inputs = correlated(12, 96, seed=3)
    stats = Stats.of(inputs)
    results = [gptq(weight, spec, stats, block_size=size, **options) for size in (1, 7, 32, 96, 1000)]
    for other in results[1:]:
        assert torch.equal(results[0].codes, other.codes)
        assert torch.equal(results[0].scale, other.scale)
        assert other.codes.is_contiguous()


def test_act_order_names_the_group_of_each_column():
    weight, inputs = correlated(5, 20, seed=0)
    found = gptq(weight, QuantSpec.parse("int4 g8"), Stats.of(inputs), act_order=True)
    ranked = sorted(range(20), key=lambda column: -float(inputs[:, column].square().sum()))
    assert found.g_idx is not None
    assert found.g_idx.dtype == torch.int32
    assert found.g_idx.tolist() == [ranked.index(column) // 8 for column in range(20)]
    assert found.scale.shape == (5, 3)
    assert found.codes.is_contiguous()


@pytest.mark.parametrize(
    "text", ["int4 g8", "int4 channel", "int4 b40", "int4 g8 scale=(int8 tensor scale=fp32)"]
)
def test_static_scales_are_those_of_the_weights_as_they_came(text: str):
    spec = QuantSpec.parse(text)
    weight, inputs = correlated(6, 24, seed=1)
    found = gptq(weight, spec, Stats.of(inputs), act_order=True, static_groups=True)
    expected, scale = fit(weight, spec).scale, found.scale
    if not isinstance(scale, Tensor):
        expected, scale = expected.dequantize(), scale.dequantize()
    assert torch.equal(scale, expected)
    assert found.g_idx is None
    assert hessian_error(weight, found, Stats.of(inputs).hessian) < hessian_error(
        weight, rtn(weight, spec), Stats.of(inputs).hessian
    )


def test_groups_are_fitted_on_columns_that_make_up_for_those_before():
    weight, inputs = correlated(6, 24, seed=1)
    spec = QuantSpec.parse("int2 g8")
    moving = gptq(weight, spec, Stats.of(inputs)).scale
    static = fit(weight, spec).scale
    assert torch.equal(moving[:, 0], static[:, 0])
    assert (moving[:, 1:] != static[:, 1:]).double().mean() > 0.9


@pytest.mark.parametrize(
    "text",
    ["nf4 b64 scale=fp32", "nf4 g32", "fp4_e2m1 g32 scale=e8m0", "fp8_e4m3 16x32", "int3 g24 asym-float"],
)
def test_every_grid(text: str):
    weight, inputs = correlated(16, 64, seed=5)
    stats = Stats.of(inputs)
    spec = QuantSpec.parse(text)
    for options in ({}, {"act_order": True}):
        found = gptq(weight, spec, stats, **options)
        assert found.codes.shape == weight.shape
        assert hessian_error(weight, found, stats.hessian) < hessian_error(
            weight, rtn(weight, spec), stats.hessian
        )


def test_uncorrelated_inputs_of_equal_size_are_rounded_to_nearest():
    weight, _ = correlated(9, 40, seed=2)
    spec = QuantSpec.parse("int4 g8 asym")
    found = gptq(weight, spec, Stats(3 * torch.eye(40), 1))
    assert torch.equal(found.codes, rtn(weight, spec).codes)


def test_a_factor_on_the_hessian_has_no_effect():
    weight, inputs = correlated(9, 40, seed=2)
    inputs[:, 7] = 0
    spec, stats = QuantSpec.parse("int3 g8"), Stats.of(inputs)
    one = gptq(weight, spec, stats, act_order=True)
    for factor in (2.0**-30, 2.0**30):
        other = gptq(weight, spec, Stats(stats.hessian * factor, stats.samples), act_order=True)
        assert torch.equal(one.codes, other.codes)


def test_float32_stays_close_to_float64():
    weight, inputs = correlated(32, 128, seed=4)
    spec = QuantSpec.parse("int4 g32 asym")
    stats = Stats.of(inputs)
    exact = gptq(weight, spec, stats)
    single = gptq(weight.float(), spec, Stats.of(inputs.float()))
    assert (exact.codes == single.codes).double().mean() > 0.97
    error = [hessian_error(weight, found, stats.hessian) for found in (exact, single)]
    assert error[1] == pytest.approx(error[0], rel=0.03)


def test_dead_columns_are_rounded_to_nearest_and_disturb_nobody():
    weight, inputs = correlated(8, 24, seed=6)
    spec = QuantSpec.parse("int3 channel scale=fp32")
    weight[:, 0] = 5.0  # the largest of each row, so that the scale does not depend on the others
    dead = [3, 11, 23]
    inputs[:, dead] = 0
    alive = [column for column in range(24) if column not in dead]
    found = gptq(weight, spec, Stats.of(inputs)).dequantize(torch.float64)
    assert torch.equal(found[:, dead], rtn(weight, spec).dequantize(torch.float64)[:, dead])
    without = gptq(weight[:, alive], spec, Stats.of(inputs[:, alive])).dequantize(torch.float64)
    assert torch.equal(found[:, alive], without)


def test_inputs_of_zeros_only_are_round_to_nearest_and_no_inputs_are_refused():
    weight, _ = correlated(4, 16, seed=0)
    spec = QuantSpec.parse("int4 g8")
    assert torch.equal(gptq(weight, spec, Stats.of(torch.zeros(3, 16))).codes, rtn(weight, spec).codes)
    with pytest.raises(ValueError, match="calibration is empty"):
        gptq(weight, spec, Stats.empty(16))


def test_recovers_from_a_failed_cholesky_and_says_so():
    weight, inputs = correlated(8, 16, seed=7)
    hessian = Stats.of(inputs).hessian
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    eigenvalues[0] = -0.05 * hessian.diagonal().mean()  # 1 % of damping is not enough, 10 % is
    broken = Stats((vectors * eigenvalues) @ vectors.T, 256)
    spec = QuantSpec.parse("int4 channel")
    with pytest.warns(GPTQWarning, match=r"damp=0\.01; went on with damp=0\.1") as caught:
        found = gptq(weight, spec, broken)
    assert [record.message.damp for record in caught] == [0.1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(found.codes, gptq(weight, spec, broken, damp=0.1).codes)


def test_recovers_when_no_damping_was_asked_for():
    weight, inputs = correlated(8, 16, seed=7, samples=4)  # rank 4 of 16
    stats = Stats.of(inputs)
    stats.hessian[0, 0] -= 1e-9 * stats.hessian[0, 0]
    with pytest.warns(GPTQWarning, match="damp=0; went on with damp=1e-06"):
        found = gptq(weight, QuantSpec.parse("int4 channel"), stats, damp=0)
    assert found.dequantize().isfinite().all()


def test_gives_up_on_what_is_no_hessian():
    weight, _ = correlated(4, 8, seed=0)
    with pytest.raises(ValueError, match="no Cholesky factor even with damp="):
        gptq(weight, QuantSpec.parse("int4 channel"), Stats(-torch.eye(8), 1))


def outer(right: Tensor, error: Tensor, hinv_row: Tensor) -> Tensor:
    return right - torch.outer(error, hinv_row)


def in_place(right: Tensor, error: Tensor, hinv_row: Tensor) -> Tensor:
    right -= error[:, None] * hinv_row
    return right


def looped(right: Tensor, error: Tensor, hinv_row: Tensor) -> Tensor:
    rows = [[right[i, j] - error[i] * hinv_row[j] for j in range(len(hinv_row))] for i in range(len(error))]
    return torch.tensor(rows, dtype=right.dtype)


@pytest.mark.parametrize("update", [outer, in_place, looped])
def test_a_learners_own_update(update):
    weight, inputs = correlated(3, 20, seed=8)
    spec, stats = QuantSpec.parse("int4 g4 asym"), Stats.of(inputs)
    for options in ({}, {"act_order": True, "block_size": 8}):
        mine = gptq(weight, spec, stats, update=update, **options)
        assert torch.equal(mine.codes, gptq(weight, spec, stats, **options).codes)


def test_a_learners_update_is_what_runs():
    weight, inputs = correlated(3, 20, seed=8)
    spec, stats = QuantSpec.parse("int4 g4 asym"), Stats.of(inputs)
    forgets = gptq(weight, spec, stats, update=lambda right, error, hinv_row: right, block_size=20)
    assert torch.equal(forgets.codes, rtn(weight, spec).codes)
    with pytest.raises(ValueError, match=r"shape \(3, 19\), found \(3, 1\)"):
        gptq(weight, spec, stats, update=lambda right, error, hinv_row: right[:, :1])


def test_neither_weight_nor_stats_are_changed():
    weight, inputs = correlated(4, 16, seed=0)
    inputs[:, 3] = 0
    stats = Stats.of(inputs)
    before = weight.clone(), stats.hessian.clone()
    weight.requires_grad_()
    for options in ({}, {"act_order": True}, {"static_groups": True}):
        gptq(weight, QuantSpec.parse("int4 g4"), stats, **options)
    assert torch.equal(weight, before[0])
    assert torch.equal(stats.hessian, before[1])


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_empty(shape: tuple[int, int]):
    found = gptq(torch.zeros(shape), QuantSpec.parse("int4 g4"), Stats.empty(shape[1]), act_order=True)
    assert found.shape == shape


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_input(value: float):
    spec, weight, stats = QuantSpec.parse("int4 g4"), torch.ones(2, 8), Stats(torch.eye(8), 1)
    with pytest.raises(ValueError, match=r"needs stats"):
        gptq(weight, spec)
    with pytest.raises(ValueError, match=r"found \(2, 8\) and \(7, 7\)"):
        gptq(weight, spec, Stats(torch.eye(7), 1))
    with pytest.raises(ValueError, match=r"found \(8,\) and \(8, 8\)"):
        gptq(weight[0], spec, stats)
    weight[1, 6] = value
    with pytest.raises(ValueError, match=r"\(1, 6\)"):
        gptq(weight, spec, stats)
    stats.hessian[2, 2] = value
    with pytest.raises(ValueError, match="hessian holds NaN or infinity"):
        gptq(torch.ones(2, 8), spec, stats)


def test_methods_are_called_alike():
    weight, inputs = correlated(4, 16, seed=0)
    stats = Stats.of(inputs)
    stats.fisher = weight.square()
    specs = {"hqq": "int4 g4 asym-float"} | dict.fromkeys(
        ("kmeans", "quantile", "squeezellm"), "table4 channel"
    )
    for name, method in METHODS.items():
        assert method(weight, QuantSpec.parse(specs.get(name, "int4 g4")), stats).shape == (4, 16)
    needs = {name: method.needs for name, method in METHODS.items()}
    expected = {"rtn": set(), "rtn_clip": {"hessian"}, "gptq": {"hessian"}, "adaround": {"hessian"}}
    assert needs.items() >= expected.items()


def test_stats_do_not_depend_on_how_inputs_are_batched():
    _, inputs = correlated(1, 6, seed=0, samples=60)
    one = Stats.of(inputs.reshape(3, 20, 6))
    many = Stats.empty(6, torch.float64)
    for batch in inputs.split([1, 0, 30, 29]):
        many.add(batch)
    assert one.samples == many.samples == 60
    torch.testing.assert_close(one.hessian, torch.einsum("ni,nj->ij", inputs, inputs) / 60)
    torch.testing.assert_close(many.hessian, one.hessian)
    assert Stats.of(inputs.half()).hessian.dtype == torch.float32
