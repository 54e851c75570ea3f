"""The int32 layout in which AutoGPTQ, GPTQModel and vLLM exchange GPTQ's weights, and its two zero points.

For b bits, codes below 2^b and groups of G columns:

    qweight  (in b / 32, out) int32: down each column the codes of one output, as a stream of bits, low first
    qzeros   (groups, out b / 32) int32: along each row the zero points of one group, likewise
    scales   (groups, out) fp16
    g_idx    (in,) int32: the group of each input

A weight is ``(code - zero) scale``. Version 1 (``checkpoint_format: gptq``) stores ``zero - 1``, version 2
(``gptq_v2``) stores ``zero``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from labkit.quant.blocks import Blocks
from labkit.quant.packing import pack_bits, unpack_bits
from labkit.quant.spec import QuantSpec
from labkit.quant.tensor import QuantizedTensor


def to_gptq(tensor: QuantizedTensor, version: int = 1) -> dict[str, Tensor]:
    """The four tensors of the layout, by name. A symmetric grid's zero point is 2^(b - 1).

    Raises ValueError for a spec that the layout has no place for, and in version 1 for a zero point of 0:
    stored as 2^b - 1, some readers make 0 of it, others 2^b, others spoil the zero point beside it.
    """
    spec, bits = tensor.spec, tensor.spec.bits
    _check(spec, tuple(tensor.shape), version)
    outputs, inputs = tensor.shape
    blocks = Blocks((outputs, inputs), spec.block)
    codes, zero = tensor.codes, tensor.zero
    if zero is None:
        codes = (codes.short() + 2 ** (bits - 1)).to(torch.uint8)
        zero = torch.full(blocks.grid, 2 ** (bits - 1), dtype=torch.uint8)
    if version == 1:
        if count := int((zero == 0).sum()):
            raise ValueError(
                f"version 1 stores zero - 1, and readers differ on what a zero point of 0 then is; "
                f"{count} of {zero.numel()} are 0: write version 2 (gptq_v2) or use a symmetric grid"
            )
        zero = zero - 1
    assert isinstance(tensor.scale, Tensor)
    g_idx = tensor.g_idx
    return {
        "qweight": pack_bits(codes, bits).view(torch.int32).T.contiguous(),
        "qzeros": pack_bits(zero.T.contiguous(), bits).view(torch.int32),
        "scales": tensor.scale.T.contiguous(),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // blocks.size[1] if g_idx is None else g_idx,
    }


def from_gptq(tensors: dict[str, Tensor], spec: QuantSpec, version: int = 1) -> QuantizedTensor:
    """The tensor that ``to_gptq`` laid out. ``spec`` says bits and group, which the tensors leave open.

    A stored 2^b - 1 of version 1 is read as 0, as AutoGPTQ does. Raises ValueError for tensors that do not
    fit together or are not symmetric where the spec is.
    """
    bits = spec.bits
    outputs, inputs = tensors["scales"].shape[1], tensors["g_idx"].shape[0]
    _check(spec, (outputs, inputs), version)
    blocks = Blocks((outputs, inputs), spec.block)
    shapes = (inputs * bits // 32, outputs), (blocks.grid[1], outputs * bits // 32)
    found = tuple(tensors["qweight"].shape), tuple(tensors["qzeros"].shape)
    if found != shapes or tensors["scales"].shape[0] != blocks.grid[1]:
        raise ValueError(f"expected qweight and qzeros of shape {shapes} for {spec}, found {found}")
    codes = unpack_bits(tensors["qweight"].T.contiguous().view(torch.uint8), bits, inputs)
    zero = unpack_bits(tensors["qzeros"].contiguous().view(torch.uint8), bits, outputs).T.contiguous()
    if version == 1:
        zero = (zero + 1) & (2**bits - 1)
    if spec.zero == "none" and not bool((zero == 2 ** (bits - 1)).all()):
        raise ValueError(
            f"{spec} has zero points of {2 ** (bits - 1)}; found others: is it version {version}?"
        )
    symmetric = spec.zero == "none"
    in_order = torch.equal(tensors["g_idx"].long(), torch.arange(inputs) // blocks.size[1])
    return QuantizedTensor(
        codes=(codes.short() - 2 ** (bits - 1)).to(torch.int8) if symmetric else codes,
        scale=tensors["scales"].T.contiguous(),
        spec=spec,
        zero=None if symmetric else zero,
        g_idx=None if in_order else tensors["g_idx"],
    )


def _check(spec: QuantSpec, shape: tuple[int, ...], version: int) -> None:
    if version not in (1, 2):
        raise ValueError(f"the layout has versions 1 and 2, found {version!r}")
    rows = None if isinstance(spec.block, int) else spec.block[0]
    plain = spec.format in ("int2", "int3", "int4", "int8") and spec.zero != "float"
    if not plain or rows != 1 or spec.scale != "fp16":
        raise ValueError(
            f"the layout holds int2, int3, int4 or int8 in groups with fp16 scales, found {spec}"
        )
    if len(shape) != 2 or any(size * spec.bits % 32 for size in shape):
        raise ValueError(f"rows and columns of {spec} must fill whole int32 words, found shape {shape}")
