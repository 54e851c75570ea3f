"""GPTQ: round column by column, and let the columns not yet rounded make up for each error.

Frantar et al. 2022, arXiv 2210.17323, algorithm 1, in its letters: W, H, U (the upper Cholesky factor of
H^-1), d (an element of U's diagonal), Err.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from labkit.quant.blocks import Blocks
from labkit.quant.encode import encode
from labkit.quant.fit import check_finite, check_has_values, fit, working
from labkit.quant.grid import Grid
from labkit.quant.observers import Observer
from labkit.quant.spec import QuantSpec
from labkit.quant.stats import Stats, hessian_of
from labkit.quant.tensor import Params, QuantizedTensor

# update(weights_right (out, remaining), error (out,), hinv_row (remaining,)) -> new weights_right
Update = Callable[[Tensor, Tensor, Tensor], Tensor]
# columns(W, scale, zero, U, Err, grid, start, stop), as round_columns
Columns = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Grid, int, int], None]


class GPTQWarning(UserWarning):
    """The Hessian had no Cholesky factor at the damping asked for; ``damp`` was used instead."""

    def __init__(self, message: str, damp: float):
        super().__init__(message)
        self.damp = damp


def gptq(
    weight: Tensor,
    spec: QuantSpec,
    stats: Stats | None = None,
    *,
    damp: float = 0.01,
    block_size: int = 128,
    act_order: bool = False,
    static_groups: bool = False,
    observer: str | Observer = "minmax",
    update: Update | None = None,
    columns: Columns | None = None,
) -> QuantizedTensor:
    """``weight`` (out_features, in_features) on the grid of ``spec``, so that W X changes little.

    stats          its ``hessian`` (in_features, in_features) says which inputs X there are
    damp           this much of the mean of H's diagonal is added to the diagonal
    block_size     columns finished before the rest of W hears of their errors: it makes GPTQ fast and
                   changes nothing else. Raised to a multiple of the group where groups are fitted on
                   the way
    act_order      take the columns in descending order of H's diagonal. Groups fitted on the way are then
                   neighbours in that order, and the result's ``g_idx`` names the group of each column
    static_groups  fit every scale on the weights as they came, instead of each group's when its turn comes,
                   on columns that already make up for those before it. Scales that are quantized
                   themselves or lie along flat runs are always static
    observer       chooses the range of each group's grid: minmax, or mse, which clips where that rounds better
    update         your own rank-one update, for W[:, j+1:] - err U[j, j+1:] within a block: takes
                   weights_right (out, remaining), error (out,) and hinv_row (remaining,), returns
                   the new weights_right. It gets views and may work in place
    columns        your own loop over a block's columns, called and doing as ``round_columns``, in which ``update``
                   has its place: give one of the two

    A column whose input was always 0 is rounded to nearest: nothing is known of it. (The authors' code
    sets it to 0, which is harsh after a short calibration.) Where H has no Cholesky factor, damping is
    raised tenfold until it has, with a GPTQWarning. W is float32, or float64 if it came so; H is
    factorised in float64.
    Raises ValueError for shapes that do not fit, an H that is not finite or that no damping helps, and for both
    update and columns.
    """
    if columns is None:
        columns = partial(round_columns, update=update)
    elif update is not None:
        raise ValueError("update stands in labkit's own loop over columns: give one of update and columns")
    check_finite(weight)
    W = working(weight.detach())
    H = hessian_of(stats, W, "gptq")
    if W.numel() == 0:
        return encode(W, spec, fit(W, spec, observer))
    rows, in_features = W.shape
    blocks, grid = Blocks((rows, in_features), spec.block), Grid(spec)
    group = in_features if isinstance(spec.block, int) else blocks.size[1]
    static = static_groups or group == in_features or isinstance(spec.scale, QuantSpec)
    if not static:
        block_size = -(-block_size // group) * group  # a group in one block: its columns are up to date
    stretch = block_size if static else group  # columns whose grids are known together

    order = torch.arange(in_features, device=W.device)
    if act_order:
        order = H.diagonal().argsort(descending=True, stable=True)
    back = torch.argsort(order)
    U = _inverse_factor(H[order][:, order], damp).to(W.dtype).contiguous()
    W = _columns_contiguous(W[:, order])
    scale, zero = torch.empty_like(W), torch.empty_like(W)  # of every weight
    fitted: list[Params] = []
    if static:
        fitted.append(fit(weight.detach(), spec, observer))
        for dense, part in zip((scale, zero), _per_weight(fitted[0], blocks, W.dtype), strict=True):
            dense.copy_(part[:, order])

    for i1 in range(0, in_features, block_size):
        i2 = min(i1 + block_size, in_features)
        now = slice(i1, i2)
        Err = torch.empty_like(W[:, now])
        block = W[:, now], scale[:, now], zero[:, now], U[now, now], Err
        for start in range(0, i2 - i1, stretch):
            stop = min(start + stretch, i2 - i1)
            if not static:
                here = slice(i1 + start, i1 + stop)
                with _one_thread():
                    fitted.append(fit(W[:, here], spec, observer))
                cut = Blocks((rows, stop - start), spec.block)
                scale[:, here], zero[:, here] = _per_weight(fitted[-1], cut, W.dtype)
            columns(*block, grid, start, stop)
        W[:, i2:].addmm_(Err, U[now, i2:], alpha=-1)

    # W lies on the grid now, so encode only names its codes.
    if static:
        return encode(W[:, back].contiguous(), spec, fitted[0])
    tensor = encode(W.contiguous(), spec, Params.side_by_side(fitted))
    if not act_order:
        return tensor
    return replace(tensor, codes=tensor.codes[:, back].contiguous(), g_idx=(back // group).int())


gptq.needs = frozenset({"hessian"})  # type: ignore[attr-defined]
gptq.paper = "Frantar et al. 2022, arXiv 2210.17323"  # type: ignore[attr-defined]
gptq.check = check_has_values  # type: ignore[attr-defined]


def _inverse_factor(H: Tensor, damp: float) -> Tensor:
    """U, upper triangular and float64, with U^T U = (H + damp mean(diag H) I)^-1."""
    diagonal = H.diagonal().double()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else diagonal.new_ones(())
    H = H.double() + torch.diag(torch.where(dead, mean, 0))  # invertible, and still apart from all others
    used = damp
    for _ in range(10):
        # Back to front: H = R R^T with R upper triangular, so H^-1 = U^T U with U = R^-1, the
        # inverse of a triangle and not of H.
        L, failed = torch.linalg.cholesky_ex((H + used * mean * torch.eye(len(H)).to(H)).flip(0, 1))
        if not failed:
            if used != damp:
                message = (
                    f"the Hessian has no Cholesky factor with damp={damp:g}; went on with damp={used:g}"
                )
                warnings.warn(GPTQWarning(message, used), stacklevel=3)
            return _inverse_triangle(L).flip(0, 1)
        used = max(10 * used, 1e-6)
    raise ValueError(
        f"the Hessian has no Cholesky factor even with damp={used / 10:g}: it must be a sum of x x^T, "
        f"symmetric and without negative eigenvalues"
    )


def _inverse_triangle(L: Tensor) -> Tensor:
    """L^-1 of a lower triangular L, by halves: nearly all of the work is products of matrices."""
    half = len(L) // 2
    if half < 128:
        return torch.linalg.solve_triangular(L, torch.eye(len(L)).to(L), upper=False)
    A, B, C = L[:half, :half], L[half:, half:], L[half:, :half]  # L = [A 0; C B]
    inverse = torch.zeros_like(L)
    inverse[:half, :half], inverse[half:, half:] = A, B = _inverse_triangle(A), _inverse_triangle(B)
    inverse[half:, :half] = -B @ (C @ A)
    return inverse


@contextmanager
def _one_thread() -> Iterator[None]:
    """A column is too little work to share: on a busy machine, threads that wait for each other make the
    loop over columns tens of times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def round_columns(
    W: Tensor,
    scale: Tensor,
    zero: Tensor,
    U: Tensor,
    Err: Tensor,
    grid: Grid,
    start: int,
    stop: int,
    update: Update | None = None,
) -> None:
    """Round the columns ``start`` to ``stop`` of a block one by one; those to their right make up for each.

    W, scale, zero, Err (out, block) and U (block, block) are the block's part of each matrix. W gets the rounded
    columns and the block's others as they are then, Err (w - q) / d of each column that was rounded.
    """
    strips = (part[:, start:stop].split(1, dim=1) for part in (W, scale, zero, Err))
    with _one_thread():
        for j, w, s, z, err, u in zip(range(start, stop), *strips, U[start:stop].split(1), strict=True):
            # Views, (out, 1) and u (1, block): cutting each out where it is used would take longer.
            q = grid.round(w, s, z)
            torch.sub(w, q, out=err).div_(u[:, j])
            w.copy_(q)
            _update_right(W[:, j + 1 :], err, u[:, j + 1 :], update)


def _update_right(right: Tensor, err: Tensor, hinv_row: Tensor, update: Update | None) -> None:
    """In place: right (out, remaining) less err (out, 1) times hinv_row (1, remaining)."""
    if update is None:
        right.addcmul_(err, hinv_row, value=-1)
    elif right.shape[1]:
        new = update(right, err[:, 0], hinv_row[0])
        if new.shape != right.shape:
            raise ValueError(f"update must return shape {tuple(right.shape)}, found {tuple(new.shape)}")
        right.copy_(new)


def _per_weight(params: Params, blocks: Blocks, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero point (0 where there is none) of every weight, each (out, columns)."""
    scale, zero = params.dense(dtype)
    zero = torch.zeros_like(scale) if zero is None else zero
    scale, zero = (
        blocks.spread(part).expand(blocks.matrix).reshape(blocks.shape) for part in (scale, zero)
    )
    return scale, zero


def _columns_contiguous(x: Tensor) -> Tensor:
    """The same matrix, stored column by column: that is how the loop reads and writes it."""
    return x.T.contiguous().T
