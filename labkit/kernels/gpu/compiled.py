"""The kernels compiled for GPUs that are not here: registers, shared memory, spills, tensor-core instructions.

Triton brings NVIDIA's assembler, so all but the time can be read without a GPU. What is compiled are the default
configurations, for shapes that multiples of 16 divide, as those of language models are.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from labkit.kernels.gpu import activations, attention, packing, product, w8a8
from labkit.quant import Grid, QuantSpec

SHARED = {
    80: 163 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # bytes that one block may have (CUDA C Programming Guide)
REGISTERS = 255  # of a thread, on all of them
# Whole numbers that 16 need not divide.
_ODD = {"rows", "blocks", "groups", "per_group", "span", "parts", "group", "kv_heads", "count"}
_INSTRUCTION = re.compile(r"\b((?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)[\w.:]*)")

Pointers = dict[str, str | None]


@dataclass(frozen=True)
class Case:
    """A kernel with the types of what its arguments point to, None for those that are left out, and its constants."""

    name: str
    kernel: Any
    pointers: Pointers
    constants: dict[str, Any]
    tensor_cores: bool = False


@dataclass(frozen=True)
class Row:
    """What one kernel is on one architecture: registers of a thread, bytes of shared memory of a block, bytes of local
    memory of a thread that registers spilled to, and the kinds of tensor-core instruction in its PTX."""

    architecture: str
    kernel: str
    warps: int
    registers: int
    shared: int
    spilled: int
    instructions: list[str] = field(default_factory=list)


def cases() -> list[Case]:
    """Every kernel in the forms that are used."""
    symmetric: Pointers = {"zero": None, "table": None}
    affine: Pointers = {"zero": "fp16", "table": None}
    real: Pointers = {"zero": "fp32", "table": None}
    table: Pointers = {"zero": None, "table": "fp32"}
    words: Pointers = {"words": "i16", "bias": None, "sums": "fp32", "arrived": "i32"}
    int8: Pointers = {
        "x": "i8",
        "x_scale": "fp32",
        "weight": "i8",
        "scale": "fp32",
        "bias": None,
        "y": "bf16",
    }
    held: Pointers = {"q": "bf16", "keys": "i16", "k_scale": "fp32", "values": "i16", "v_scale": "fp32",
                      "lengths": "i32", "sums": "fp32", "logs": "fp32"}  # fmt: skip
    # A scale for each token and head; or KIVI's, one for each number of 32 tokens in keys. Ones are specialised.
    token = {"k_tall": 1, "k_across": 1, "K_WHOLE": True, "K_EVEN": False, "K_ALIKE": True}
    kivi = {"k_wide": 1, "K_WHOLE": False, "K_EVEN": True, "K_ALIKE": False}
    nf4 = product._inlaid(tuple(Grid(QuantSpec.parse("nf4 g64")).dequantize(torch.arange(16), torch.ones(())).tolist()),
                          torch.bfloat16)  # fmt: skip

    def of_words(name: str, x: str, zeros: Pointers, bits: int, config: dict) -> Case:
        code = {"BITS": bits, "MIDDLE": 2 ** (bits - 1), "UNIT": product.UNIT, "TABLE": nf4 if zeros["table"] else ""}
        given = {"x": x, "y": x, **words, "scale": "fp16" if bits <= 4 else "fp32", **zeros}
        return Case(name, product._product, given, code | config, x != "fp32")

    def attend(name: str, zero: str | None, bits: int, keys: dict[str, Any], q: str = "bf16") -> Case:
        values = {"v_tall": 1, "v_across": 1, "V_WHOLE": True, "V_EVEN": False, "V_ALIKE": True}
        zeros = {"k_zero": zero, "v_zero": zero}
        config = attention.ATTEND | {"WARPS": attention.ATTEND["num_warps"]}
        code = {"K_BITS": bits, "V_BITS": bits, "HEADS": attention.LEAST, "WIDTH": 128}
        if q == "fp32":
            code |= {"HEADS": attention.LEAST_EXACT}
            config |= {"TOKENS": attention.LEAST}
        return Case(name, attention._attend, held | zeros | {"q": q}, code | keys | values | config, q != "fp32")

    return [
        of_words("int4, one row", "fp16", symmetric, 4, product.ROW),
        of_words("int4 asym, one row", "bf16", affine, 4, product.ROW),
        of_words("nf4, one row", "bf16", table, 4, product.ROW),
        of_words("int2, one row", "bf16", symmetric, 2, product.ROW),
        of_words("int8 asym, one row", "bf16", real, 8, product.ROW),
        of_words("int4, few rows", "fp16", symmetric, 4, product.FEW),
        of_words("int4 asym, few rows", "bf16", affine, 4, product.FEW),
        of_words("nf4, few rows", "bf16", table, 4, product.FEW),
        of_words("int2, few rows", "bf16", symmetric, 2, product.FEW),
        of_words("int8 asym, few rows", "bf16", real, 8, product.FEW),
        of_words("int4 asym, fp32", "fp32", affine, 4, product.EXACT),
        of_words("int8 asym, fp32", "fp32", real, 8, product.EXACT),
        of_words("int2, fp32", "fp32", symmetric, 2, product.EXACT),
        of_words("int4, many rows", "fp16", symmetric, 4, product.MANY),
        of_words("int4 asym, many rows", "bf16", affine, 4, product.MANY),
        of_words("int4 real zeros, many rows", "bf16", real, 4, product.MANY),
        of_words("nf4, many rows", "bf16", table, 4, product.MANY_ROOMY),
        of_words("int8, many rows", "bf16", symmetric, 8, product.MANY_ROOMY),
        Case("int8 x int8, few rows", w8a8._int8_tiles, int8, w8a8.FEW, True),
        Case("int8 x int8, many rows", w8a8._int8_tiles, int8, w8a8.MANY, True),
        Case("rows to int8", activations._round_rows, {"x": "bf16", "codes": "i8", "scale": "fp32"},
             {"STEPS": 127.5, "LOW": -128, "FP8": False, **activations.ROUND}),
        Case("rows to fp8", activations._round_rows, {"x": "bf16", "codes": "u8", "scale": "fp32"},
             {"STEPS": 448.0, "LOW": 0, "FP8": True, **activations.ROUND}),
        attend("attention, int8", None, 8, token),
        attend("attention, int8, fp16", None, 8, token, "fp16"),
        attend("attention, int8, fp32", None, 8, token, "fp32"),
        attend("attention, int4 asym", "fp32", 4, token),
        attend("attention, int4 asym, fp16", "fp32", 4, token, "fp16"),
        attend("attention, int4 asym, keys by channel", "fp32", 4, kivi),
        Case("attention, combine", attention._combine, {"sums": "fp32", "logs": "fp32", "y": "bf16"},
             {"D": 128, **attention.COMBINE}),
        Case("pack int4", packing._pack, {"codes": "u8", "words": "i32"}, {"BITS": 4, **packing.PACK}),
        Case("unpack int4", packing._unpack, {"codes": "u8", "words": "i32"}, {"BITS": 4, **packing.PACK}),
    ]  # fmt: skip


def rows(architectures: tuple[int, ...] = tuple(SHARED)) -> Iterator[Row]:
    """Each case compiled for each architecture (80: A100, 90: H100, 100: B200); a second or two for each."""
    for architecture in architectures:
        for case in cases():
            yield compiled(case, architecture)


def compiled(case: Case, architecture: int) -> Row:
    """``case`` compiled for ``architecture``. Raises what Triton raises, RuntimeError under its interpreter."""
    if knobs.runtime.interpret:
        raise RuntimeError("under TRITON_INTERPRET=1 nothing is compiled; unset it")
    signature, constants, attributes = {}, {}, {}
    for place, (name, parameter) in enumerate(inspect.signature(case.kernel.fn).parameters.items()):
        kind = str(parameter.annotation)
        if name in case.constants or case.pointers.get(name, "") is None:
            signature[name], constants[name] = "constexpr", case.constants.get(name)
        elif name in case.pointers:
            signature[name] = f"*{case.pointers[name]}"
        else:
            signature[name] = {"int": "i32", "float": "fp32"}[kind]
        if signature[name] != "constexpr" and name not in _ODD and kind != "float":
            attributes[(place,)] = [["tt.divisibility", 16]]
    options = {name: case.constants[name] for name in ("num_warps", "num_stages") if name in case.constants}
    source = ASTSource(case.kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    registers, spilled = _used(made.asm["cubin"])
    return Row(
        f"sm_{architecture}", case.name, made.metadata.num_warps, registers, made.metadata.shared, spilled,
        sorted({".".join(found.split(".")[:2]) for found in _INSTRUCTION.findall(made.asm["ptx"])}),
    )  # fmt: skip


def _used(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread, as NVIDIA's tool reads them off the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}
    return used["REG"], used["STACK"] + used["LOCAL"]
