"""GPTQ's loop over columns, by ``native/columns.h``; the rest of the method is ``labkit.quant.gptq``'s."""

from __future__ import annotations

import ctypes
from functools import partial

import torch
from torch import Tensor

from labkit.kernels import build
from labkit.quant import gptq
from labkit.quant.gptq import round_columns as plain
from labkit.quant.grid import Grid
from labkit.quant.methods import Method


class _Columns(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("w", "scale", "zero", "u", "err")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "apart", "start", "stop")),
        *((name, ctypes.c_float) for name in ("lowest", "highest")),
        ("real", ctypes.c_int32),
    ]


def round_columns(
    W: Tensor, scale: Tensor, zero: Tensor, U: Tensor, Err: Tensor, grid: Grid, start: int, stop: int
) -> None:
    """What ``labkit.quant.gptq.round_columns`` does, up to the rounding of float32.

    Float32 on the CPU and integer grids are ours; others, and layouts that are not GPTQ's own, are its.
    """
    parts = (W, scale, zero, Err)
    ours = (
        grid.spec.is_integer
        and all(part.dtype == torch.float32 and part.device.type == "cpu" for part in (*parts, U))
        and all(part.stride() == (1, W.shape[0]) for part in parts)
        and U.stride(1) == 1
        and build.why_not() is None
    )
    if not ours:
        return plain(W, scale, zero, U, Err, grid, start, stop)
    found = _Columns(
        *(part.data_ptr() for part in (W, scale, zero, U, Err)), *W.shape, U.stride(0), start, stop,
        grid.lowest, grid.highest, grid.spec.zero == "float",
    )  # fmt: skip
    build.library().labkit_columns(ctypes.byref(found), torch.get_num_threads())


def faster(method: Method) -> Method:
    """``method`` with what this package has for it; one that it has nothing for as it is."""
    return partial(gptq, columns=round_columns) if method is gptq else method
