"""Hadamard matrices: entries of 1 and -1, rows at right angles. They spread an outlier over all channels.

``hadamard(n)`` has ``H H^T = n I``. There is one of order 1, 2, and by Paley (1933) of order q + 1 for a
prime q = 3 mod 4 (12, 20) and 2 (q + 1) for a prime q = 1 mod 4 (28, 36); the Kronecker product of two is
one again, so each of them times a power of two has one too. Paley's prime powers are left out.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt, prod

import torch
from torch import Tensor

_LARGEST_SYLVESTER = 128  # factors of this order at most: one matmul each, and none of them large


def hadamard(n: int) -> Tensor:
    """The (n, n) Hadamard matrix of 1 and -1, float64, that ``hadamard_transform`` multiplies by.

    Orders that are a power of two are Sylvester's, as scipy.linalg.hadamard gives them. Raises ValueError
    for an order that the constructions do not reach: everything but 1, 2 and some multiples of 4.
    """
    sizes = _factors(n)
    if sizes is None:
        raise ValueError(
            f"no Hadamard matrix of order {n} here: expected 1, 2, or a power of two times 4, 12, 20, 28, "
            f"36, ...; use diagonal blocks of order {hadamard_block(n)}"
        )
    found = torch.ones(1, 1, dtype=torch.float64)
    for size in sizes:
        found = torch.kron(found, _small(size, torch.float64, torch.device("cpu")))
    return found


def hadamard_block(n: int) -> int:
    """The largest divisor of ``n`` that is the order of a Hadamard matrix: ``n`` itself, if it has one."""
    if n < 1:
        raise ValueError(f"an order is at least 1, found {n}")
    return next(size for size in range(n, 0, -1) if n % size == 0 and _factors(size) is not None)


def hadamard_transform(x: Tensor, *, inverse: bool = False) -> Tensor:
    """``x @ H / sqrt(n)`` over the last axis of ``x`` (..., n), or ``x @ H.T / sqrt(n)`` with ``inverse``.

    Where ``n`` has no Hadamard matrix, H is block-diagonal with ``n / b`` of order ``b = hadamard_block(n)``
    and the root is that of b. An orthogonal map either way: lengths stay the same. Costs
    ``n (f1 + f2 + ...)`` multiplications for an order that is the product of f1, f2, ..., instead of n^2.
    """
    block = hadamard_block(x.shape[-1])
    y = x.reshape(-1, block)
    for size in _factors(block) or ():
        H = _small(size, x.dtype, x.device)
        # Each turn brings the first of the remaining axes to the end; after the last all are in order again.
        y = y.reshape(-1, size, block // size).transpose(1, 2) @ (H.T if inverse else H)  # (N, rest, size)
    return y.reshape(x.shape) * block**-0.5


@lru_cache(maxsize=256)
def _factors(n: int) -> tuple[int, ...] | None:
    """Orders of small matrices whose Kronecker product is ``hadamard(n)``, Paley's first; None: no such."""
    base, power = n, 1
    while base % 2 == 0:
        base, power = base // 2, power * 2
    if base > 1:  # odd: the smallest multiple by a power of two that is an order of Paley's
        multiples = [m for m in (base * 2**k for k in range(2, power.bit_length())) if _paley_prime(m)]
        if not multiples:
            return None
        base, power = multiples[0], n // multiples[0]
    sizes = [base] if base > 1 else []
    while power > _LARGEST_SYLVESTER:
        half = 2 ** min(power.bit_length() // 2, _LARGEST_SYLVESTER.bit_length() - 1)
        sizes, power = [*sizes, half], power // half
    sizes += [power] if power > 1 else []
    assert prod(sizes) == n
    return tuple(sizes)


@lru_cache(maxsize=64)
def _small(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for whoever comes next, who may want gradients
        H = _sylvester(size) if size & (size - 1) == 0 else _paley(size)
        return H.to(device=device, dtype=dtype)


def _sylvester(size: int) -> Tensor:
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], dim=1), torch.cat([H, -H], dim=1)])
    return H


def _paley_prime(order: int) -> int | None:
    """The prime q from which Paley's first or second construction makes a matrix of this order, or None."""
    for q, rest in ((order - 1, 3), (order // 2 - 1, 1)):
        if order % 4 == 0 and q % 4 == rest and q > 1 and all(q % d for d in range(2, isqrt(q) + 1)):
            return q
    return None


def _paley(order: int) -> Tensor:
    q = _paley_prime(order)
    assert q is not None
    chi = torch.full((q,), -1.0, dtype=torch.float64)  # 1 for squares modulo q, -1 for the rest, 0 for 0
    chi[[i * i % q for i in range(1, q)]] = 1.0
    chi[0] = 0.0
    index = torch.arange(q)
    C = torch.zeros(q + 1, q + 1, dtype=torch.float64)  # a conference matrix: C C^T = q I
    C[1:, 1:] = chi[(index[:, None] - index[None, :]) % q]  # Jacobsthal's matrix
    C[0, 1:] = 1.0
    C[1:, 0] = -1.0 if order == q + 1 else 1.0
    eye = torch.eye(q + 1, dtype=torch.float64)
    if order == q + 1:  # q = 3 mod 4: C is skew
        return eye + C
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(C, plus) + torch.kron(eye, minus)  # q = 1 mod 4: C is symmetric
