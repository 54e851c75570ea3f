"""int4 weights on the CPU with torch's own kernel: reads 4 bits per weight and multiplies in bfloat16.

Activations, scales and sums of zero points are rounded to bfloat16 (8 bits of precision), so the output
differs from the reference by up to TOLERANCE of its norm. Worth it where reading the weights is what takes
the time: few rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from labkit.kernels.inputs import check_input, not_on_a_cpu, per_row, uneven_act_order
from labkit.quant import Blocks, QuantizedTensor, QuantSpec

GROUPS = (256, 128, 64, 32)  # what the kernel can take, largest first
TOLERANCE = 0.01  # of the output's Frobenius norm; 0.002 to 0.005 is usual
_ROWS = 16  # the kernel wants output features in multiples of this


class Int4Cpu:
    """A weight in the kernel's own layout: codes two to a byte, a bfloat16 scale and offset per group.

    Takes int4, symmetric or affine, on blocks whose width 32, 64, 128 or 256 divides. Act-order is
    undone by reordering the columns of the weight here, and those of ``x`` in each call.
    """

    backend = "int4_cpu"

    @staticmethod
    def why_not(weight: QuantizedTensor, input: QuantSpec | None = None) -> str | None:
        """What keeps this kernel from taking ``weight``, or None where it can."""
        spec = weight.spec
        if input is not None:
            return f"it multiplies activations as they are, found {input}"
        if spec.format != "int4":
            return f"the kernel is for int4, found {spec.format}"
        if reason := not_on_a_cpu(weight):
            return reason
        if isinstance(spec.block, int):
            return "flat runs may cross rows; use groups"
        width = Blocks(tuple(weight.shape), spec.block).size[1]
        if weight.shape[1] % width:
            return f"the last group is ragged: {weight.shape[1]} columns in groups of {width}"
        if _group(width) is None:
            return f"groups must be a multiple of {GROUPS[-1]}, found {width}"
        return uneven_act_order(weight, width)

    def __init__(self, weight: QuantizedTensor, input: QuantSpec | None = None):
        self.shape = weight.shape
        width = Blocks(tuple(weight.shape), weight.spec.block).size[1]
        self._group = _group(width) or GROUPS[-1]
        self._order = None if weight.g_idx is None else torch.argsort(weight.g_idx, stable=True)
        codes = weight.codes if self._order is None else weight.codes[:, self._order]
        codes = codes.int() + (8 if weight.spec.zero == "none" else 0)  # the kernel's codes are 0 to 15
        scale, zero = weight.params.dense()
        # The kernel computes (code - 8) * scale + offset.
        offset = torch.zeros_like(scale) if zero is None else (8 - zero) * scale
        pairs = torch.stack([scale, offset], dim=-1)  # (row blocks, column blocks, 2)
        pairs = pairs.repeat_interleave(width // self._group, dim=1)
        pairs = per_row(pairs, weight)  # (out, groups, 2)
        missing = -self.shape[0] % _ROWS
        codes = torch.nn.functional.pad(codes, (0, 0, 0, missing), value=8)
        pairs = torch.nn.functional.pad(pairs, (0, 0, 0, 0, 0, missing))
        self._pairs = pairs.transpose(0, 1).contiguous().bfloat16()  # (groups, out, 2)
        self._codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._pairs.nbytes + (0 if self._order is None else self._order.nbytes)

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        check_input(x, self.shape)
        rows = x.reshape(-1, self.shape[1])
        if self._order is not None:
            rows = rows[:, self._order]
        if len(rows):
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rows.bfloat16().contiguous(), self._codes, self._group, self._pairs
            )
        else:
            y = rows.new_zeros(0, self._pairs.shape[1])
        y = y[:, : self.shape[0]].to(x.dtype)
        if bias is not None:
            y = y + bias.to(x.dtype)
        return y.reshape(*x.shape[:-1], self.shape[0])


def _group(width: int) -> int | None:
    """The largest group size the kernel knows that divides ``width``."""
    return next((group for group in GROUPS if width % group == 0), None)
