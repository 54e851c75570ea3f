"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round column by column, let the columns to the right make up for it.

The letters are the paper's: W, H, H^-1, U (the upper Cholesky factor of H^-1), d (its diagonal), err.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from labkit.quant.blocks import Blocks
from labkit.quant.encode import encode
from labkit.quant.fit import fit, working
from labkit.quant.grid import Grid
from labkit.quant.observers import Observer
from labkit.quant.spec import QuantSpec
from labkit.quant.stats import Stats
from labkit.quant.tensor import Params, QuantizedTensor

# update(weights_right (out, remaining), error (out,), hinv_row (remaining,)) -> the new weights_right
Update = Callable[[Tensor, Tensor, Tensor], Tensor]


class GPTQWarning(UserWarning):
    """The Hessian had no Cholesky factor at the damping asked for; ``damp`` is the one that was used instead."""

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
) -> QuantizedTensor:
    """``weight`` (out_features, in_features) on the grid of ``spec``, so that W X changes little on the inputs seen.

    stats          its ``hessian`` (in, in) is needed
    damp           added to the diagonal of H, as a part of its mean
    block_size     columns that are finished before the rest of W hears of their errors. It makes GPTQ fast and has no
                   other effect; it is raised to a multiple of the group where groups are fitted on the way
    act_order      take the columns in descending order of H's diagonal. Groups fitted on the way are then groups of
                   that order, and ``g_idx`` of the result names each column's group
    static_groups  fit all scales on the weights as they came. False: each group's when its turn comes, on columns that
                   already make up for those before. Scales that are quantized themselves or lie along flat
                   runs are always static
    update         replaces the rank-one update W[:, j+1:] - err U[j, j+1:] within a block:
                   ``update(weights_right, error, hinv_row)`` with shapes (out, remaining), (out,), (remaining,)
                   returns the new (out, remaining)

    A column whose input was always 0 is rounded to nearest: nothing is known about it. (The authors' code sets it to
    0, which a short calibration would make expensive.) When H has no Cholesky factor, damping is raised tenfold until
    it has, with a GPTQWarning. W is float32 (float64 if it came so); H is factorised in float64.
    Raises ValueError when the shapes do not fit, H is not finite, or no damping helps.
    """
    W = working(weight)
    H = _checked_hessian(stats, W)
    rows, columns = W.shape
    blocks = Blocks((rows, columns), spec.block)
    group = columns if isinstance(spec.block, int) else blocks.size[1]
    static = static_groups or isinstance(spec.block, int) or isinstance(spec.scale, QuantSpec) or W.numel() == 0
    if not static:
        block_size = -(-block_size // group) * group  # a group never straddles blocks: its columns are up to date

    order = torch.argsort(H.diagonal(), descending=True, stable=True) if act_order else torch.arange(columns)
    U = _inverse_factor(H[order][:, order], damp).to(W)  # H^-1 = U^T U
    W = _columns_first(W[:, order])
    fitted: list[Params] = []
    if static:
        fitted = [fit(weight, spec, observer)]
        scale, zero = (_columns_first(part[:, order]) for part in _per_element(fitted[0], blocks, W))
    else:
        scale, zero = torch.empty_like(W), torch.empty_like(W)
    affine = spec.zero != "none"
    grid = Grid(spec)

    for i1 in range(0, columns, block_size):
        i2 = min(i1 + block_size, columns)
        Err = torch.empty_like(W[:, i1:i2])
        for j in range(i1, i2):
            if not static and j % group == 0:
                here = slice(j, j + group)
                fitted.append(fit(W[:, here], spec, observer))
                cut = Blocks(tuple(W[:, here].shape), spec.block)
                scale[:, here], zero[:, here] = _per_element(fitted[-1], cut, W)
            w, d = W[:, j], U[j, j]
            q = grid.round(w, scale[:, j], zero[:, j] if affine else None)
            err = (w - q) / d
            W[:, j] = q
            Err[:, j - i1] = err
            if j + 1 < i2:
                _apply(update, W[:, j + 1 : i2], err, U[j, j + 1 : i2])
        W[:, i2:] -= Err @ U[i1:i2, i2:]

    back = torch.argsort(order)
    if static:
        return encode(W[:, back], spec, fitted[0])
    tensor = encode(W, spec, _side_by_side(fitted))
    if not act_order:
        return tensor
    g_idx = (torch.arange(columns) // group)[back].int() if group < columns else None
    return replace(tensor, codes=tensor.codes[:, back].contiguous(), g_idx=g_idx)


gptq.needs = frozenset({"hessian"})  # type: ignore[attr-defined]


def _apply(update: Update | None, right: Tensor, err: Tensor, hinv_row: Tensor) -> None:
    """right <- right - err hinv_row, in place; or what the caller's own ``update`` makes of it."""
    if update is None:
        right.addcmul_(err[:, None], hinv_row[None, :], value=-1)  # (out, remaining)
        return
    new = update(right, err, hinv_row)
    if new.shape != right.shape:
        raise ValueError(f"update must return weights of shape {tuple(right.shape)}, found {tuple(new.shape)}")
    right.copy_(new)


def _inverse_factor(H: Tensor, damp: float) -> Tensor:
    """The upper triangle U, float64, with U^T U = (H + damp mean(diag H) I)^-1."""
    H = H.double()
    dead = H.diagonal() == 0
    mean = H.diagonal()[~dead].mean() if not bool(dead.all()) else H.new_ones(())
    H = H + torch.diag(torch.where(dead, mean, 0))
    asked = damp
    for _ in range(10):
        L, bad = torch.linalg.cholesky_ex(H + damp * mean * torch.eye(len(H), dtype=H.dtype))
        if not bad:
            U, bad = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
        if not bad:
            if damp != asked:
                message = f"the Hessian has no Cholesky factor with damp={asked:g}; went on with damp={damp:g}"
                warnings.warn(GPTQWarning(message, damp), stacklevel=3)
            return U
        damp = max(10 * damp, 1e-6)
    raise ValueError(
        f"the Hessian has no Cholesky factor, not even with damp={damp / 10:g}: "
        f"it must be a sum of x x^T, symmetric and without negative eigenvalues"
    )


def _checked_hessian(stats: Stats | None, W: Tensor) -> Tensor:
    if W.ndim != 2:
        raise ValueError(f"gptq takes a weight (out_features, in_features), found shape {tuple(W.shape)}")
    if stats is None:
        raise ValueError("gptq needs stats with a hessian of the layer's inputs: Stats.of(inputs) or calibrate")
    H = stats.hessian
    if H.shape != (W.shape[1], W.shape[1]):
        raise ValueError(f"expected a hessian of shape {(W.shape[1], W.shape[1])}, found {tuple(H.shape)}")
    if not bool(H.isfinite().all()):
        raise ValueError("the hessian holds NaN or infinity; look at the calibration inputs of this layer")
    return H


def _per_element(params: Params, blocks: Blocks, W: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point (0 where there is none) of every weight, (out, in) in W's dtype."""
    scale, zero = params.dense(W.dtype)
    zero = torch.zeros_like(scale) if zero is None else zero
    spread = (blocks.spread(part).expand(blocks.matrix).reshape(blocks.shape) for part in (scale, zero))
    return next(spread), next(spread)


def _columns_first(x: Tensor) -> Tensor:
    """The same matrix, laid out so that a column is contiguous: the loop reads and writes columns."""
    return x.T.contiguous().T


def _side_by_side(fitted: list[Params]) -> Params:
    """The parameters of neighbouring groups, from left to right, as those of the whole matrix."""
    scale = torch.cat([params.scale for params in fitted], dim=1)
    zero = None if fitted[0].zero is None else torch.cat([params.zero for params in fitted], dim=1)
    return Params(scale, zero)
