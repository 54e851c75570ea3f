"""What torchao, optimum-quanto and llm-compressor make of a layer, and why it is not always what labkit makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import library_steps as way
import torch
from compressed_tensors import quantization as ct
from library_layers import Layer, rounded, stats_of
from library_steps import spread
from llmcompressor.modifiers.gptq import gptq_quantize as llmc_gptq
from llmcompressor.modifiers.gptq import helpers as llmc_helpers
from llmcompressor.modifiers.transform.awq import base as llmc_awq
from llmcompressor.modifiers.transform.awq.mappings import ResolvedMapping
from llmcompressor.observers import Observer
from llmcompressor.pipelines.cache import IntermediatesCache
from optimum import quanto
from torch import Tensor
from torchao.prototype import custom_fp_utils as ao_floatx
from torchao.prototype.awq.core import AWQObserver
from torchao.prototype.gptq import api as ao_gptq
from torchao.prototype.mx_formats import kernels as ao_kernels
from torchao.prototype.mx_formats import mx_tensor as ao_mx
from torchao.prototype.mx_formats import nvfp4_tensor as ao_nvfp4
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, NF4Tensor, PerGroup
from torchao.quantization import quant_primitives as ao

from labkit.quant import QuantSpec
from labkit.quant.formats import FLOATS, float_codes


@dataclass
class Side:
    """What one of the two made of a layer.

    codes    (out, in), in labkit's coding
    scale    one for each block
    numbers  (out, in): what the codes stand for, by whoever made them
    zero     one for each block, in units of codes, or None
    """

    codes: Tensor
    scale: Tensor
    numbers: Tensor
    zero: Tensor | None = None


@dataclass
class Case:
    """One method on one grid against one function of a library.

    why     the reason where they differ, one sentence, from the library's source
    redone  codes and scales with that step done in the library's way, see library_steps
    """

    method: str
    spec: str
    library: str
    function: str
    theirs: Callable[[Layer, QuantSpec], Side]
    why: str = ""
    redone: Callable[[Layer, QuantSpec], way.Redone] | None = None
    options: dict[str, Any] = field(default_factory=dict)


# torchao


def ao_block(spec: QuantSpec, W: Tensor) -> tuple[int, int]:
    rows, columns = spec.block  # type: ignore[misc]
    return rows or W.shape[0], columns or W.shape[1]


def ao_affine(layer: Layer, spec: QuantSpec) -> Side:
    W, block, (lo, hi) = layer.weight, ao_block(spec, layer.weight), spec.code_range
    symmetric = spec.zero == "none"
    kind = ao.MappingType.SYMMETRIC if symmetric else ao.MappingType.ASYMMETRIC
    dtype = torch.int8 if symmetric else torch.uint8
    scale, zero = ao.choose_qparams_affine(W, kind, block, dtype, lo, hi, scale_dtype=torch.float32)
    codes = ao.quantize_affine(W, block, scale, zero, dtype, lo, hi)
    numbers = ao.dequantize_affine(codes, block, scale, zero, dtype, lo, hi)
    return Side(codes, scale, numbers, None if symmetric else zero)


def ao_tinygemm(layer: Layer, spec: QuantSpec) -> Side:
    W, block, top = layer.weight, ao_block(spec, layer.weight), 2**spec.bits - 1
    scale, middle = ao._choose_qparams_affine_tinygemm(
        W, ao.MappingType.ASYMMETRIC, block, torch.uint8, 0, top
    )
    codes = ao._quantize_affine_tinygemm(W, block, scale, middle, torch.uint8, 0, top)
    numbers = ao._dequantize_affine_tinygemm(codes, block, scale, middle, torch.uint8, 0, top)
    return Side(codes, scale, numbers, (top + 1) / 2 - middle / scale)


def ao_hqq(layer: Layer, spec: QuantSpec) -> Side:
    codes, scale, zero, _ = ao._choose_qparams_and_quantize_affine_hqq(
        layer.weight, spec.bits, 64, compute_dtype=torch.float32, device="cpu", raw_output=True
    )
    numbers = (codes - spread(zero, spec, layer)) * spread(scale, spec, layer)
    return Side(codes, scale, numbers, zero)


def ao_nf4(layer: Layer, spec: QuantSpec) -> Side:
    q = NF4Tensor.from_tensor(layer.weight, 64, 256)
    codes = torch.stack([q.quantized_data >> 4, q.quantized_data & 15], dim=1).reshape(layer.weight.shape)
    scale = q.dequantize_scalers(q.quantized_scalers, q.quantization_factor, 256)
    return Side(codes, scale, q.get_original_weight())


def ao_mx_of(mode: ScaleCalculationMode) -> Callable[[Layer, QuantSpec], Side]:
    names = {
        "fp8_e4m3": torch.float8_e4m3fn,
        "fp8_e5m2": torch.float8_e5m2,
        "fp6_e2m3": ao_mx.DTYPE_FP6_E2M3,
        "fp6_e3m2": ao_mx.DTYPE_FP6_E3M2,
        "fp4_e2m1": torch.float4_e2m1fn_x2,
    }

    def theirs(layer: Layer, spec: QuantSpec) -> Side:
        scale, data = ao_mx.to_mx(layer.weight, names[spec.format], 32, mode)
        codes = data.view(torch.uint8)
        codes = ao_kernels.unpack_uint4(codes) if spec.bits == 4 else codes
        numbers = ao_mx.to_dtype(data, scale, names[spec.format], 32, torch.float32)
        return Side(codes, scale.float(), numbers)

    return theirs


def ao_nvfp4_of(layer: Layer, spec: QuantSpec) -> Side:
    whole = ao_nvfp4.per_tensor_amax_to_scale(layer.weight.abs().max())
    q = ao_nvfp4.NVFP4Tensor.to_nvfp4(layer.weight, per_tensor_scale=whole)
    return Side(ao_kernels.unpack_uint4(q.qdata), q.get_hp_scales(), q.dequantize(torch.float32))


def ao_floatx_of(layer: Layer, spec: QuantSpec) -> Side:
    fmt = FLOATS[spec.format]
    scale = ao._choose_qparams_affine_floatx(layer.weight, fmt.exponent, fmt.mantissa)
    codes = ao._quantize_affine_floatx(layer.weight, scale, fmt.exponent, fmt.mantissa)
    numbers = ao_floatx._floatx_unpacked_to_f32(codes, fmt.exponent, fmt.mantissa) * scale[:, None]
    return Side(codes, scale, numbers)


def ao_fp8(layer: Layer, spec: QuantSpec) -> Side:
    dtype = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[spec.format]
    scale = ao._choose_scale_float8(layer.weight, list(ao_block(spec, layer.weight)), dtype)
    q = ao._quantize_affine_float8(layer.weight, scale, dtype)
    return Side(q.view(torch.uint8), scale, ao._dequantize_affine_float8(q, scale))


def ao_awq(layer: Layer, spec: QuantSpec) -> Side:
    kind = ao.MappingType.SYMMETRIC if spec.zero == "none" else ao.MappingType.ASYMMETRIC
    config = IntxWeightOnlyConfig(getattr(torch, spec.format), PerGroup(64), kind)
    observer = AWQObserver(layer.weight, None, config)
    assert layer.inputs is not None
    observer(layer.inputs.float(), None)
    return scaled(layer, spec, observer.calculate_qparams())


def ao_gptq_refuses(layer: Layer, spec: QuantSpec) -> Side:
    config = ao_gptq.GPTQConfig(step="convert", base_config=Int8WeightOnlyConfig())
    ao_gptq.gptq_quantize(stats_of(layer).hessian, layer.weight, config)  # type: ignore[union-attr]
    raise NotImplementedError("it runs on a CPU now: compare it")


def scaled(layer: Layer, spec: QuantSpec, s: Tensor) -> Side:
    """A side of AWQ: its factors stand for the scales, and the codes are labkit's of W diag(s)."""
    q = rounded(layer, spec, s)
    return Side(q.codes, s, q.dequantize() / s)


def torchao() -> Iterator[Case]:
    halfway = (
        "it multiplies by 1 / scale where labkit divides, and the largest weight of a block, at (2^b - 1) / 2 scales, "
        "lies halfway between two codes, so that the last bit decides"
    )
    order = "it subtracts and divides in float32 and multiplies by 1 / scale, where labkit rounds once and divides"
    for bits in (2, 3, 4, 8):
        for block in ("channel", "g64"):
            call = "choose_qparams_affine, quantize_affine"
            for words, why in (("", halfway), (" narrow", order), (" asym", order)):
                if (bits, words) == (2, " narrow"):
                    continue  # three codes
                yield Case(
                    "rtn", f"int{bits} {block}{words} scale=fp32", "torchao", call, ao_affine, why, way.by_reciprocal
                )  # fmt: skip
        yield Case(
            "rtn", f"int{bits} g64 asym-float scale=fp32", "torchao", "_quantize_affine_tinygemm", ao_tinygemm,
            "it stores the middle of the grid for a zero point, in float32, and rounds (x - least) / scale, where "
            "labkit rounds x / scale + zero",
            partial(way.from_the_least, middle=True),
        )  # fmt: skip
        yield Case(
            "hqq", f"int{bits} g64 asym-float scale=fp32", "torchao", "_choose_qparams_and_quantize_affine_hqq", ao_hqq,
            ("with 4 bits its solver begins at a zero point rounded to a whole number" if bits == 4 else
             "it multiplies by 1 / scale throughout, so that last bits decide when the mean error no longer falls"),
            way.hqq_of_torchao,
        )  # fmt: skip
    yield Case(
        "rtn", "nf4 b64 scale=fp32", "torchao", "NF4Tensor.from_tensor", ao_nf4,
        "its table has four digits, and it stores the scales as int8 less their mean, which labkit does in "
        "bitsandbytes' dynamic8 only",
        way.nf4_of_four_digits,
    )  # fmt: skip
    rules = {
        "": ScaleCalculationMode.FLOOR,
        "-even": ScaleCalculationMode.EVEN,
        "-ceil": ScaleCalculationMode.RCEIL,
    }
    for name in FLOATS:
        for rule, mode in rules.items():
            call = f"to_mx, {mode.name}"
            yield Case("rtn", f"{name} g32 scale=e8m0{rule}", "torchao", call, ao_mx_of(mode))
    yield Case(
        "rtn", "nvfp4", "torchao", "NVFP4Tensor.to_nvfp4", ao_nvfp4_of,
        "it divides the largest weight by 6 * 448 at once, where labkit divides by 6 and then by 448, and a block's "
        "scale that lies halfway between two fp8 numbers goes by the last bit",
        way.nvfp4_at_once,
    )  # fmt: skip
    for name in ("fp4_e2m1", "fp6_e2m3", "fp6_e3m2"):
        yield Case("rtn", f"{name} channel scale=fp32", "torchao", "_quantize_affine_floatx", ao_floatx_of)
    for name in ("fp8_e4m3", "fp8_e5m2"):
        for block in ("tensor", "channel", "g64"):
            call = "_choose_scale_float8, _quantize_affine_float8"
            yield Case("rtn", f"{name} {block} scale=fp32", "torchao", call, ao_fp8)
    for zero in ("sym", "asym"):
        yield Case(
            "awq_scale", f"int4 g64 {zero} scale=fp32", "torchao", "AWQObserver.calculate_qparams", ao_awq,
            "it rounds times 1 / scale, and between two alphas that are about equally good a few codes decide",
            way.awq_of_torchao,
        )  # fmt: skip
    yield Case(
        "gptq", "int8 channel narrow scale=fp32", "torchao", "gptq_quantize", ao_gptq_refuses,
        "its GPTQ asks for a CUDA device, and for 4 bits for the package mslk",
    )  # fmt: skip


# optimum-quanto

QTYPES = {
    "int2": quanto.qint2,
    "int4": quanto.qint4,
    "int8": quanto.qint8,
    "fp8_e4m3": quanto.qfloat8_e4m3fn,
    "fp8_e5m2": quanto.qfloat8_e5m2,
}


def quanto_symmetric(layer: Layer, spec: QuantSpec) -> Side:
    qtype = QTYPES[spec.format]
    scale = quanto.AbsmaxOptimizer()(layer.weight, qtype, axis=0)
    q = quanto.quantize_weight(layer.weight, qtype, 0, scale, optimized=False)
    codes = q._data.view(torch.uint8) if qtype.is_floating_point else q._data
    return Side(codes, scale, q.dequantize())


def quanto_affine(optimizer: Any, zeropoint: bool = False) -> Callable[[Layer, QuantSpec], Side]:
    def theirs(layer: Layer, spec: QuantSpec) -> Side:
        W, qtype, size = layer.weight, QTYPES[spec.format], spec.block[1]  # type: ignore[index]
        scale, shift = optimizer(W, qtype, 0, size, zeropoint)
        q = quanto.quantize_weight(W, qtype, 0, scale, shift, size, optimized=False)
        codes = q._data.unpack().reshape(W.shape)
        return Side(codes, scale, q.dequantize(), shift if zeropoint else shift / scale)

    return theirs


def optimum_quanto() -> Iterator[Case]:
    name = "optimum-quanto"
    for spec in ("int8 channel narrow", "fp8_e4m3 channel", "fp8_e5m2 channel"):
        yield Case("rtn", f"{spec} scale=fp32", name, "AbsmaxOptimizer, quantize_weight", quanto_symmetric)
    for bits in (2, 4):
        for block in ("channel", "g64"):
            yield Case(
                "rtn", f"int{bits} {block} asym-float scale=fp32", name, "MaxOptimizer, quantize_weight",
                quanto_affine(quanto.MaxOptimizer()),
                "it subtracts in float32 and rounds (x - least) / scale, where labkit rounds x / scale + zero",
                way.from_the_least,
            )  # fmt: skip
            yield Case(
                "rtn", f"int{bits} {block} asym scale=fp32", name, "MaxOptimizer, zeropoint=True, quantize_weight",
                quanto_affine(quanto.MaxOptimizer(), zeropoint=True),
                "it does not widen a range to contain 0, so that a row without negative numbers is clipped",
                way.without_widening,
            )  # fmt: skip
        yield Case(
            "hqq", f"int{bits} g64 asym-float scale=fp32", name, "HqqOptimizer, quantize_weight",
            quanto_affine(quanto.HqqOptimizer()),
            "it keeps the zero points of the least mean error, of the whole matrix, where labkit, as the authors do, "
            "takes the last update",
            way.hqq_of_quanto,
        )  # fmt: skip


# llm-compressor


def llmc_args(spec: QuantSpec, **options: Any) -> ct.QuantizationArgs:
    block = spec.block[1]  # type: ignore[index]
    form: dict[str, Any] = {"strategy": "group", "group_size": block} if block else {"strategy": "channel"}
    form["type"] = "int" if spec.is_integer else "float"
    if spec.format == "fp4_e2m1" and isinstance(spec.scale, QuantSpec):
        form |= {"strategy": "tensor_group", "scale_dtype": torch.float8_e4m3fn}
    elif str(spec.scale).startswith("e8m0"):
        form |= {"scale_dtype": torch.uint8}
    return ct.QuantizationArgs(num_bits=spec.bits, symmetric=spec.zero == "none", **(form | options))


def llmc_scales(
    layer: Layer, args: ct.QuantizationArgs, observer: str, **options: Any
) -> dict[str, Tensor]:
    watch = Observer.load_from_registry(observer, base_name="weight", args=args, **options)
    return watch(layer.weight.clone()).get_qparams()


def llmc_side(W: Tensor, spec: QuantSpec, args: ct.QuantizationArgs, found: dict[str, Any]) -> Side:
    """The codes of W, and what they stand for."""
    scale, zero, whole = found["scale"], found["zero_point"], found["global_scale"]
    codes = ct.quantize(W.clone(), scale, zero, args, global_scale=whole)
    numbers = ct.dequantize(codes, scale, zero, args, global_scale=whole)
    scale = scale if whole is None else scale / whole
    if not spec.is_integer:
        return Side(float_codes(codes, spec.format), scale, numbers)
    if spec.zero == "none":
        return Side(codes, scale, numbers)
    half = 2 ** (spec.bits - 1)
    return Side(codes + half, scale, numbers, zero.float() + half)


def llmc_rtn(observer: str, **options: Any) -> Callable[[Layer, QuantSpec], Side]:
    def theirs(layer: Layer, spec: QuantSpec) -> Side:
        args = llmc_args(spec)
        return llmc_side(layer.weight, spec, args, llmc_scales(layer, args, observer, **options))

    return theirs


def llmc_hessian(layer: Layer) -> Tensor:
    linear = torch.nn.Linear(layer.weight.shape[1], len(layer.weight), bias=False)
    H, seen = llmc_helpers.make_empty_hessian(linear), torch.zeros(())
    assert layer.inputs is not None
    H, seen = llmc_helpers.accumulate_hessian(layer.inputs.float(), linear, H, seen)
    return H / seen


def llmc_gptq_of(actorder: str | None) -> Callable[[Layer, QuantSpec], Side]:
    def theirs(layer: Layer, spec: QuantSpec) -> Side:
        args = llmc_args(spec, actorder=actorder)
        found = llmc_scales(layer, args, "memoryless_minmax")
        H, scale, zero = llmc_hessian(layer)[None], found["scale"][None], found["zero_point"][None]
        W, _, fell_back = llmc_gptq.quantize_weight(layer.weight[None].clone(), H, scale, zero, None, args)
        assert not fell_back.any()
        return llmc_side(W[0], spec, args, found)

    return theirs


def llmc_awq_of(duo_scaling: bool) -> Callable[[Layer, QuantSpec], Side]:
    def theirs(layer: Layer, spec: QuantSpec) -> Side:
        """The search of AWQModifier for one norm and the one linear that reads it, on its parent's output."""

        class Parent(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = torch.nn.Linear(layer.weight.shape[1], len(layer.weight), bias=False)
                self.linear.weight.data = layer.weight.clone()

            def forward(self, x: Tensor) -> Tensor:
                return self.linear(x)

        assert layer.inputs is not None
        parent, x = Parent(), layer.inputs.float()
        args = llmc_args(spec)
        scheme = ct.QuantizationScheme(targets=["Linear"], weights=args)
        ct.initialize_module_for_quantization(parent.linear, scheme)
        parent.linear.quantization_enabled = False  # as their pipeline runs it: the search rounds by itself
        modifier = llmc_awq.AWQModifier(duo_scaling=duo_scaling, n_grid=21)
        modifier._smooth_activation_stats = {"norm": [x.abs().sum(dim=0), torch.tensor(len(x))]}
        cache = IntermediatesCache(None, None)
        cache.append({"x": x})
        modifier._parent_args_cache = {parent: cache}
        mapping = ResolvedMapping(
            "norm", torch.nn.Identity(), [parent.linear], ["linear"], parent, "parent"
        )
        with torch.no_grad():
            wanted = modifier._run_samples(parent)
            s = modifier._compute_best_scale(mapping, wanted, {parent.linear: layer.weight.clone()})
        return scaled(layer, spec, s.flatten())

    return theirs


def llm_compressor() -> Iterator[Case]:
    name, minmax = "llm-compressor", "MemorylessMinMaxObserver, quantize"
    rounding = (
        "it subtracts and divides in float32, and rounds once the zero point is added, where labkit rounds first, so "
        "that halves go the other way beside an odd zero point"
    )
    for bits in (2, 3, 4, 8):
        for block in ("channel", "g64"):
            yield Case("rtn", f"int{bits} {block} scale=fp32", name, minmax, llmc_rtn("memoryless_minmax"))
            yield Case(
                "rtn", f"int{bits} {block} asym scale=fp32", name, minmax, llmc_rtn("memoryless_minmax"), rounding,
                way.after_the_zero,
            )  # fmt: skip
    for spec in ("fp8_e4m3 channel scale=fp32", "fp4_e2m1 g32 scale=e8m0-even"):
        yield Case("rtn", spec, name, minmax, llmc_rtn("memoryless_minmax"))
    yield Case(
        "rtn", "nvfp4", name, minmax, llmc_rtn("memoryless_minmax"),
        "it multiplies by 6 * 448 / absmax of the tensor, where labkit divides by absmax / 6 / 448, and a block's "
        "scale that lies halfway between two fp8 numbers goes by the last bit",
        partial(way.nvfp4_at_once, multiply=True),
    )  # fmt: skip
    yield Case(
        "rtn", "mxfp4", name, minmax, llmc_rtn("memoryless_minmax"),
        "it rounds the largest weight of a block before it takes the power of two, labkit's e8m0-even, where labkit's "
        "mxfp4 takes the floor, as OCP's specification does",
        way.mxfp4_even,
    )  # fmt: skip
    for spec, why in {
        "mxfp8_e4m3": "where labkit's mxfp8_e4m3 takes the floor, as OCP's specification does",
        "fp8_e4m3 g32 scale=e8m0-even": "where torchao and labkit round it to the three of fp8_e4m3",
        "fp8_e4m3 g32 scale=e8m0-ceil": "so that 448 scales, which fit, get a scale twice as large",
    }.items():
        yield Case(
            "rtn", spec, name, minmax, llmc_rtn("memoryless_minmax"),
            f"it rounds the largest weight of a block to one bit of mantissa, as for fp4, {why}",
            way.mxfp8_by_one_bit,
        )  # fmt: skip
    for bits in (3, 4):
        spec = f"int{bits} g64 scale=fp32"
        yield Case(
            "rtn", spec, name, "MemorylessMSEObserver, quantize", llmc_rtn("memoryless_mse"),
            "it sums |error|^2.4 and shrinks a range to 0.81 of its width at most, where labkit sums squares and goes "
            "on to 0.01",
            way.mse_in_float32,
            options={"observer": "mse"},
        )  # fmt: skip
        yield Case(
            "rtn", spec, name, "MemorylessMSEObserver(norm=2, maxshrink=1, patience=100), quantize",
            llmc_rtn("memoryless_mse", norm=2.0, maxshrink=1.0, patience=100),
            "it adds squares in float32, where labkit does in float64, and the last bits choose between two ranges",
            partial(way.mse_in_float32, norm=2.0, steps=100),
            options={"observer": "mse"},
        )  # fmt: skip
    for spec in ("int4 g64", "int4 g64 asym", "int3 g64", "int3 g64 asym", "int4 channel asym"):
        for options, actorder in (({}, None), ({"act_order": True}, "static")):
            form = options if "channel" in spec else options | {"static_groups": True}
            yield Case(
                "gptq", f"{spec} scale=fp32", name, f"gptq_quantize.quantize_weight, actorder={actorder}",
                llmc_gptq_of(actorder),
                rounding + "; a code on the other side moves those after it",
                partial(way.gptq_of_llm_compressor, **options),
                form,
            )  # fmt: skip
    for bits in (3, 4):
        yield Case(
            "gptq", f"int{bits} g64 asym scale=fp32", name, "gptq_quantize.quantize_weight, actorder=None",
            llmc_gptq_of(None),
            "it fits every scale on the weights as they came, where labkit, unless told static_groups, fits a group's "
            "once its turn comes",
            way.gptq_of_llm_compressor,
        )  # fmt: skip
    for zero in ("sym", "asym"):
        spec = f"int4 g64 {zero} scale=fp32"
        call = "AWQModifier(duo_scaling={})._compute_best_scale"
        yield Case("awq_scale", spec, name, call.format(False), llmc_awq_of(False))
        yield Case(
            "awq_scale", spec, name, call.format(True), llmc_awq_of(True),
            "its default divides by a channel's mean weight to the power 1 - alpha, as AutoAWQ does; labkit keeps "
            "to the paper's equation 5",
            way.awq_with_duo_scaling,
        )  # fmt: skip
