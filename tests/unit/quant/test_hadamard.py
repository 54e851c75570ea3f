"""Hadamard matrices: what they are by definition, by Sylvester's formula and Paley's, and their fast product."""

from __future__ import annotations

import time

import pytest
import torch

from labkit.quant import hadamard, hadamard_block, hadamard_transform

POWERS = [1, 2, 4, 8, 64, 256, 512]
OTHERS = [12, 20, 24, 28, 36, 40, 60, 76, 84, 148, 576, 896, 1536]  # with SmolLM2's and Qwen's widths


@pytest.mark.parametrize("n", POWERS + OTHERS)
def test_rows_stand_at_right_angles(n: int) -> None:
    H = hadamard(n)
    assert H.shape == (n, n) and bool((H.abs() == 1).all())
    assert torch.equal(H @ H.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", POWERS)
def test_powers_of_two_are_sylvesters(n: int) -> None:
    # H[i, j] = (-1)^(number of ones that i and j have in common, in binary)
    expected = [[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
    assert hadamard(n).tolist() == expected


@pytest.mark.parametrize(("n", "q"), [(12, 11), (20, 19)])
def test_paleys_first(n: int, q: int) -> None:
    # I + C, where C is bordered by ones and holds 1 where i - j is a square modulo q, else -1
    squares = {i * i % q for i in range(1, q)}
    inner = [[1.0 if i == j or (i - j) % q in squares else -1.0 for j in range(q)] for i in range(q)]
    assert hadamard(n).tolist() == [[1.0] * n] + [[-1.0, *row] for row in inner]


@pytest.mark.parametrize("n", [28, 36])
def test_paleys_second_is_symmetric(n: int) -> None:
    assert torch.equal(hadamard(n), hadamard(n).T)


@pytest.mark.parametrize(("n", "factors"), [(576, (36, 16)), (1536, (12, 128)), (28 * 256, (28, 16, 16))])
def test_products_are_kroneckers(n: int, factors: tuple[int, ...]) -> None:
    expected = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors:
        expected = torch.kron(expected, hadamard(factor))
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(hadamard_transform(x), x @ expected / n**0.5)


@pytest.mark.parametrize("n", [1, 2, 12, 20, 64, 512, 576, 1536])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_fast_product_is_the_product(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 2, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    H = hadamard(n) / n**0.5
    for inverse, matrix in ((False, H), (True, H.T)):
        found = hadamard_transform(x.to(dtype), inverse=inverse)
        assert found.dtype == dtype
        torch.testing.assert_close(found, (x @ matrix).to(dtype), rtol=1e-5, atol=1e-5)


def test_12_and_20_tell_the_product_from_its_inverse() -> None:
    assert not torch.equal(hadamard(12), hadamard(12).T)
    x = torch.randn(4, 12, dtype=torch.float64)
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x), inverse=True), x)
    assert not torch.allclose(hadamard_transform(hadamard_transform(x)), x)


@pytest.mark.parametrize(
    ("n", "block"), [(576, 576), (7, 1), (6, 2), (18, 2), (50, 2), (92, 4), (100, 20), (90, 2), (1, 1)]
)
def test_what_has_none_gets_blocks(n: int, block: int) -> None:
    assert hadamard_block(n) == block
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    H = torch.kron(torch.eye(n // block, dtype=torch.float64), hadamard(block)) / block**0.5
    torch.testing.assert_close(hadamard_transform(x), x @ H)
    if block != n:
        with pytest.raises(ValueError, match=rf"order {n} here.*blocks of order {block}"):
            hadamard(n)


@pytest.mark.parametrize("n", [0, -4])
def test_no_order(n: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        hadamard_block(n)


def test_it_can_be_learned_through_after_it_ran_in_inference_mode() -> None:
    x = torch.randn(2, 44)
    with torch.inference_mode():
        hadamard_transform(x)
    x.requires_grad_()
    hadamard_transform(x)[0, 0].backward()
    torch.testing.assert_close(x.grad[0].double(), hadamard(44)[:, 0] / 44**0.5)


def test_an_outlier_is_spread() -> None:
    x = torch.zeros(1536)
    x[5] = 100.0
    torch.testing.assert_close(hadamard_transform(x).abs(), torch.full((1536,), 100 / 1536**0.5))


def test_large_orders_take_no_square_matrix() -> None:
    start = time.perf_counter()
    x = torch.randn(2, 28672)  # Llama 70B's MLP: the dense matrix would have 6.6 GB in float64
    torch.testing.assert_close(hadamard_transform(x).norm(), x.norm(), rtol=1e-4, atol=0)
    assert time.perf_counter() - start < 30
