"""Every backend against a product in float64 with the dequantized weight."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from labkit.kernels import BACKENDS, backends, linear, prepare
from labkit.kernels.int4_cpu import TOLERANCE
from labkit.quant import QuantizedTensor, QuantSpec, encode, fit

INT4 = [f"int4 g{group} {kind}" for group in (32, 64, 128, 256) for kind in ("sym", "narrow", "asym")] + [
    "int4 channel asym",
    "int4 tensor",
    "int4 32x128 asym",
    "int4 g512",
    "int4 g64 asym-float scale=bf16",
    "int4 g64 asym scale=(int8 b256 asym scale=fp32)",
]
ON_A_CPU = [name for name in BACKENDS if name != "triton_gpu"]
OTHERS = ["int3 g64", "int8 channel", "nf4 b64", "mxfp4", "nvfp4", "fp8_e4m3 128x128"]


def quantized(text: str, out: int = 48, inputs: int = 512) -> QuantizedTensor:
    torch.manual_seed(out + inputs)
    weight, spec = torch.randn(out, inputs), QuantSpec.parse(text)
    return encode(weight, spec, fit(weight, spec))


def exact(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ weight.dequantize(torch.float64).T
    return y if bias is None else y + bias.double()


def relative(y: Tensor, wanted: Tensor) -> float:
    return float((y.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("text", INT4)
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_int4_cpu_is_within_its_tolerance(text: str, rows: int) -> None:
    weight, x, bias = quantized(text), torch.randn(rows, 512), torch.randn(48)
    prepared = prepare(weight, "int4_cpu")
    assert prepared.backend == "int4_cpu" and prepared.shape == (48, 512)
    y = prepared(x, bias)
    assert y.shape == (rows, 48) and y.dtype == x.dtype
    assert relative(y, exact(x, weight, bias)) < TOLERANCE


@pytest.mark.parametrize("out", [1, 15, 16, 17, 33])
def test_any_number_of_output_features(out: int) -> None:
    weight, x = quantized("int4 g32 asym", out, 96), torch.randn(5, 96)
    y = prepare(weight, "int4_cpu")(x)
    assert y.shape == (5, out) and relative(y, exact(x, weight)) < TOLERANCE


@pytest.mark.parametrize("rows", range(1, 65))
def test_every_row_count_gives_the_rows_of_one_at_a_time(rows: int) -> None:
    prepared = prepare(quantized("int4 g64 asym", 48, 128), "int4_cpu")
    x = torch.randn(rows, 128)
    y = prepared(x)
    assert y.shape == (rows, 48)
    one_by_one = torch.cat([prepared(x[i : i + 1]) for i in range(rows)])
    assert relative(y, one_by_one.double()) < 0.005  # bfloat16 rounds once more or less


@pytest.mark.parametrize("text", INT4 + OTHERS)
def test_the_reference_is_exact_in_float32(text: str) -> None:
    weight, x, bias = quantized(text), torch.randn(3, 512), torch.randn(48)
    assert relative(prepare(weight, "reference")(x, bias), exact(x, weight, bias)) < 1e-6


@pytest.mark.parametrize("text", INT4 + OTHERS)
def test_our_own_kernel_comes_first_and_what_none_takes_goes_to_the_reference(text: str) -> None:
    weight = quantized(text)
    assert prepare(weight).backend == ("reference" if text.startswith("fp8") else "native_cpu")
    assert backends(weight)["reference"] is None
    assert (backends(weight)["int4_cpu"] is None) == (text in INT4)
    x = torch.randn(2, 512)
    assert relative(linear(x, weight), exact(x, weight)) < 1e-6


@pytest.mark.parametrize(
    ("text", "inputs", "reason"),
    [
        ("int4 g64", 100, "ragged"),
        ("int4 g48", 96, "multiple of 32"),
        ("int4 channel", 100, "multiple of 32"),
        ("int4 b64", 128, "flat runs"),
    ],
)
def test_the_reason_why_not_is_named(text: str, inputs: int, reason: str) -> None:
    weight = quantized(text, inputs=inputs)
    assert reason in str(backends(weight)["int4_cpu"])
    with pytest.raises(ValueError, match=reason):
        prepare(weight, "int4_cpu")
    x = torch.randn(2, inputs)
    assert relative(linear(x, weight), exact(x, weight)) < 1e-6


def test_outliers_fall_back_and_count() -> None:
    weight = replace(quantized("int4 g64"), outliers=(torch.tensor([3]), torch.tensor([50.0])))
    x = torch.randn(2, 512)
    assert prepare(weight).backend == "reference"
    assert relative(linear(x, weight), exact(x, weight)) < 1e-6


def test_act_order_is_undone() -> None:
    weight = quantized("int4 g32 asym", 32, 128)
    weight = replace(weight, g_idx=torch.randperm(128).int() // 32)
    x = torch.randn(3, 128)
    for backend in ON_A_CPU:
        assert relative(prepare(weight, backend)(x), exact(x, weight)) < TOLERANCE
    uneven = replace(weight, g_idx=torch.zeros(128, dtype=torch.int32))
    assert prepare(uneven).backend == "reference"


@pytest.mark.parametrize("backend", ON_A_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_leading_axes_dtype_and_no_rows(backend: str, dtype: torch.dtype) -> None:
    weight = quantized("int4 g64 asym", 40, 128)
    prepared = prepare(weight, backend)
    x = torch.randn(2, 3, 128).to(dtype)
    y = prepared(x)
    assert y.shape == (2, 3, 40) and y.dtype == dtype
    assert relative(y, exact(x, weight)) < TOLERANCE
    assert prepared(x[0, 0]).shape == (40,)
    assert prepared(x[:0]).shape == (0, 3, 40)
    # A view with strides of its own is read like its copy.
    wide = torch.randn(6, 256).to(dtype)
    assert torch.equal(prepared(wide[::2, ::2]), prepared(wide[::2, ::2].contiguous()))


def test_int4_takes_about_a_seventh_of_the_memory() -> None:
    weight = quantized("int4 g64 asym", 64, 512)
    fast, slow = prepare(weight, "int4_cpu"), prepare(weight, "reference")
    assert slow.nbytes == 4 * 64 * 512
    assert fast.nbytes == 64 * 512 // 2 + 64 * 8 * 2 * 2


def test_wrong_names_and_shapes_are_refused() -> None:
    weight = quantized("int4 g64")
    with pytest.raises(ValueError, match="backend must be"):
        prepare(weight, "int5_cpu")
    vector = quantized("int4 g64", 1, 64)
    with pytest.raises(ValueError, match="out_features, in_features"):
        prepare(replace(vector, codes=vector.codes[0]))
    for backend in ON_A_CPU:
        with pytest.raises(ValueError, match="512 input features"):
            prepare(weight, backend)(torch.randn(2, 256))


def test_also_right_on_processors_without_avx512() -> None:
    code = (
        "import torch; from labkit.kernels import prepare; from labkit.quant import QuantSpec, encode, fit;"
        "torch.manual_seed(0); spec = QuantSpec.parse('int4 g32 asym');"
        "w, x = torch.randn(48, 256), torch.randn(5, 256); q = encode(w, spec, fit(w, spec));"
        "y, z = (prepare(q, name)(x) for name in ('int4_cpu', 'reference'));"
        "print(float((y - z).norm() / z.norm()))"
    )
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert float(run.stdout) < TOLERANCE


def test_kernels_for_a_gpu_are_refused_without_one_and_triton_is_not_imported() -> None:
    with pytest.raises(ValueError, match="for a GPU, found codes on cpu"):
        prepare(quantized("int4 g64"), "triton_gpu")
    code = (
        "import sys; sys.modules['triton'] = None;"  # as on macOS, where there is none
        "import torch; from labkit.kernels import backends; from labkit.quant import QuantSpec, encode, fit;"
        "spec = QuantSpec.parse('int4 g32'); w = torch.ones(2, 32);"
        "print(backends(encode(w, spec, fit(w, spec)))['triton_gpu'])"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert "not installed" in run.stdout
