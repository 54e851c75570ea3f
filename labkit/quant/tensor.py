"""QuantizedTensor: codes and scales. What quantizers, kernels and files exchange."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from labkit.quant import packing
from labkit.quant.blocks import Blocks
from labkit.quant.grid import Grid
from labkit.quant.spec import QuantSpec


@dataclass(frozen=True)
class Params:
    """What a grid needs beside its spec.

    scale  one per block, shape (row blocks, column blocks) or (n_blocks,) for flat runs, in its stored
           dtype; a QuantizedTensor where the scales are quantized themselves
    zero   same shape, or None: uint8 codes (zero="int") or reals in units of codes (zero="float");
           one real, (1,), in the unit of the numbers (zero="mean")
    table  a learned codebook: 2^bits ascending values (levels,), or (rows, levels), one for each row of the
           tensor seen as a matrix; None for the other formats
    """

    scale: Tensor | QuantizedTensor
    zero: Tensor | None = None
    table: Tensor | None = None

    def dense(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
        """(scale, zero) as plain floats, for arithmetic: what the stored ones stand for."""
        scale = (
            self.scale.dequantize(dtype)
            if isinstance(self.scale, QuantizedTensor)
            else self.scale.to(dtype)
        )
        return scale, None if self.zero is None else self.zero.to(dtype)

    @classmethod
    def side_by_side(cls, groups: list[Params]) -> Params:
        """Neighbouring groups' plain parameters, each (row blocks, 1), as those of the whole matrix."""
        scales = [group.scale for group in groups if isinstance(group.scale, Tensor)]
        zeros = [group.zero for group in groups if group.zero is not None]
        return cls(torch.cat(scales, dim=1), torch.cat(zeros, dim=1) if zeros else None)


@dataclass(frozen=True)
class Packed:
    """A QuantizedTensor as plain tensors for a file, and the little that is not a tensor (JSON-able)."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor on a grid.

    codes     same shape as the tensor; int8 for symmetric integers, else uint8: affine integers, table
              indices and the bit patterns of floats
    scale, zero, table  as in Params
    g_idx     (columns,) int32, or None: the group of each column where act-order has scattered them
    outliers  (flat indices int64, values), or None: elements kept outside the grid
    """

    codes: Tensor
    scale: Tensor | QuantizedTensor
    spec: QuantSpec
    zero: Tensor | None = None
    table: Tensor | None = None
    g_idx: Tensor | None = None
    outliers: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def params(self) -> Params:
        return Params(self.scale, self.zero, self.table)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that the codes stand for. Computed in float32, or float64 where ``dtype`` is that."""
        work = torch.float64 if dtype == torch.float64 else torch.float32
        blocks = Blocks(tuple(self.shape), self.spec.block)
        scale, zero = self.params.dense(work)
        scale = blocks.spread(scale, self.g_idx)
        zero = None if zero is None else blocks.spread(zero, self.g_idx)
        grid = Grid(self.spec, self.table)
        values = grid.dequantize(self.codes.reshape(blocks.matrix), scale, zero).reshape(self.shape)
        if self.outliers is not None:
            index, kept = self.outliers
            values.view(-1)[index] = kept.to(work)
        return values.to(dtype)

    def pack(self) -> Packed:
        """The exact bytes: codes as a stream of bits, lowest first, each row padded to whole bytes.

        Symmetric integers are stored with an offset, code + 2^(bits - 1); integer zero points as one
        stream.
        """
        rows = self.codes.reshape(Blocks(tuple(self.shape), (1, None)).matrix)
        tensors = {"codes": packing.pack_bits(_unsigned(rows, self.spec), self.spec.bits)}
        metadata: dict[str, Any] = {"spec": str(self.spec), "shape": list(self.shape)}
        if isinstance(self.scale, QuantizedTensor):
            inner = self.scale.pack()
            tensors |= {f"scale.{name}": tensor for name, tensor in inner.tensors.items()}
            metadata["scale"] = inner.metadata
        else:
            # safetensors cannot read e8m0 back; its byte is the exponent.
            e8m0 = self.scale.dtype == torch.float8_e8m0fnu
            tensors["scale"] = self.scale.view(torch.uint8) if e8m0 else self.scale
        if self.zero is not None:
            whole = self.spec.zero == "int"
            tensors["zero"] = (
                packing.pack_bits(self.zero.reshape(1, -1), self.spec.bits)[0] if whole else self.zero
            )
        if self.table is not None:
            tensors["table"] = self.table
        if self.g_idx is not None:
            tensors["g_idx"] = self.g_idx
        if self.outliers is not None:
            tensors["outliers.index"], tensors["outliers.values"] = self.outliers
        return Packed(tensors, metadata)

    @classmethod
    def unpack(cls, packed: Packed) -> QuantizedTensor:
        """The tensor that ``pack`` packed, code by code. Raises ValueError where a part does not fit."""
        tensors, metadata = packed.tensors, packed.metadata
        missing = {"codes"} - tensors.keys()
        if missing or not {"spec", "shape"} <= metadata.keys():
            raise ValueError(
                f"expected tensors with 'codes' and metadata with 'spec' and 'shape', "
                f"found {sorted(tensors)} and {sorted(metadata)}"
            )
        spec = QuantSpec.parse(str(metadata["spec"]))
        shape = tuple(metadata["shape"])
        rows, columns = Blocks(shape, (1, None)).matrix
        expected = (rows, packing.packed_bytes(columns, spec.bits))
        if tuple(tensors["codes"].shape) != expected:
            raise ValueError(
                f"codes of {spec} for shape {shape} must be {expected} bytes, "
                f"found {tuple(tensors['codes'].shape)}"
            )
        codes = _signed(packing.unpack_bits(tensors["codes"], spec.bits, columns), spec).reshape(shape)
        scale: Tensor | QuantizedTensor
        if "scale" in metadata:
            inner = {name[6:]: tensor for name, tensor in tensors.items() if name.startswith("scale.")}
            scale = cls.unpack(Packed(inner, metadata["scale"]))
        else:
            scale = tensors["scale"]
            e8m0 = str(spec.scale).startswith("e8m0")
            scale = scale.view(torch.float8_e8m0fnu) if e8m0 else scale
        zero = tensors.get("zero")
        if zero is not None and spec.zero == "int":
            grid = tuple(scale.shape)
            zero = packing.unpack_bits(zero.reshape(1, -1), spec.bits, prod(grid)).reshape(grid)
        outliers = None
        if "outliers.index" in tensors:
            outliers = tensors["outliers.index"], tensors["outliers.values"]
        return cls(codes, scale, spec, zero, tensors.get("table"), tensors.get("g_idx"), outliers)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form: codes, scales, zero points, table, group indices, outliers."""
        rows, columns = Blocks(tuple(self.shape), (1, None)).matrix
        total = rows * packing.packed_bytes(columns, self.spec.bits) + self.scale.nbytes
        if self.zero is not None:
            whole = self.spec.zero == "int"
            total += packing.packed_bytes(self.zero.numel(), self.spec.bits) if whole else self.zero.nbytes
        total += sum(
            part.nbytes for part in (self.table, self.g_idx, *(self.outliers or ())) if part is not None
        )
        return total

    @property
    def bits_per_weight(self) -> float:
        """Bits of the packed form per element; NaN for an empty tensor."""
        count = self.codes.numel()
        return 8 * self.nbytes / count if count else float("nan")

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same tensor on another device."""
        move = lambda part: None if part is None else part.to(device)  # noqa: E731
        outliers = (
            None if self.outliers is None else (self.outliers[0].to(device), self.outliers[1].to(device))
        )
        return replace(
            self,
            codes=self.codes.to(device),
            scale=self.scale.to(device),
            zero=move(self.zero),
            table=move(self.table),
            g_idx=move(self.g_idx),
            outliers=outliers,
        )

    def __repr__(self) -> str:
        rate = f"{self.bits_per_weight:.4g} bits per weight"
        return f"QuantizedTensor({self.spec}, shape={tuple(self.shape)}, {rate})"


def _unsigned(codes: Tensor, spec: QuantSpec) -> Tensor:
    return codes if codes.dtype == torch.uint8 else (codes.short() + 2 ** (spec.bits - 1)).to(torch.uint8)


def _signed(codes: Tensor, spec: QuantSpec) -> Tensor:
    if not spec.is_integer or spec.zero != "none":
        return codes
    return (codes.short() - 2 ** (spec.bits - 1)).to(torch.int8)
