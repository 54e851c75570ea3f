"""LSQ and LSQ+ against the papers' closed forms, one element at a time in plain Python numbers."""

from __future__ import annotations

import math

import pytest
import torch

from labkit.quant import QuantSpec, fit, lsq, lsq_encode, lsq_start

GRIDS = ["int2 channel", "int4 g4", "int3 g4 narrow", "int8 tensor", "int3 2x4", "int4 b6"]
AFFINE = ["int2 g4 asym", "int4 channel asym", "int3 g4 asym-float", "int2 b6 asym-float"]


def index_of_block(spec: QuantSpec, row: int, column: int, columns: int) -> tuple[int, ...]:
    if isinstance(spec.block, int):
        return ((row * columns + column) // spec.block,)
    height, width = (size or 10**9 for size in spec.block)
    return row // height, column // width


def by_the_paper(v, spec, s, beta, upstream):  # type: ignore[no-untyped-def]
    """Equations 3 and 5 of LSQ, 4 and 5 of LSQ+: the gradients of v, s and beta, before the factor; N."""
    rows, columns = v.shape
    low, high = spec.code_range
    grad_v, grad_s = torch.zeros_like(v), torch.zeros_like(s)
    grad_beta, count = torch.zeros_like(s), torch.zeros_like(s)
    for i in range(rows):
        for j in range(columns):
            at = index_of_block(spec, i, j, columns)
            up, step = upstream[i, j].item(), s[at].item()
            offset = beta[at].item() if beta is not None else 0.0
            ratio = (v[i, j].item() - offset) / step
            count[at] += 1
            if low < ratio < high:
                grad_v[i, j] = up
                # A tie goes to the even whole number, as in Python: of v / s where the zero point is whole.
                whole = round(v[i, j].item() / step) - offset / step if spec.zero == "int" else round(ratio)
                grad_s[at] += up * (whole - ratio)
            else:
                grad_s[at] += up * (low if ratio <= low else high)
                grad_beta[at] += up
    return grad_v, grad_s, grad_beta, count


@pytest.mark.parametrize("text", GRIDS)
def test_the_gradient_is_the_papers(text: str) -> None:
    """Inside, far out on both sides, at ties, on the clip's two edges and within half a step of them."""
    spec = QuantSpec.parse(f"{text} scale=fp32")
    low, high = spec.code_range
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(low - 1, high + 2, (4, 10), generator=generator).double()
    steps += torch.tensor([0.0, 0.25, 0.5, -0.5, 0.3, -0.125, 0.0, 0.5, -0.25, 0.49], dtype=torch.float64)
    steps[0, :6] = torch.tensor([low, high, low - 0.25, high + 0.25, low - 0.5, high + 0.5])
    s, _ = lsq_start(steps, spec)
    s = torch.full_like(s, 0.25).requires_grad_()  # exact in binary, so that a tie is one
    v = (steps * 0.25).requires_grad_()
    upstream = torch.randn(4, 10, generator=generator, dtype=torch.float64)
    lsq(v, spec, s).backward(upstream)
    grad_v, grad_s, _, count = by_the_paper(v.detach(), spec, s.detach(), None, upstream)
    assert torch.equal(v.grad, grad_v)
    assert 0 < grad_v.count_nonzero() < grad_v.numel()
    torch.testing.assert_close(s.grad, grad_s / (count * high).sqrt(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", AFFINE)
def test_the_gradient_is_lsq_pluss(text: str) -> None:
    spec = QuantSpec.parse(f"{text} scale=fp32")
    high = spec.code_range[1]
    generator = torch.Generator().manual_seed(1)
    shape = lsq_start(torch.ones(4, 10), spec)[0].shape
    s = torch.full(shape, 0.25).requires_grad_()
    zero = torch.randint(0, high + 1, shape, generator=generator).float()
    beta = (-zero * 0.25).requires_grad_()
    steps = torch.randint(-high - 2, high + 3, (4, 10), generator=generator).double()
    steps += torch.tensor([0.0, 0.25, 0.5, -0.5, 0.3, -0.125, 0.0, 0.5, -0.25, 0.49], dtype=torch.float64)
    v = (steps * 0.25).requires_grad_()
    upstream = torch.randn(4, 10, generator=generator, dtype=torch.float64)
    lsq(v, spec, s, beta).backward(upstream)
    grad_v, grad_s, grad_beta, count = by_the_paper(v.detach(), spec, s.detach(), beta.detach(), upstream)
    factor = 1 / (count * high).sqrt()
    assert torch.equal(v.grad, grad_v)
    torch.testing.assert_close(s.grad, grad_s * factor, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(beta.grad, grad_beta * factor, rtol=1e-4, atol=1e-5)
    assert grad_beta.abs().max() > 0


def test_worked_by_hand() -> None:
    """int4: Q_N = 8, Q_P = 7; s = 0.5, six weights, so the factor is 1 / sqrt(42)."""
    v = torch.tensor([[0.6, 0.75, -0.25, 3.5, -4.1, 9.0]], requires_grad=True)
    s = torch.full((1, 1), 0.5, requires_grad=True)
    out = lsq(v, QuantSpec.parse("int4 channel"), s)
    assert out.tolist() == [[0.5, 1.0, 0.0, 3.5, -4.0, 3.5]]
    out.sum().backward()
    assert v.grad.tolist() == [[1, 1, 1, 0, 0, 0]]
    expected = (1 - 1.2) + (2 - 1.5) + (0 + 0.5) + 7 - 8 + 7
    assert s.grad.item() == pytest.approx(expected / math.sqrt(42))


@pytest.mark.parametrize("text", [*GRIDS, *AFFINE, "int4 g7 scale=bf16", "int4 g7 asym-float scale=bf16"])
def test_what_was_trained_with_is_what_is_stored(text: str) -> None:
    spec = QuantSpec.parse(text)
    v = torch.randn(6, 26, generator=torch.Generator().manual_seed(2))
    s, beta = lsq_start(v, spec)
    s = s * 0.7137  # no number of the stored dtype
    found = lsq_encode(v, spec, s, beta)
    assert found.spec == spec and not torch.equal(found.scale.float(), s)
    assert torch.equal(found.dequantize(), lsq(v, spec, s, beta))
    assert len(found.codes.unique()) == min(spec.levels, len(found.codes.unique())) > 2


def test_where_the_papers_begin() -> None:
    v = torch.tensor([[1.0, -3.0, 2.0, -2.0], [0.0, 4.0, 0.0, 4.0]])
    s, beta = lsq_start(v, QuantSpec.parse("int3 channel"))
    assert beta is None  # 2 mean|v| / sqrt(3)
    assert s[:, 0].tolist() == pytest.approx([4 / math.sqrt(3), 4 / math.sqrt(3)])
    s, beta = lsq_start(v, QuantSpec.parse("int3 channel asym"))
    # row 1: mean 2, deviation 2: the range -4 to 8 in 7 steps
    assert s[1].item() == pytest.approx(12 / 7) and beta[1].item() == pytest.approx(-4)


def test_learning_the_step_lowers_the_error_that_min_max_leaves() -> None:
    v = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    spec = QuantSpec.parse("int2 channel asym")
    params = fit(v, spec)
    s, zero = params.dense()
    s, beta = s.clone().requires_grad_(), (-zero * s).requires_grad_()
    before = (lsq(v, spec, s, beta) - v).square().sum().item()
    adam = torch.optim.Adam([s, beta], lr=0.02)
    for _ in range(150):
        adam.zero_grad()
        loss = (lsq(v, spec, s, beta) - v).square().sum()
        loss.backward()
        adam.step()
    best = (fit_and_round(v, spec, "mse") - v).square().sum().item()
    assert loss.item() < 0.7 * before
    assert loss.item() < 1.1 * best  # near it: the straight-through gradient is not that of the error


def fit_and_round(v: torch.Tensor, spec: QuantSpec, observer: str) -> torch.Tensor:
    from labkit.quant import encode

    return encode(v, spec, fit(v, spec, observer)).dequantize()


def test_a_step_below_zero_is_held_above_it_and_can_come_back() -> None:
    v = torch.tensor([[0.5, 0.25]])
    s = torch.full((1, 1), -0.1, requires_grad=True)
    spec = QuantSpec.parse("int4 channel")
    assert lsq_encode(v, spec, s).scale.item() == 2.0**-24  # the smallest fp16
    lsq(v, spec, s).sum().backward()
    assert s.grad.item() == pytest.approx(2 * 7 / math.sqrt(2 * 7))  # a larger step would reach further


@pytest.mark.parametrize("text", ["nf4 b64", "fp4_e2m1 g16", "int4 g64 scale=(int8 tensor scale=fp32)"])
def test_grids_without_a_step_to_learn_are_refused(text: str) -> None:
    v, spec = torch.ones(2, 64), QuantSpec.parse(text)
    for call in (lambda: lsq(v, spec, torch.ones(2, 1)), lambda: lsq_start(v, spec)):
        with pytest.raises(ValueError, match="LSQ learns the step of an integer grid"):
            call()


def test_a_zero_point_needs_an_offset() -> None:
    with pytest.raises(ValueError, match="needs an offset beta"):
        lsq(torch.ones(2, 8), QuantSpec.parse("int4 channel asym"), torch.ones(2, 1))


def test_an_offset_outside_the_codes_is_held_at_the_last_one() -> None:
    """beta = 0.5 would be a zero point of -2, which two bits cannot store; 0 they can. And 5, which becomes 3."""
    v, spec = torch.tensor([[0.1, 0.3, 0.6, 2.0]]), QuantSpec.parse("int2 channel asym")
    s = torch.full((1, 1), 0.25)
    for beta, zero, values in [(0.5, 0, [0, 0.25, 0.5, 0.75]), (-1.25, 3, [0, 0, 0, 0])]:
        offset = torch.full((1, 1), beta)
        found = lsq_encode(v, spec, s, offset)
        assert found.zero.tolist() == [[zero]]
        assert lsq(v, spec, s, offset).tolist() == found.dequantize().tolist() == [values]
