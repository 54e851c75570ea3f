"""Weights of up to 8 bits on an NVIDIA GPU, by the kernels of ``labkit.kernels.gpu``.

Sums are float32. A float32 ``x`` is multiplied as it is; for float16 and bfloat16 table values and zero points that are
reals are rounded to that dtype on the way into the tensor cores, whole numbers fit.
"""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from labkit.kernels.inputs import (
    check_input,
    not_of_groups,
    not_on,
    own_tables,
    per_row,
    uneven_act_order,
    width_of,
)
from labkit.quant import QuantizedTensor, QuantSpec

if TYPE_CHECKING:
    from labkit.kernels.gpu.product import Words

STEP = 16  # columns that tensor cores take at once


class TritonGpu:
    """A weight as words of 2, 4 or 8-bit codes, or as int8 where activations are int8 too.

    Takes every format of up to 4 bits whose table is one for all rows, and integers of up to 8, on groups of columns
    that are a multiple of 16 wide (the last may be shorter). Act-order is undone by reordering the columns of the
    weight here, and those of ``x`` in each call. With activations on "int8 channel scale=fp32", narrow or not, which
    gives each row a scale of its own, weights of symmetric int8 with a scale per row. There are no gradients.

    Under TRITON_INTERPRET=1 it also takes codes on the CPU, where it is named, and runs in Triton's interpreter.
    """

    backend = "triton_gpu"

    @staticmethod
    def why_not(weight: QuantizedTensor, input: QuantSpec | None = None) -> str | None:
        """What keeps this kernel from taking ``weight`` and activations on the grid ``input``, or None."""
        kind = weight.codes.device.type
        if reason := not_on("a GPU", kind == "cuda" or (kind == "cpu" and interpreted()), weight):
            return reason
        if find_spec("triton") is None:
            return "triton is not installed; it comes with torch's builds for GPUs"
        if input is not None:
            return _why_not_int8(weight, input)
        if reason := not_of_groups(weight, STEP):
            return reason
        if own_tables(weight):
            return "each row has a table of its own"
        width = width_of(weight) or weight.shape[1]
        return uneven_act_order(weight, width)

    def __init__(self, weight: QuantizedTensor, input: QuantSpec | None = None):
        self.shape, self._input = weight.shape, input
        self._order = None if weight.g_idx is None else torch.argsort(weight.g_idx, stable=True)
        if self._order is not None:
            weight = replace(weight, codes=weight.codes[:, self._order], g_idx=None)
        self._int8: tuple[Tensor, Tensor] | None = None
        self._words: Words | None = None
        if input is not None:
            self._int8 = (
                weight.codes.contiguous(),
                per_row(weight.params.dense()[0], weight)[:, 0].contiguous(),
            )
            return
        from labkit.kernels.gpu.product import Words

        with torch.cuda.device_of(weight.codes):  # Triton launches on the current device
            self._words = Words.of(weight)

    @property
    def nbytes(self) -> int:
        words = self._words
        parts = self._int8 or (() if words is None else (words.words, words.scale, words.zero, words.table))
        return sum(part.nbytes for part in (*parts, self._order) if part is not None)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        from labkit.kernels.gpu.product import product
        from labkit.kernels.gpu.w8a8 import w8a8

        check_input(x, self.shape)
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("triton_gpu gives no gradients; use torch.no_grad(), or backend='reference'")
        rows = x.reshape(-1, self.shape[1])
        half = x.dtype in (torch.float16, torch.bfloat16) and not interpreted()  # where it is wrong in bfloat16
        rows = rows if half else rows.float()
        if self._order is not None:
            rows = rows[:, self._order]
        with torch.cuda.device_of(rows):
            if self._words is not None:
                y = product(rows, self._words, bias)
            else:
                assert self._int8 is not None and self._input is not None
                y = w8a8(rows, *self._int8, bias, narrow=self._input.narrow)
        return y.to(x.dtype).reshape(*x.shape[:-1], self.shape[0])


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not_int8(weight: QuantizedTensor, input: QuantSpec) -> str | None:
    spec = weight.spec
    if spec.format != "int8" or spec.zero != "none" or width_of(weight) != weight.shape[1]:
        return f"int8 activations want a weight of symmetric int8 with a scale per row, found {spec}"
    if input not in (QuantSpec("int8", (1, None), scale="fp32", narrow=narrow) for narrow in (False, True)):
        return f"it rounds activations to 'int8 channel scale=fp32', narrow or not, found {input}"
    return None
